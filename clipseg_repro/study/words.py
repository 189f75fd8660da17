"""What a difference is called in prose. Words follow from a 95% interval, so that no notebook calls a tie a winner."""

import numpy as np
import pandas as pd

_ORDER = ("does not hold", "cannot be told here", "holds")


def paired(first, second, pictures=None, n: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of first - second, two figures of each of N samples: their mean difference and its 95%
    bootstrap interval. Samples are drawn with replacement, or the `pictures` (N labels) that they belong to."""
    difference = np.asarray(first, float) - np.asarray(second, float)
    labels = np.arange(len(difference)) if pictures is None else np.unique(pictures, return_inverse=True)[1]
    sums, sizes = np.bincount(labels, difference), np.bincount(labels)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(n, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / sizes[drawn].sum(1), (2.5, 97.5))
    return float(difference.mean()), float(low), float(high)


def compared(first: str, second: str, mean: float, low: float, high: float, unit: str = "", digits: int = 1) -> str:
    """Two things by the interval of their difference (first - second): what the better one has over the other, or, with
    zero inside, that they are about equal."""
    if high < 0:
        return compared(second, first, -mean, -high, -low, unit, digits)
    number, unit = f".{digits}f", f" {unit}" if unit else ""
    if low > 0:
        return f"{first}: {mean:{number}}{unit} over {second} ({low:{number}} to {high:{number}})"
    return f"{first} and {second}: about equal ({mean:+{number}}{unit}, {low:+{number}} to {high:+{number}})"


def judged(ledger: pd.DataFrame) -> str:
    """The claims of a `tables.ledger` as a list in Markdown, those that do not hold first: the paper's two numbers,
    this scale's, and the interval of their difference that the verdict follows from."""
    lines = []
    for row in sorted(ledger.itertuples(), key=lambda row: _ORDER.index(row.verdict)):
        here = "; here not measured on both sides"
        if row.difference == row.difference:
            here = f"; here {row.larger:.1f} against {row.smaller:.1f}, "
            here += f"{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f})"
        lines.append(
            f"- **{row.claim} {row.verdict}**: {row.statement}. In the paper {row.paper_larger:.1f} against "
            f"{row.paper_smaller:.1f}{here}. {row.carries}"
        )
    return "\n".join(lines)
