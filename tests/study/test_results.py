"""Results as files: tables, figures and their provenance."""

import hashlib
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipseg_repro.errors import InputError
from clipseg_repro.study.results import provenance, record, save_figure, save_table
from clipseg_repro.study.scales import SCALES


@pytest.fixture
def scale(tmp_path, tiny_folder):
    root = tmp_path / "VGPhraseCut_v0"
    root.mkdir()
    (root / "refer_test.json").write_text("[]")
    return replace(SCALES["mini"], model=str(tiny_folder), phrasecut=root, results=tmp_path / "results")


def test_table(scale):
    frame = pd.DataFrame({"a|b": ["x", "y"], "miou": [0.43449, np.nan], "n": [3, 4]}).set_index("a|b")
    saved = save_table(frame, "table3", "PhraseCut.", scale)
    path = scale.results / "tables/table3.csv"
    assert path.read_bytes() == b"a|b,miou,n\nx,0.434,3\ny,,4\n"
    pd.testing.assert_frame_equal(pd.read_csv(path), saved)
    assert path.with_suffix(".md").read_text().splitlines() == [
        "PhraseCut.",
        "",
        r"| a\|b | miou | n |",
        "| :--- | ---: | ---: |",
        "| x | 0.434 | 3 |",
        "| y |  | 4 |",
    ]


def test_provenance_holds_for_every_file_and_stays_while_the_file_does(scale, tiny_folder):
    book = scale.results / "provenance.json"
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", scale)
    entry = json.loads(book.read_text())["tables/one.csv"]
    assert entry["sha256"] == hashlib.sha256((scale.results / "tables/one.csv").read_bytes()).hexdigest()
    assert entry["model"]["sha256"] == hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert entry["caption"] == "One."
    assert len(entry["data"]) == 64
    assert set(provenance(scale)) >= {"version", "commit", "dirty", "seed", "time", "python", "torch", "machine"}

    other = replace(scale, seed=7)
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", other)
    assert json.loads(book.read_text())["tables/one.csv"] == entry
    save_table(pd.DataFrame({"a": [2]}), "one", "One.", other)
    assert json.loads(book.read_text())["tables/one.csv"]["seed"] == 7
    curve = scale.results / "training" / "curve.csv"
    curve.parent.mkdir()
    curve.write_text("step\n")
    record(curve, scale)
    assert set(json.loads(book.read_text())) == {"tables/one.csv", "training/curve.csv"}


def test_figure_is_the_same_bytes_each_time(scale):
    written = []
    for _ in range(2):
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.plot([0, 1])
        save_figure(figure, "line", scale)
        plt.close(figure)
        written.append((scale.results / "figures/line.png").read_bytes())
    assert written[0] == written[1]
    assert "Software" not in Image.open(scale.results / "figures/line.png").info
    with pytest.raises(InputError, match=r"result name '\.\./x'"):
        save_figure(figure, "../x", scale)
