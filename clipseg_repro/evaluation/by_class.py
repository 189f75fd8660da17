"""Figures of binary maps whose samples have a class: mIoU is the mean over classes, of counts summed within each."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from clipseg_repro.evaluation.metrics import KEYS, THRESHOLDS, SegmentationMetrics, resampled


@dataclass
class ClassResult:
    """Outcome of protocols whose samples have a class. samples: fold, picture (its id), class (its name), a row each;
    counts: (N, 49, 4), the `threshold_counts` of every sample. Figures are means over the folds (or families), mIoU in
    a fold the mean over its classes, of counts summed within each."""

    samples: pd.DataFrame
    counts: np.ndarray = field(repr=False)

    def of(self, fold) -> "ClassResult":
        """One fold alone."""
        own = (self.samples.fold == fold).to_numpy()
        return ClassResult(self.samples[own].reset_index(drop=True), self.counts[own])

    def _folds(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of every fold: counts, pictures, classes from 0."""
        folds = (own for _, own in self.samples.groupby("fold"))
        return [(self.counts[own.index], own["picture"], pd.factorize(own["class"])[0]) for own in folds]

    def at(self, threshold: float | None = None) -> dict[str, float]:
        """threshold, miou, iou_fg, iou_bin, ap, and each `_low` and `_high` (95%, pictures resampled within a fold).
        `threshold` None takes that of the best mIoU."""
        folds = self._folds()
        if threshold is None:
            every = [SegmentationMetrics.from_counts(counts, groups).compute()["miou"] for counts, _, groups in folds]
            threshold = float(THRESHOLDS[int(sum(every).argmax())])
        rows = [SegmentationMetrics.from_counts(counts, groups).at(threshold) for counts, _, groups in folds]
        figures, drawn = {"threshold": threshold}, self.resampled(threshold)
        for key in KEYS:
            low, high = np.percentile(drawn[key], (2.5, 97.5))
            figures |= {key: float(np.mean([row[key] for row in rows])), f"{key}_low": low, f"{key}_high": high}
        return figures

    def resampled(self, threshold: float) -> dict[str, np.ndarray]:
        """miou, iou_fg, iou_bin, ap of 1,000 resamples, (1000,) each: pictures drawn within each fold. Results about
        the same samples draw the same pictures, so that their difference can be taken draw by draw."""
        drawn = [resampled(*fold[:2], threshold, seed=n, groups=fold[2]) for n, fold in enumerate(self._folds())]
        return {key: np.mean([fold[key] for fold in drawn], 0) for key in KEYS}

    def by_class(self, threshold: float) -> dict[str, np.ndarray]:
        """{class: (1000,) its IoU in resamples of its samples}, counts summed over all folds. Results about the same
        samples draw the same ones."""
        place, found = int(np.abs(THRESHOLDS.numpy() - threshold).argmin()), {}
        for name, own in self.samples.groupby("class"):
            drawn = np.random.default_rng(0).integers(len(own), size=(1000, len(own)))
            hits, false, missed, _ = self.counts[own.index, place][drawn].sum(1).T
            found[name] = hits / (1 + hits + false + missed)
        return found

    def table(self, threshold: float) -> pd.DataFrame:
        """A row per class: class, samples, iou at a threshold, iou_low, iou_high (95%, samples resampled: of
        one or two they tell nothing)."""
        rows, drawn = [], self.by_class(threshold)
        for name, own in self.samples.groupby("class"):
            figures = SegmentationMetrics.from_counts(self.counts[own.index]).at(threshold)
            low, high = np.percentile(drawn[name], (2.5, 97.5))
            row = {"class": name, "samples": len(own)}
            rows.append(row | {"iou": figures["iou_fg"], "iou_low": low, "iou_high": high})
        return pd.DataFrame(rows)
