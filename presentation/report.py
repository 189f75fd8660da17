"""Write results/report.md from its template and results/: `make readme`."""

from pathlib import Path

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
            sides, difference = f"{row.larger:g} / {row.smaller:g}", f"{row.low:+g} to {row.high:+g}"
        paper = f"{row.paper_larger:g} / {row.paper_smaller:g}"
        lines.append(
            f"| {row.claim} | {row.statement} | {row.table} | {paper} | {sides} | {difference} | {row.verdict} |"
        )
    return "\n".join(lines)


def failed(results: Path) -> str:
    """The claims that do not hold, as a list."""
    own = _read(results, "claims").query("verdict == 'does not hold'")
    return "\n".join(
        f"- **[¬Re] {row.claim}** {row.statement}: {row.paper_larger:g} against {row.paper_smaller:g} in the paper, "
        f"{row.larger:g} against {row.smaller:g} here ({row.low:+g} to {row.high:+g})."
        for row in own.itertuples()
    )


def ablations(results: Path) -> str:
    lines = ["| | paper | mini | 95% interval |", "| :--- | ---: | ---: | ---: |"]
    for row in _read(results, "ablation_effects").query("setting == 'text'").itertuples():
        paper = f"{row.paper:+g}" if row.paper == row.paper else ""
        lines.append(f"| {row.method} | {paper} | {row.mini:+g} | {row.low:+g} to {row.high:+g} |")
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


if __name__ == "__main__":
    text = report(ROOT / "results")
    with written_whole(ROOT / "results" / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
