"""Pixel metrics of binary segmentation: mIoU, IoU_FG, IoU_BIN and AP (paper, section 4; released `metrics.py`).

A pixel is positive where p > t. Per map, one histogram of the probabilities replaces a scan per threshold, so a metric
holds a few fixed tensors however many images it has seen.

Two conventions:

- `released`: 1 is added to every denominator, and AP is Simpson's rule over the precision-recall points of the 49
  thresholds. These are the figures to set beside the paper's tables. (`scipy.integrate.simpson` of today; SciPy before
  1.11 treated an even number of points slightly differently.)
- `exact`: nothing is added, an IoU of 0 / 0 (nothing there, nothing predicted) is 1, samples without a counted pixel do
  not enter mIoU, and AP is the average precision over all pixels, as scikit-learn's, from about 80,000 bins.
"""

from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import simpson
from torchmetrics import Metric

from clipseg_repro.errors import InputError

KEYS = ("miou", "iou_fg", "iou_bin", "ap")
CONVENTIONS = ("released", "exact")
IGNORE = 255
THRESHOLDS = torch.arange(1, 50, dtype=torch.float64) / 50  # 0.02 to 0.98 in steps of 0.02

_LANES = 8  # copies of the histogram
_SHIFT = 13  # fine bins keep 10 bits of the mantissa: steps of 0.1% in p, and in 1 - p above one half
_FLOOR = (127 - 40) << 23 >> _SHIFT  # float32 bits of 2^-40: below it, probabilities share one bin
_HALF = ((126 << 23) >> _SHIFT) - _FLOOR  # the bin of p = 0.5


def threshold_counts(probabilities, target) -> torch.Tensor:
    """Count the pixels of one map at the 49 `THRESHOLDS`.

    probabilities: (h, w) floats in [0, 1], compared as float32 as in the released code; resized to the target's size
    (bilinear, align_corners=True) where they differ. target: (H, W) integers or bool: 1 object, 0 background, 255
    ignored. Tensors or arrays.
    Returns (49, 4) int64: true positives, false positives, false negatives, true negatives.
    Raises InputError for other shapes, other target values, and probabilities that are NaN or outside [0, 1].
    """
    return _counts(*_check(probabilities, target))


class SegmentationMetrics(Metric):
    """mIoU, IoU_FG, IoU_BIN per threshold, and AP, over any number of images in constant memory.

    IoU_FG: foreground IoU of the counts summed over all samples. IoU_BIN: mean of foreground and background IoU of the
    same sums. mIoU: with `num_groups=K`, foreground IoU of the counts summed per class, averaged over the classes seen;
    without, the mean of the samples' own IoUs (PhraseCut). States are sums: they add up across processes.

        metrics = SegmentationMetrics()
        metrics.update(probabilities, target)   # as often as you like
        metrics.at(0.3)                         # floats: threshold, miou, iou_fg, iou_bin, ap
        metrics.best("miou")                    # the same at the threshold of the highest mIoU

    num_groups: number of classes K, or None. convention: "released" or "exact" (see the module). Counting happens on
    the metric's device, to which inputs are moved.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, num_groups: int | None = None, convention: str = "released", **kwargs):
        super().__init__(**kwargs)
        if convention not in CONVENTIONS:
            raise InputError(f"unknown convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
        if num_groups is not None and num_groups < 1:
            raise InputError(f"num_groups is {num_groups}: give the number of classes (1 or more), or None")
        self.num_groups, self.convention = num_groups, convention
        groups, steps = num_groups or 1, len(THRESHOLDS)
        self.add_state("counts", torch.zeros(groups, steps, 4, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("iou_sum", torch.zeros(steps, dtype=torch.float64), dist_reduce_fx="sum")
        if convention == "exact":
            self.add_state("histogram", torch.zeros(3, 2 * _HALF + 1, dtype=torch.int64), dist_reduce_fx="sum")

    @classmethod
    def from_counts(cls, counts, groups=None, convention: str = "released") -> "SegmentationMetrics":
        """The metric of N samples that `threshold_counts` has counted, (N, 49, 4); with the samples' classes, N
        `groups` from 0, each class is one of its groups. The exact AP is that of probabilities in 50 steps."""
        counts = torch.as_tensor(counts)
        metrics = cls(None if groups is None else int(max(groups)) + 1, convention)
        metrics._add(counts, metrics._group_ids(groups, len(counts)))
        if convention == "exact":
            metrics.histogram[1:, : len(THRESHOLDS) + 1] = _steps(counts.sum(0))
        metrics._update_count = len(counts)
        return metrics

    def update(self, probabilities, target, groups=None) -> None:
        """Count a batch. Nothing is counted when any part of it is refused.

        probabilities, target: (B, H, W), (H, W), or sequences of (H, W) maps of any sizes, as for `threshold_counts`.
        groups: B class ids in [0, num_groups), exactly when `num_groups` was given.
        """
        maps, targets = _maps(probabilities, "probabilities"), _maps(target, "target")
        if len(maps) != len(targets):
            raise InputError(f"{len(maps)} probability maps for {len(targets)} targets: give one target per map")
        groups = self._group_ids(groups, len(maps))
        if not maps:
            return
        pairs, counts = [], []
        for p, t in zip(maps, targets, strict=True):
            pairs.append(_check(p, t, self.device))
            counts.append(_counts(*pairs[-1]))
        self._add(torch.stack(counts), groups)
        if self.convention == "exact":
            for p, t in pairs:
                _add_fine(self.histogram, p, t)

    def _add(self, counts, groups):
        self.counts.index_add_(0, groups, counts)
        seen = torch.ones_like(groups) if self.convention == "released" else (counts[:, 0].sum(1) > 0).long()
        self.samples.index_add_(0, groups, seen)
        if self.num_groups is None:
            self.iou_sum += (self._iou(counts)[0] * seen[:, None]).sum(0)

    def compute(self) -> dict[str, torch.Tensor]:
        """Figures of all samples: `thresholds`, `miou`, `iou_fg`, `iou_bin`, each (49,) float64, and `ap`, a scalar.

        AP is 0 where nothing is predicted, or nothing is there to find.
        """
        seen = self.samples.sum()
        if seen == 0:
            raise InputError("no sample was counted: call update with at least one map that has labelled pixels")
        total = self.counts.sum(0)
        fg, bg = self._iou(total)
        miou = self.iou_sum / seen if self.num_groups is None else self._iou(self.counts[self.samples > 0])[0].mean(0)
        ap = _simpson_ap(total.cpu().numpy()) if self.convention == "released" else _histogram_ap(self.histogram[1:])
        return {
            "thresholds": THRESHOLDS.to(self.device),
            "miou": miou,
            "iou_fg": fg,
            "iou_bin": (fg + bg) / 2,
            "ap": torch.as_tensor(ap, dtype=torch.float64, device=self.device),
        }

    def at(self, threshold: float) -> dict[str, float]:
        """Figures at one of the 49 thresholds: {"threshold", "miou", "iou_fg", "iou_bin", "ap"} as floats."""
        return self._row(_threshold_index(threshold))

    def best(self, key: str = "miou") -> dict[str, float]:
        """Figures, as `at` gives them, at the (lowest) threshold where `key` (miou, iou_fg or iou_bin) is highest."""
        if key not in KEYS[:3]:
            raise InputError(f"no best threshold for {key!r}: choose one of {', '.join(KEYS[:3])}")
        return self._row(int(self.compute()[key].cpu().numpy().argmax()))

    def _row(self, index):
        figures = self.compute()
        row = {key: float(figures[key][index]) for key in KEYS[:3]}
        return {"threshold": float(THRESHOLDS[index]), **row, "ap": float(figures["ap"])}

    def _group_ids(self, groups, samples):
        if (groups is None) != (self.num_groups is None):
            need = "were given but num_groups is None" if self.num_groups is None else "are missing"
            raise InputError(f"groups {need}: give num_groups and one class id per sample, or neither")
        if groups is None:
            return torch.zeros(samples, dtype=torch.int64, device=self.device)
        groups = torch.as_tensor(groups, device=self.device).reshape(-1)
        if len(groups) != samples:
            raise InputError(f"{len(groups)} groups for {samples} maps: give one class id per map")
        if samples and (groups.is_floating_point() or groups.min() < 0 or groups.max() >= self.num_groups):
            raise InputError(f"groups {groups.tolist()}: class ids must be integers in 0 to {self.num_groups - 1}")
        return groups.long()

    def _iou(self, counts):
        return _iou(counts, add_one=self.convention == "released")


def ious(counts, threshold: float) -> np.ndarray:
    """(N,): the foreground IoU of each of N samples at one threshold, of their stacked `threshold_counts` (N, 49, 4);
    the mean is PhraseCut's mIoU (released convention)."""
    return _iou(torch.as_tensor(counts)[:, _threshold_index(threshold)])[0].numpy()


def bootstrap(counts, clusters, threshold: float = 0.3, n: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of the figures at one threshold: of what `resampled` gives."""
    figures = resampled(counts, clusters, threshold, n, seed)
    return {key: tuple(np.percentile(figures[key], (2.5, 97.5)).tolist()) for key in KEYS}


def resampled(
    counts, clusters, threshold: float, n: int = 1000, seed: int = 0, groups=None, convention: str = "released"
) -> dict[str, np.ndarray]:
    """The figures at one threshold of `n` resamples of whole images, (n,) each, as `SegmentationMetrics.from_counts`
    has them.

    counts: (N, 49, 4), stacked `threshold_counts` of N samples. clusters: N image ids, whose samples stay together.
    groups: N classes, or None. Keys: miou (mean of the samples' IoUs, or of the classes' that a resample has), iou_fg,
    iou_bin and ap.
    """
    released = convention == "released"
    index = _threshold_index(threshold)
    counts, clusters = np.asarray(counts), np.asarray(clusters).reshape(-1)
    if counts.ndim != 3 or counts.shape[1:] != (len(THRESHOLDS), 4) or len(counts) == 0:
        raise InputError(f"counts of shape {counts.shape}: expected (N, {len(THRESHOLDS)}, 4) with N >= 1")
    if len(clusters) != len(counts):
        raise InputError(f"{len(clusters)} clusters for {len(counts)} samples: give one image id per sample")
    if n < 1:
        raise InputError(f"n is {n}: give the number of resamples, 1 or more")
    _, image = np.unique(clusters, return_inverse=True)
    images = image.max() + 1
    # A column each for the counts, the sample's IoU and its 1: one matrix product then sums every resample.
    iou = _iou(torch.from_numpy(counts[:, index]), released)[0].numpy()
    seen = np.ones(len(counts)) if released else counts[:, index].sum(1) > 0
    columns = np.column_stack([counts.reshape(len(counts), -1), iou * seen, seen])
    sums = np.zeros((images, columns.shape[1]))
    np.add.at(sums, image, columns)
    drawn = np.random.default_rng(seed).integers(images, size=(n, images)) + np.arange(n)[:, None] * images
    weights = np.bincount(drawn.ravel(), minlength=n * images).reshape(n, images).astype(np.float64)
    drawn_sums = weights @ sums
    totals = drawn_sums[:, :-2].reshape(n, len(THRESHOLDS), 4)
    fg, bg = (x.numpy() for x in _iou(torch.from_numpy(totals[:, index]), released))
    average = _simpson_ap if released else lambda total: _histogram_ap(_steps(torch.from_numpy(total)))
    ap = np.array([average(total) for total in totals])
    if groups is None:
        miou = drawn_sums[:, -2] / drawn_sums[:, -1]
    else:
        own = np.zeros((images, int(max(groups)) + 1, 5))
        np.add.at(own, (image, np.asarray(groups)), np.column_stack([counts[:, index], seen]))
        drawn_own = np.tensordot(weights, own, 1)
        iou = _iou(torch.from_numpy(drawn_own[..., :4]), released)[0].numpy()
        miou = np.nanmean(np.where(drawn_own[..., 4] > 0, iou, np.nan), 1)
    return {"miou": miou, "iou_fg": fg, "iou_bin": (fg + bg) / 2, "ap": ap}


def _maps(maps, name):
    """(B, H, W), (H, W) or a sequence of (H, W), as a list of (H, W)."""
    if isinstance(maps, (torch.Tensor, np.ndarray)):
        if maps.ndim not in (2, 3):
            raise InputError(f"{name} of shape {tuple(maps.shape)}: expected (B, H, W), (H, W) or a sequence of (H, W)")
        return [maps] if maps.ndim == 2 else list(maps)
    return list(maps)


def _tensor(x, device):
    if isinstance(x, np.ndarray):
        x = np.require(x, requirements=["C", "W"])  # torch takes no reversed axes, and warns of arrays that PIL locks
    return torch.as_tensor(x, device=device)


def _check(probabilities, target, device=None):
    """One map and its target, checked: float32 probabilities and uint8 labels, both of the target's size."""
    p, t = _tensor(probabilities, device).detach(), _tensor(target, device)
    for name, x in (("probabilities", p), ("target", t)):
        if x.ndim != 2 or x.numel() == 0:
            raise InputError(f"{name} of shape {tuple(x.shape)}: each map must be (H, W), not empty, without channels")
    if not p.is_floating_point():
        raise InputError(f"probabilities of type {p.dtype}: give floats in [0, 1]")
    if t.is_floating_point() or t.is_complex():
        raise InputError(f"target of type {t.dtype}: give integers 0 (background), 1 (object) or 255 (ignored)")
    p = p.float()
    low, high = torch.aminmax(p)
    if not (low >= 0 and high <= 1):  # also for NaN
        raise InputError(f"probabilities from {low:g} to {high:g}: must lie in [0, 1]; apply a sigmoid to logits")
    labels = t.to(torch.uint8)
    wide = t.dtype not in (torch.uint8, torch.bool)
    if (labels + 1).max() > 2 or (wide and (labels != t).any()):  # in uint8, 255 + 1 is 0
        value = t[(t != 0) & (t != 1) & (t != IGNORE)][0]
        raise InputError(f"target has the value {value}: use 0 (background), 1 (object) and 255 (ignored)")
    if p.shape != t.shape:
        p = F.interpolate(p[None, None], t.shape, mode="bilinear", align_corners=True)[0, 0].clamp_(0, 1)
    return p, labels


def _counts(p, target):
    # Bin 2j + sign(p - j / 50) for the threshold j / 50 nearest to p: pixels that do not pass it lie in bins up to 2j.
    # The float32 quotient is the float32 nearest to j / 50, so ties fall as in p > t (CUDA: by a tensor only).
    nearest = (p * 50).round_()
    bins = torch.addcdiv(p, nearest, p.new_tensor(50.0), value=-1).sign_().add_(nearest, alpha=2).to(torch.int16)
    # Rows of 128 bins for labels 0, 1 and 255 & 3; neighbours count in separate lanes, or one busy bin slows the rest.
    lanes = torch.arange(p.shape[1], device=p.device) % _LANES * 512
    bins.add_(target & 3, alpha=128).add_(lanes.to(torch.int16))
    rows = torch.bincount(bins.flatten(), minlength=_LANES * 512).view(_LANES, 4, 128).sum(0)
    up_to = rows[:2].cumsum(1)
    tn, fn = up_to[:, 2 : 2 * len(THRESHOLDS) + 1 : 2]
    fp, tp = up_to[0, -1] - tn, up_to[1, -1] - fn
    return torch.stack([tp, fp, fn, tn], dim=1)


def _add_fine(histogram, p, target):
    """Add a map to the (3, bins) histogram of ignored, background and object pixels.

    Bins are even in log p and, above one half, in log(1 - p), so that maps close to 0 or to 1 everywhere are resolved
    too; the leading bits of a float32 are just that.
    """
    tail = (torch.minimum(p, 1 - p).view(torch.int32) >> _SHIFT).clamp_(min=_FLOOR)
    side = (p - 0.5).sign_().int()
    bins = side.mul_((_FLOOR + _HALF) - tail).add_(_HALF)
    bins.add_(target + 1, alpha=histogram.shape[1])  # ignored pixels are row 0: in uint8, 255 + 1 is 0
    histogram.view(-1).index_add_(0, bins.flatten(), torch.ones_like(histogram[0, :1]).expand(bins.numel()))


def _iou(counts, add_one=True):
    """Foreground and background IoU of (..., 4) counts."""
    tp, fp, fn, tn = counts.double().unbind(-1)
    if add_one:
        return tp / (1 + tp + fp + fn), tn / (1 + tn + fp + fn)
    return tuple(torch.where(hit + fp + fn > 0, hit / (hit + fp + fn), 1.0) for hit in (tp, tn))


def _simpson_ap(counts):
    """Simpson's rule over the distinct (recall, precision) points of (49, 4) counts, where anything is predicted."""
    tp, fp, fn, _ = counts[counts[:, 0] + counts[:, 1] > 0].astype(np.float64).T
    if not tp.size:
        return 0.0
    # Points of equal recall keep the set's own order: the released code leaves it to chance in the same way.
    points = set(zip((tp / (1 + tp + fn)).tolist(), (tp / (1 + tp + fp)).tolist(), strict=True))
    recall, precision = np.array(sorted(points, key=itemgetter(0))).T
    return float(simpson(precision, x=recall))


def _steps(counts):
    """(2, 50): the background and the object pixels of (49, 4) counts between neighbouring thresholds."""
    tp, fp, fn, tn = counts.unbind(-1)
    up_to = torch.stack([tn, fn])
    return torch.cat([up_to, torch.stack([tn + fp, fn + tp])[:, -1:]], 1).diff(prepend=torch.zeros_like(up_to[:, :1]))


def _histogram_ap(histogram):
    """Sum over the bins of (2, bins) background and object pixels, highest first, of precision times gain in recall."""
    background, objects = histogram.flip(1).double()
    tp, fp = objects.cumsum(0), background.cumsum(0)
    precision = tp / (tp + fp).clamp(min=1)
    return (precision * objects).sum() / tp[-1].clamp(min=1)


def _threshold_index(threshold):
    gaps = (THRESHOLDS - threshold).abs()
    index = int(gaps.argmin())
    if not gaps[index] < 1e-6:  # also for NaN
        raise InputError(f"threshold {threshold}: choose one of 0.02, 0.04 ... 0.98")
    return index
