"""Benchmarks, one file each. Every reader gives the same `Sample`."""

from clipseg_repro.datasets.sample import Sample

__all__ = ["Sample"]
