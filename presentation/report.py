"""Write results/report.md, and report.pdf where a Chromium is installed, from results/: `make readme`."""

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import mistune
import pandas as pd

from clipseg_repro.files import written_whole
from clipseg_repro.study.front_page import table3, verdicts
from clipseg_repro.study.numbers import filled
from clipseg_repro.study.queue import queue
from clipseg_repro.study.scales import SCALES

ROOT = Path(__file__).parents[1]


def _read(results: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(results / "tables" / f"{name}.csv")


def claims(results: Path) -> str:
    """Every claim in a line, with the paper's two numbers, ours and the verdict."""
    lines = [
        "| | claim | table | paper | mini | difference | verdict |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | :--- |",
    ]
    for row in _read(results, "claims").itertuples():
        sides = difference = ""
        if row.difference == row.difference:
            sides, difference = f"{row.larger:.1f} / {row.smaller:.1f}", f"{row.low:+.1f} to {row.high:+.1f}"
        paper = f"{row.paper_larger:.1f} / {row.paper_smaller:.1f}"
        lines.append(
            f"| {row.claim} | {row.statement} | {row.table} | {paper} | {sides} | {difference} | {row.verdict} |"
        )
    return "\n".join(lines)


def failed(results: Path) -> str:
    """The claims that do not hold, as a list."""
    own = _read(results, "claims").query("verdict == 'does not hold'")
    return "\n".join(
        f"- **[¬Re] {row.claim}** {row.statement}: {row.paper_larger:.1f} against {row.paper_smaller:.1f} in the "
        f"paper, {row.larger:.1f} against {row.smaller:.1f} here ({row.low:+.1f} to {row.high:+.1f})."
        for row in own.itertuples()
    )


def ablations(results: Path) -> str:
    lines = ["| | paper | mini | 95% interval |", "| :--- | ---: | ---: | ---: |"]
    for row in _read(results, "ablation_effects").query("setting == 'text'").itertuples():
        paper = f"{row.paper:+.1f}" if row.paper == row.paper else ""
        lines.append(f"| {row.method} | {paper} | {row.mini:+.1f} | {row.low:+.1f} to {row.high:+.1f} |")
    return "\n".join(lines)


def costs(results: Path) -> str:
    runs = _read(results, "training_runs").groupby("device").agg(runs=("run", "size"), hours=("hours", "sum"))
    runs = runs.rename(index={"not recorded": "a machine that was not recorded"})
    told = ", ".join(f"{row.runs} runs in {row.hours:.1f} hours on {row.Index}" for row in runs.itertuples())
    return f"Training: {told} (runs that shared a device are counted in full)."


BLOCKS = {
    "count": lambda results: str(len(_read(results, "claims"))),
    "runs": lambda results: f"{len([*(results / 'measured').glob('*.npz')])} of {len(queue())}",
    "disagreements": lambda results: str(_read(results, "disagreements").about.nunique()),
    "pace": lambda results: f"{SCALES['mini'].pace:.0%}",
    "batch": lambda results: str(SCALES["mini"].training["batch"]),
    "verdicts": verdicts,
    "table3": table3,
    "claims": claims,
    "failed": failed,
    "ablations": ablations,
    "costs": costs,
}


def report(results: Path) -> str:
    """The report's text. Raises InputError for a number that is missing, with its name."""
    template = (ROOT / "presentation" / "report.template.md").read_text(encoding="utf-8")
    return filled(template, results, BLOCKS)


def page(text: str) -> str:
    """The report as a web page to be printed; its title has a checksum, so that a test can tell of what the PDF is."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    printed = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)  # on paper, links to files lead nowhere
    body = mistune.create_markdown(plugins=["table"])(printed)
    style = (
        "@page { size: A4; margin: 14mm 16mm } body { font: 9pt/1.32 Arial, 'Liberation Sans', sans-serif } "
        "h1 { font-size: 16pt } h2 { font-size: 12pt } h1, h2, h3 { margin: 0.7em 0 0.3em; break-after: avoid } "
        "p, ul { margin: 0.35em 0 } table { border-collapse: collapse; font-size: 7.8pt; margin: 0.5em 0 } "
        "th, td { border-bottom: 0.3pt solid #999; padding: 1.2pt 5pt; vertical-align: top } "
        "[style*=right] { white-space: nowrap } tr { break-inside: avoid }"
    )
    head = f"<meta charset='utf-8'><title>CLIPSeg, reproduced ({digest})</title><style>{style}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def to_pdf(text: str, pdf: Path):
    """Printed by a Chromium; says so where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        print(f"{pdf.name} is left as it is, for want of a Chromium (Debian: apt install chromium)")
        return
    with tempfile.TemporaryDirectory() as folder, written_whole(pdf) as temporary:
        web = Path(folder) / "report.html"
        web.write_text(page(text), encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-pdf-header-footer",
            f"--user-data-dir={folder}/user",
        ]
        printed = f"{folder}/report.pdf"
        command = [browser, *options, f"--print-to-pdf={printed}", web.as_uri()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.copyfile(printed, temporary)


if __name__ == "__main__":
    text = report(ROOT / "results")
    with written_whole(ROOT / "results" / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    to_pdf(text, ROOT / "results" / "report.pdf")
