"""The README's main table and the ledger's summary, made from results/: `make readme`, which renews the crate too."""

import sys
from pathlib import Path

import pandas as pd

from clipseg_repro.errors import InputError
from clipseg_repro.files import written_whole
from clipseg_repro.study.crate import write_crate
from clipseg_repro.study.scales import get_scale

BEGIN, END = "<!-- made by make readme -->", "<!-- end -->"
METRICS = {"miou": "mIoU", "iou_fg": "IoU_FG", "ap": "AP"}


def table3(results: Path) -> str:
    """Table 3, paper beside mini, in Markdown."""
    table = pd.read_csv(results / "tables" / "table3.csv")
    own = table[~table.setting.str.startswith("cited")]
    lines = [f"| Table 3: PhraseCut, percent | {' | '.join(f'{m}, paper | {m}, mini' for m in METRICS.values())} |"]
    lines += ["| :--- |" + " ---: |" * 2 * len(METRICS)]
    for method, row in own.groupby("method", sort=False):
        figures = row.set_index("metric")
        cells = []
        for metric in METRICS:
            paper, here, low, high = figures.loc[metric, ["paper", "mini", "low", "high"]]
            cells += ["" if pd.isna(paper) else f"{paper:.1f}"]
            cells += ["not measured" if pd.isna(here) else f"{here:.1f} ({low:.1f} to {high:.1f})"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(results: Path) -> str:
    """What became of the claims, in a sentence."""
    claims = pd.read_csv(results / "tables" / "claims.csv")
    words = {"holds": "hold", "does not hold": "do not hold"}
    told = []
    for verdict, own in claims.groupby("verdict").claim:
        named = f" ({', '.join(own)})" if verdict in words else ""
        told.append(f"{len(own)} {words.get(verdict, verdict)}{named}")
    return (
        f"The paper as {len(claims)} comparisons, each judged at mini scale by a rule that was fixed before: "
        f"{'; '.join(sorted(told, key=len, reverse=True))}."
    )


def front_page(results: Path) -> str:
    """Markdown of a picture, of Table 3, paper beside mini, and of what became of the claims."""
    return "\n".join(
        [
            "![A picture, the truth, and what four words find](results/figures/quickstart.png)",
            "",
            "Mini models on mini PhraseCut, 95% intervals over images and seeds; the paper's on the real one:",
            "",
            table3(results),
            "",
            f"{verdicts(results)} [The ledger](results/tables/claims.md) has every one.",
        ]
    )


def with_front_page(readme: str, results: Path) -> str:
    """The README with its generated part made anew. Raises InputError where its marks are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"the README lacks the marks '{BEGIN}' and '{END}': put them where the table shall be")
    return f"{before}{BEGIN}\n{front_page(results)}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    text = with_front_page(path.read_text(encoding="utf-8"), path.parent / "results")
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    write_crate(get_scale())
