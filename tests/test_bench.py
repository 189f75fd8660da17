"""The benchmark: its peers do the same work, its clock takes medians in turn, and its tables have every measurement."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from clipseg_repro import bench
from clipseg_repro.evaluation.metrics import threshold_counts


def test_peer_of_the_metrics_counts_the_same():
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.integers(0, 101, (20, 30)) / 100).float()  # many ties at thresholds
    target = torch.from_numpy(rng.integers(0, 2, (20, 30)).astype(np.uint8))
    assert torch.equal(bench.sorted_scan(probabilities, target), threshold_counts(probabilities, target))


def test_medians_of_contestants_in_turn(monkeypatch):
    clock = iter(np.cumsum([0, 1, 0, 20, 0, 3, 0, 60, 0, 2, 0, 10]))  # 1, 20, 3, 60, 2, 10 seconds
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    calls = []
    seconds = bench.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert seconds == {"a": 2, "b": 20}
    assert calls == list("ab" * 4)  # the first round is not timed


def test_prompts_are_measured_in_both_dtypes_and_give_equal_logits(tiny_model, monkeypatch):
    monkeypatch.setattr(bench, "PROMPT_GOALS", {1: 1.15, 3: 3})
    monkeypatch.setattr(bench, "DEFAULT_DTYPE_GOAL", (3, 35))
    model, processor = tiny_model
    table = bench.prompts_table(deepcopy(model), processor, torch.bfloat16, repeats=1)
    assert list(zip(table.prompts, table.dtype, strict=True)) == [
        (k, dtype) for k in (1, 3) for dtype in ("float32", "bfloat16")
    ]
    assert (table.difference_percent[table.dtype == "float32"] < 0.001).all()
    assert (table.difference_percent[table.dtype == "bfloat16"] < 10).all()
    assert table.ratio.to_numpy() == pytest.approx(table.documented_ms / table.ours_ms)
    assert table.goal.tolist() == pytest.approx([1.15, np.nan, 3, 35], nan_ok=True)


def test_full_size_is_the_released_models():
    model, processor = bench.full_size()
    assert sum(p.numel() for p in model.decoder.parameters()) == 1_127_009  # the refined head's, protocol.md section 1
    assert model.config.vision_config.hidden_size == 768
    assert processor.image_processor.size["height"] == 352
