"""The report is what its template and the results give."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from clipseg_repro.errors import InputError

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("report", ROOT / "presentation" / "report.py")
report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report)


def test_the_report_is_current():
    """After new results: make readme."""
    assert report.report(ROOT / "results") == (ROOT / "results" / "report.md").read_text(encoding="utf-8")


def test_a_missing_number_stops_it_with_its_name(tmp_path):
    shutil.copytree(ROOT / "results" / "tables", tmp_path / "tables")
    (tmp_path / "tables" / "negatives.csv").unlink()
    with pytest.raises(InputError, match="negatives; no negatives; absent: area marked"):
        report.report(tmp_path)


def test_the_pdf_is_of_this_report():
    """After new results: make readme, where a Chromium is installed."""
    (title,) = re.findall(r"<title>(.+?)</title>", report.page(report.report(ROOT / "results")))
    printed = (ROOT / "results" / "report.pdf").read_bytes()
    assert title.replace("(", r"\(").replace(")", r"\)").encode() in printed
    assert len(re.findall(rb"/Type /Page\b", printed)) <= 4
