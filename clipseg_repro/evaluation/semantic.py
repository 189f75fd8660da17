"""Every pixel one of many classes, from a binary map per class: VOC, Pascal Context, COCO-Stuff, the paper's Table 4.

A picture is encoded once for all classes. IoU is of areas summed over the data set, as mmsegmentation has it (the mean
of pictures' IoUs is another figure).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from clipseg_repro.datasets.class_masks import VOID, LabelMaps
from clipseg_repro.datasets.held_out import held_out
from clipseg_repro.datasets.voc import CLASSES
from clipseg_repro.evaluation.per_image import measure

BACKGROUND_FACTOR = 3  # of the background's probability (released models/clipseg.py, CLIPSegMultiLabel)
# What JoEm's get_unseen_idx gives for the numbers of pairs, 2 and 5, which it takes for numbers of classes.
RELEASED_UNSEEN = {4: [10, 14], 10: [16, 17, 18, 19, 20]}


@dataclass
class SemanticResult:
    """Outcome of `semantic`. areas: (N, C, 3) int64, pixels of each picture that are class c in prediction and truth,
    in the prediction, in the truth."""

    classes: tuple[str, ...]
    areas: np.ndarray

    def iou(self, pictures=slice(None)) -> np.ndarray:
        """(C,) IoU of every class over some pictures; NaN where it is neither there nor predicted."""
        both, predicted, there = self.areas[pictures].sum(0).T
        with np.errstate(invalid="ignore"):
            return both / (predicted + there - both)

    def miou(self, chosen=slice(None), pictures=slice(None)) -> float:
        """Mean IoU of the chosen classes (places), those without a pixel left out; NaN if there are none."""
        iou = self.iou(pictures)[chosen]
        iou = iou[~np.isnan(iou)]
        return float(iou.mean()) if len(iou) else np.nan

    def interval(self, statistic: Callable[[np.ndarray], float], n: int = 1000, seed: int = 0) -> np.ndarray:
        """95% percentile interval of statistic(places of pictures), a number or an array: low, high."""
        drawn = np.random.default_rng(seed).integers(len(self.areas), size=(n, len(self.areas)))
        values = np.array([statistic(pictures) for pictures in drawn])
        measured = np.where(np.isnan(values).all(0), 0.0, values)  # of what is not there, no interval
        return np.where(np.isnan(values).all(0), np.nan, np.nanpercentile(measured, (2.5, 97.5), axis=0))

    def table(self) -> pd.DataFrame:
        """A row per class: class, pictures that show it, iou."""
        shown = (self.areas[..., 2] > 0).sum(0)
        return pd.DataFrame({"class": self.classes, "pictures": shown, "iou": self.iou()})


def semantic(
    segmenter,
    data: LabelMaps,
    template: str = "{}",
    limit: int | None = None,
    keep: Path | None = None,
    background: float | None = None,
) -> SemanticResult:
    """The most probable class of every labelled pixel, asked for by name. The probability of a class called background
    is multiplied by BACKGROUND_FACTOR, as in the paper's Table 4, or it is `background` everywhere. `limit`, `keep`: as
    in `per_image.measure`."""
    prompts = [template.format(words) for words in data.prompts]
    factors = [BACKGROUND_FACTOR if name == "background" else 1 for name in data.classes]
    conditions = segmenter.conditions(prompts)

    def read(i):
        return i, data.image(i), data.labels(i)

    def work(segmenter, i, image, labels):
        segmenter.set_image(image)
        best, guess = np.zeros(labels.shape, np.float32), np.zeros(labels.shape, np.uint8)
        for c, (probability, factor) in enumerate(zip(segmenter.maps(conditions), factors, strict=True)):
            if factor > 1:
                probability = factor * probability if background is None else np.full_like(probability, background)
            better = probability > best
            best[better], guess[better] = probability[better], c
        labelled = labels != VOID
        guess, labels = guess[labelled], labels[labelled]
        count = lambda values: np.bincount(values, minlength=len(prompts))  # noqa: E731
        areas = np.column_stack([count(labels[guess == labels]), count(guess), count(labels)])
        return [{"picture": i, "areas": areas.tolist()}], None

    pictures = list(range(len(data)))[:limit]
    label = f"{data.title}: {len(prompts)} classes"
    rows = measure(
        segmenter,
        data,
        pictures,
        read,
        work,
        label,
        keep=keep,
        settings={"template": template, "background": background},
    )
    return SemanticResult(tuple(data.classes), np.array([row["areas"] for row in rows], np.int64))


def generalized_zero_shot(result: SemanticResult, unseen: int) -> pd.DataFrame:
    """Table 4's row for `unseen` held-out classes of VOC, in percent: reading, miou_seen (background too), miou_unseen,
    harmonic (the mean of the two), each with `_low` and `_high`.

    Two readings: as described, and, of the two rows that the paper has, as the released score.py computes it. That asks
    JoEm for other classes than training left out, and hands its evaluator the unseen ones as the seen.
    """
    places = [result.classes.index(name) for name in held_out(f"unseen-{unseen}")]
    readings = {"as described": (_others(places), places)}
    if unseen in RELEASED_UNSEEN:
        readings["as released"] = (RELEASED_UNSEEN[unseen], _others(RELEASED_UNSEEN[unseen]))
    rows = []
    for reading, (first, second) in readings.items():

        def figures(pictures=slice(None), first=first, second=second):
            seen, novel = (100 * result.miou(chosen, pictures) for chosen in (first, second))
            return np.array([seen, novel, 2 * seen * novel / (seen + novel) if seen + novel > 0 else 0.0])

        low, high = result.interval(figures)
        row = {"unseen": unseen, "reading": reading}
        for key, *values in zip(("miou_seen", "miou_unseen", "harmonic"), figures(), low, high, strict=True):
            row |= {f"{key}{end}": float(value) for end, value in zip(("", "_low", "_high"), values, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows)


def _others(places: list[int]) -> list[int]:
    return [c for c in range(len(CLASSES)) if c not in places]
