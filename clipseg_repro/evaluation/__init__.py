"""Evaluation: the metrics, and the protocols of the paper's tables by family."""

from clipseg_repro.evaluation.metrics import SegmentationMetrics, bootstrap
from clipseg_repro.evaluation.referring import absent_phrases, phrasecut

__all__ = ["SegmentationMetrics", "absent_phrases", "bootstrap", "phrasecut"]
