"""Metrics against the authors' figures, scikit-learn, torchmetrics, hand-worked cases and properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import binary_jaccard_index
from torchmetrics.utilities import dim_zero_sum

from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.metrics import (
    CONVENTIONS,
    KEYS,
    THRESHOLDS,
    SegmentationMetrics,
    bootstrap,
    ious,
    threshold_counts,
)

RELEASED = json.loads((Path(__file__).parents[1] / "data" / "released_metrics.json").read_text())
CURVES = KEYS[:3]


def scene(rng, shape=(48, 40), skill=2.0):
    """A random blob, and logistic scores that know it to a degree."""
    y, x = np.indices(shape)
    cy, cx, r = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(5, 18)
    target = ((y - cy) ** 2 + (x - cx) ** 2 < r**2).astype(np.uint8)
    scores = skill * (target * 2.0 - 1.0) + rng.normal(size=shape) * 2
    return (1 / (1 + np.exp(-scores))).astype(np.float32), target


def with_ignored(rng, pair):
    p, t = pair
    return p, np.where(rng.random(t.shape) < 0.2, 255, t).astype(np.uint8)


def at_ties(rng, shape=(48, 40)):
    """Probabilities on the float32 thresholds and on their float32 neighbours."""
    ties = (np.arange(51) / 50).astype(np.float32)
    near = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1))])
    return rng.choice(near, size=shape), rng.integers(0, 2, shape).astype(np.uint8)


def flat_recall(rng, shape=(48, 40)):
    """Two levels on the object, all levels on the background."""
    target = scene(rng, shape)[1]
    levels = rng.choice(np.array([0.305, 0.805], np.float32), size=shape)
    return np.where(target == 1, levels, rng.random(shape)).astype(np.float32), target


CASES = {
    "random": lambda rng: [scene(rng) for _ in range(6)],
    "weak": lambda rng: [scene(rng, skill=0.1) for _ in range(4)],
    "resized": lambda rng: [
        (scene(rng, (24, 20))[0], scene(rng, s)[1]) for s in ((48, 40), (31, 57), (12, 9), (24, 20))
    ],
    "ignored": lambda rng: (
        [with_ignored(rng, scene(rng)) for _ in range(4)] + [(scene(rng)[0], np.full((48, 40), 255, np.uint8))]
    ),
    "empty masks": lambda rng: [(p, t * 0) for p, t in (scene(rng), scene(rng))] + [scene(rng)],
    "only empty masks": lambda rng: [(p, t * 0) for p, t in (scene(rng), scene(rng))],
    "all object": lambda rng: [(p, t * 0 + 1) for p, t in (scene(rng), scene(rng))],
    "ties": lambda rng: [at_ties(rng) for _ in range(3)],
    "constant": lambda rng: [(np.full((20, 20), v, np.float32), scene(rng, (20, 20))[1]) for v in (0.3, 0.5, 1.0, 0.0)],
    "never confident": lambda rng: [(p * np.float32(0.29), t) for p, t in (scene(rng), scene(rng))],
    "perfect": lambda rng: [(t.astype(np.float32), t) for _, t in (scene(rng), scene(rng))],
    "classes": lambda rng: [scene(rng) for _ in range(7)],
    # recall takes three values, so Simpson's rule meets many points of equal recall
    "flat recall": lambda rng: [flat_recall(rng) for _ in range(3)],
    "all at once": lambda rng: [
        *(with_ignored(rng, at_ties(rng)) for _ in range(3)),
        (at_ties(rng, (9, 11))[0], scene(rng)[1] * 0),  # resized ties, an empty mask: a class without object
        (np.ones((5, 5), np.float32), np.ones((7, 5), np.uint8)),
        (at_ties(rng)[0], np.full((48, 40), 255, np.uint8)),
    ],
}
GROUPS = {"classes": [3, 0, 3, 5, 0, 0, 5], "all at once": [0, 3, 0, 6, 3, 6]}


def case(name):
    """Maps, targets and class ids (or None) of a case, the same on every machine: seeded by the case's place."""
    pairs = CASES[name](np.random.default_rng(list(CASES).index(name)))
    return [p for p, _ in pairs], [t for _, t in pairs], GROUPS.get(name)


def measure(maps, targets, groups=None, num_groups=None, convention="released"):
    metrics = SegmentationMetrics(num_groups=num_groups, convention=convention)
    metrics.update(maps, targets, groups)
    return metrics


def union(counts):
    tp, fp, fn, _ = counts.double().unbind(-1)
    return tp + fp + fn


# --- the released convention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors_figures(name):
    maps, targets, groups = case(name)
    metrics = measure(maps, targets, groups, None if groups is None else 7)
    figures, expected = metrics.compute(), RELEASED[name]
    summed = metrics.counts.sum(0).T.tolist()
    assert summed == [expected["counts"][key] for key in ("tp", "fp", "fn", "tn")]
    for key in CURVES:
        np.testing.assert_allclose(figures[key][::6], expected[key], rtol=0, atol=1e-9)
        best = metrics.best(key)
        np.testing.assert_allclose([best["threshold"], best[key]], expected["best"][key], rtol=0, atol=1e-9)
    assert float(figures["ap"]) == pytest.approx(expected["ap"], abs=1e-9)


def test_nothing_predicted_has_figures():
    """A departure: the released code stops here ("no predictions is made")."""
    figures = measure([np.full((4, 5), 0.01, np.float32)], [np.eye(4, 5, dtype=np.uint8)]).at(0.5)
    assert figures == {"threshold": 0.5, "miou": 0, "iou_fg": 0, "iou_bin": pytest.approx(16 / 21 / 2), "ap": 0}


def test_thresholds_are_the_released_ones():
    released = np.linspace(0, 1, 51)[1:-1]
    np.testing.assert_allclose(THRESHOLDS, released, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(THRESHOLDS.numpy().astype(np.float32), released.astype(np.float32))


def test_ties_fall_as_a_float32_comparison_in_torch():
    centres = np.concatenate([THRESHOLDS.numpy(), (np.arange(50) + 0.5) / 50]).astype(np.float32)
    p = (centres.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)).view(np.float32)
    p = torch.from_numpy(np.append(p.ravel(), np.array([0, 1e-45, 1e-38, 0.01, 1], np.float32)))
    released = [p > t for t in np.linspace(0, 1, 51)[1:-1]]  # a Python number takes the tensor's own float32
    passed = torch.stack([threshold_counts(x.view(1, 1), torch.ones(1, 1, dtype=torch.uint8))[:, 0] for x in p], dim=1)
    assert torch.equal(passed.bool(), torch.stack(released))


def test_counts_equal_a_plain_comparison():
    (p, *_), (t, *_), _ = case("ignored")
    p, t = torch.from_numpy(p), torch.from_numpy(t)
    for (tp, fp, fn, tn), threshold in zip(threshold_counts(p, t).tolist(), THRESHOLDS.tolist(), strict=True):
        hit = p > threshold
        assert tp == int((hit & (t == 1)).sum())
        assert fp == int((hit & (t == 0)).sum())
        assert fn == int((~hit & (t == 1)).sum())
        assert tn == int((~hit & (t == 0)).sum())


# --- the exact convention ----------------------------------------------------------------------------------------


def spread(scores, how):
    """Probabilities from logits, pushed against 0 or 1 or kept apart."""
    shift = {"middle": 0, "near 0": -14, "near 1": 9}[how]
    return torch.sigmoid(torch.from_numpy(scores + shift)).float()


@pytest.mark.parametrize("how", ["middle", "near 0", "near 1"])
@pytest.mark.parametrize("skill", [0.2, 1.0, 3.0])
def test_exact_ap_equals_scikit_learn(how, skill):
    rng = np.random.default_rng(3)
    t = (rng.random((6, 64, 64)) < 0.15).astype(np.uint8)
    p = spread(skill * t + rng.normal(size=t.shape), how)
    t[:, :9] = 255
    keep = t != 255
    expected = average_precision_score(t[keep], p.numpy()[keep])
    ap = measure(p, t, convention="exact").compute()["ap"]
    assert float(ap) == pytest.approx(expected, abs=1e-3)
    assert float(ap) != float(measure(p, t).compute()["ap"])


@pytest.mark.parametrize("name", sorted(set(CASES) - {"only empty masks", "resized", "all at once"}))
def test_exact_ap_equals_scikit_learn_on_hard_cases(name):
    maps, targets, _ = case(name)
    p, t = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in targets])
    ap = measure(maps, targets, convention="exact").compute()["ap"]
    assert float(ap) == pytest.approx(average_precision_score(t[t != 255], p[t != 255]), abs=1e-3)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_exact_iou_equals_torchmetrics(threshold):
    maps, targets, _ = case("ignored")
    p, t = torch.from_numpy(np.stack(maps[:4])), torch.from_numpy(np.stack(targets[:4])).long()
    row = measure(p, t, convention="exact").at(threshold)

    def jaccard(p, t):
        return float(binary_jaccard_index(p, t, threshold=threshold, ignore_index=255))

    fg, swapped = jaccard(p, t), torch.where(t == 255, t, 1 - t)
    # torchmetrics, too, takes p > threshold; the background is its complement.
    bg = float(binary_jaccard_index((p <= threshold).long(), swapped, ignore_index=255))
    assert row["iou_fg"] == pytest.approx(fg, abs=1e-6)
    assert row["iou_bin"] == pytest.approx((fg + bg) / 2, abs=1e-6)
    assert row["miou"] == pytest.approx(np.mean([jaccard(a, b) for a, b in zip(p, t, strict=True)]), abs=1e-6)


def test_exact_nothing_there_and_nothing_predicted_is_right():
    empty = np.zeros((5, 5), np.uint8)
    ignored = np.full((5, 5), 255, np.uint8)
    low = np.full((5, 5), 0.1, np.float32)
    assert measure([low], [empty], convention="exact").at(0.5) == {
        "threshold": 0.5,
        "miou": 1,
        "iou_fg": 1,
        "iou_bin": 1,
        "ap": 0,
    }
    metrics = measure([low, low], [empty, ignored], convention="exact")
    assert metrics.samples.tolist() == [1]  # a sample without a counted pixel has no IoU


# --- properties --------------------------------------------------------------------------------------------------

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
conventions = st.sampled_from(CONVENTIONS)


def batch(seed, n=4):
    rng = np.random.default_rng(seed)
    return [
        with_ignored(rng, scene(rng, (rng.integers(3, 20), rng.integers(3, 20)), rng.uniform(-2, 4))) for _ in range(n)
    ]


def same(a, b, atol=1e-12):
    return all(torch.allclose(a[key], b[key], rtol=0, atol=atol) for key in a)


@quick
@given(seeds, conventions, st.booleans())
def test_bounds(seed, convention, grouped):
    maps, targets = zip(*batch(seed), strict=True)
    figures = measure(maps, targets, *([[0, 1, 1, 4], 5] if grouped else []), convention=convention).compute()
    for key in CURVES:
        assert figures[key].shape == (49,)
        assert (figures[key] >= 0).all()
        assert (figures[key] <= 1).all()
    assert 0 <= figures["ap"] <= (1 if convention == "exact" else 1.1)  # Simpson's rule may overshoot


@quick
@given(seeds, conventions)
def test_order_of_samples_and_of_pixels_is_irrelevant(seed, convention):
    pairs, rng = batch(seed), np.random.default_rng(seed)
    shuffled = []
    for i in rng.permutation(len(pairs)):
        order = rng.permutation(pairs[i][0].size)
        shuffled.append([x.ravel()[order][None] for x in pairs[i]])
    a, b = (measure(*zip(*x, strict=True), convention=convention).compute() for x in (pairs, shuffled))
    assert same(a, b)


@quick
@given(seeds, conventions, st.integers(0, 4))
def test_split_updates_and_summed_states_equal_one_update(seed, convention, cut):
    maps, targets = zip(*batch(seed), strict=True)
    whole = measure(maps, targets, convention=convention)
    split = measure(maps[:cut], targets[:cut], convention=convention)
    other = measure(maps[cut:], targets[cut:], convention=convention)
    for state in whole._defaults:  # what a sum over two processes does
        setattr(other, state, getattr(split, state) + getattr(other, state))
        assert whole._reductions[state] is dim_zero_sum
    split.update(maps[cut:], targets[cut:])
    assert same(whole.compute(), split.compute())
    assert same(whole.compute(), other.compute())


@quick
@given(seeds, conventions)
def test_perfect_prediction(seed, convention):
    _, targets = zip(*batch(seed), strict=True)
    targets = [np.pad(np.where(t == 255, 0, t), 1, constant_values=1) for t in targets]
    figures = measure([t.astype(np.float32) for t in targets], targets, convention=convention).compute()
    for key in CURVES:
        if convention == "exact":
            assert (figures[key] == 1).all()
        else:  # n / (n + 1) pixels
            assert (figures[key] < 1).all()
            assert (figures[key] > 0.5).all()
    if convention == "exact":
        assert figures["ap"] == 1


@quick
@given(seeds)
def test_counts_are_monotone_and_complete(seed):
    for p, t in batch(seed):
        counts = threshold_counts(p, t)
        assert (counts[1:, :2] <= counts[:-1, :2]).all()  # a higher threshold predicts no more
        assert (counts.sum(1) == int((t != 255).sum())).all()
        assert (counts >= 0).all()


@quick
@given(seeds, st.floats(0, 1))
def test_correcting_pixels_never_lowers_an_iou(seed, share):
    rng = np.random.default_rng(seed)
    for p, t in batch(seed):
        better = np.where(rng.random(p.shape) < share, (t == 1).astype(np.float32), p)
        a, b = (measure([x], [t], convention="exact").compute() for x in (p, better))
        assert all((b[key] >= a[key] - 1e-12).all() for key in CURVES)


# --- behaviour of the metric -------------------------------------------------------------------------------------


def test_inputs_may_be_a_map_a_batch_or_a_list_of_tensors_or_arrays():
    maps, targets, _ = case("random")
    p, t = np.stack(maps), np.stack(targets)
    expected = measure(maps, targets).compute()
    for q, u in [
        (p, t),
        (torch.from_numpy(p), torch.from_numpy(t).long()),
        (list(torch.from_numpy(p)), t.astype(bool)),
    ]:
        assert same(measure(q, u).compute(), expected)
    single = SegmentationMetrics()
    for q, u in zip(p, t, strict=True):
        single.update(q, u)
    assert same(single.compute(), expected)
    assert same(measure(p.astype(np.float64), t).compute(), expected)
    reversed_view, locked = p[:, :, ::-1], t[:, :, ::-1].copy()
    locked.flags.writeable = False
    assert same(measure(reversed_view, locked).compute(), expected)


def test_memory_does_not_grow_and_reset_empties():
    metrics = SegmentationMetrics(convention="exact")

    def size():
        return sum(getattr(metrics, state).nbytes for state in metrics._defaults)

    before = size()
    maps, targets, _ = case("random")
    for _ in range(3):
        metrics.update(maps, targets)
    assert size() == before
    assert int(metrics.samples) == 18
    metrics.reset()
    assert all(not getattr(metrics, state).any() for state in metrics._defaults)


def test_forward_gives_the_batch_and_keeps_the_total():
    maps, targets, _ = case("random")
    metrics = SegmentationMetrics()
    first, second = metrics(maps[:2], targets[:2]), metrics(maps[2:], targets[2:])
    assert same(first, measure(maps[:2], targets[:2]).compute())
    assert same(second, measure(maps[2:], targets[2:]).compute())
    assert same(metrics.compute(), measure(maps, targets).compute())


def test_at_and_best_read_the_curves():
    metrics = measure(*case("random")[:2])
    figures, row = metrics.compute(), metrics.at(0.3)
    assert list(row) == ["threshold", *KEYS]
    assert all(type(v) is float for v in row.values())
    assert row["threshold"] == 0.3
    assert row["iou_fg"] == float(figures["iou_fg"][14])
    for key in CURVES:
        assert metrics.best(key)[key] == float(figures[key].max())
    assert metrics.best() == metrics.best("miou")


def test_classes_by_hand():
    # Class 0: 1 of 2 object pixels found in one sample, 2 of 2 in another: 3 / 4. Class 2: 1 hit, 1 false: 1 / 2.
    # Class 1 is never seen.
    p = np.array([[[0.9, 0.1]], [[0.9, 0.9]], [[0.9, 0.9]]], np.float32)
    t = np.array([[[1, 1]], [[1, 1]], [[1, 0]]], np.uint8)
    row = measure(p, t, [0, 0, 2], 3, "exact").at(0.5)
    assert row["miou"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert row["iou_fg"] == pytest.approx(4 / 6)
    assert row["iou_bin"] == pytest.approx((4 / 6 + 0) / 2)
    row = measure(p, t, torch.tensor([0, 0, 2]), 3).at(0.5)
    assert row["miou"] == pytest.approx((3 / 5 + 1 / 3) / 2)
    assert row["iou_fg"] == pytest.approx(4 / 7)


# --- bootstrap ---------------------------------------------------------------------------------------------------


def sample_counts(name):
    maps, targets, _ = case(name)
    return torch.stack([threshold_counts(p, t) for p, t in zip(maps, targets, strict=True)])


def test_ious_of_samples_by_hand():
    half, none = np.array([[3, 2, 4, 1]]), np.array([[0, 0, 0, 10]])
    counts = np.stack([half.repeat(49, 0), none.repeat(49, 0)])
    assert ious(counts, 0.5).tolist() == [3 / 10, 0.0]  # 3 / (1 + 3 + 2 + 4)
    assert SegmentationMetrics.from_counts(counts).at(0.5)["miou"] == pytest.approx(0.15)


def test_bootstrap_equals_resampling_the_metric():
    maps, targets, _ = case("random")
    images = ["b", "a", "b", "c", "c", "d"]
    draws = np.random.default_rng(5).integers(4, size=(30, 4))  # how bootstrap(seed=5) draws among a, b, c, d
    rows = []
    for draw in draws:
        chosen = [i for image in draw for i, name in enumerate(images) if name == "abcd"[image]]
        rows.append(measure([maps[i] for i in chosen], [targets[i] for i in chosen]).at(0.3))
    intervals = bootstrap(sample_counts("random"), images, threshold=0.3, n=30, seed=5)
    for key in KEYS:
        expected = np.percentile([row[key] for row in rows], (2.5, 97.5))
        np.testing.assert_allclose(intervals[key], expected, rtol=0, atol=1e-12)


def test_bootstrap_by_hand_and_by_theory():
    counts = sample_counts("random")
    row = measure(*case("random")[:2]).at(0.5)
    for key, (low, high) in bootstrap(counts, [7] * 6, threshold=0.5, n=50).items():
        assert low == pytest.approx(row[key], abs=1e-12)
        assert high == pytest.approx(row[key], abs=1e-12)
    # Half of 400 samples have IoU 9 / 10, half 0 / 10: the mean's standard error is 0.45 / sqrt(400).
    counts = torch.zeros(400, 49, 4, dtype=torch.int64)
    counts[:200, :, 0], counts[200:, :, 2] = 9, 9
    low, high = bootstrap(counts, np.arange(400), n=2000)["miou"]
    assert low == pytest.approx(0.45 - 1.96 * 0.0225, abs=0.005)
    assert high == pytest.approx(0.45 + 1.96 * 0.0225, abs=0.005)
    wide = bootstrap(counts, np.arange(400) // 100, n=2000)["miou"]  # four images: fewer independent units
    assert wide[1] - wide[0] > 3 * (high - low)


# --- bad input ---------------------------------------------------------------------------------------------------

P, T = np.full((4, 4), 0.5, np.float32), np.zeros((4, 4), np.uint8)
BAD = {
    "channels left in": (P[None, None], T[None], None, "shape"),
    "channels in a list": ([P[None]], [T], None, "shape"),
    "empty map": (P[:0], T[:0], None, "not empty"),
    "counts differ": ([P, P], [T], None, "2 probability maps for 1 targets"),
    "logits": (P * 8, T, None, "apply a sigmoid"),
    "negative": (P - 1, T, None, "-0.5"),
    "nan": (np.where(np.eye(4), np.nan, P).astype(np.float32), T, None, "nan"),
    "integer probabilities": (T, T, None, "type"),
    "float target": (P, T.astype(np.float32), None, "type"),
    "two": (P, T + 2, None, "value 2"),
    "254": (P, T + 254, None, "value 254"),
    "beyond a byte": (P, T.astype(np.int64) + 256, None, "value 256"),
    "negative target": (P, T.astype(np.int64) - 1, None, "value -1"),
    "groups unasked": (P, T, [0], "num_groups is None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_not_counted(name):
    p, t, groups, message = BAD[name]
    metrics = measure(P, T)
    before = metrics.counts.clone()
    with pytest.raises(InputError, match=message):
        metrics.update(p, t, groups)
    if name not in ("counts differ", "groups unasked", "channels left in", "empty map", "channels in a list"):
        with pytest.raises(InputError, match=message):
            metrics.update([P, p], [T, t])  # a good map before the bad one is not counted either
    assert torch.equal(metrics.counts, before)
    assert int(metrics.samples) == 1


@pytest.mark.parametrize("groups", [[3], [-1], [0, 1], [0.5], None])
def test_bad_groups(groups):
    with pytest.raises(InputError, match=r"group|class id"):
        SegmentationMetrics(num_groups=3).update(P, T, groups)


def test_bad_settings_and_questions():
    for bad in ({"convention": "paper"}, {"num_groups": 0}):
        with pytest.raises(InputError, match=r"convention|num_groups"):
            SegmentationMetrics(**bad)
    for ask in (lambda m: m.at(0.33), lambda m: m.at(1.0), lambda m: m.at(float("nan")), lambda m: m.best("ap")):
        with pytest.raises(InputError, match="threshold"):
            ask(measure(P, T))
    with pytest.warns(UserWarning, match="compute"), pytest.raises(InputError, match="no sample"):
        SegmentationMetrics().compute()
    counts = sample_counts("random")
    for bad in (
        (counts[0], [1]),
        (counts, [1, 2]),
        (counts[:0], []),
        (counts, range(6), 0.31),
        (counts, range(6), 0.3, 0),
    ):
        with pytest.raises(InputError):
            bootstrap(*bad)
