"""Answers to the notebooks' exercises: `check.<name>(yours)` says "Right.", or what to look at again."""

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_jaccard_index,
    multiclass_jaccard_index,
)

from clipseg_repro.prompts import RECIPES
from clipseg_repro.study import tables


def answers(check: Callable) -> Callable:
    """A check whose assertions are told as hints, so that a notebook with open exercises runs through. The bare one,
    which raises, is its `__wrapped__`."""

    @wraps(check)
    def told(*yours):
        try:
            check(*yours)
        except AssertionError as hint:
            print(f"Not yet: {hint}")
        except Exception as error:  # whatever a reader's code does
            print(f"Not yet: it stops with {type(error).__name__}: {error}")
        else:
            print("Right.")

    return told


def _filled(value):
    assert value is not None and value is not ..., "fill in the cell above and run it, then this one"
    return value


@answers
def resampled_mean(yours: Callable):
    """yours(values, drawn): the mean of each of the draws, (R,), of values (N,) by indices drawn (R, N)."""
    values, drawn = np.array([1.0, 2.0, 6.0]), np.array([[0, 0, 0], [0, 1, 2], [2, 2, 1]])
    found = np.asarray(_filled(yours(values, drawn)))
    assert found.shape == (3,), f"one mean for each row of `drawn`: shape (3,), not {found.shape}"
    assert np.allclose(found, [1, 3, 14 / 3]), "take the values at the indices of a row, repeats too, and average them"


@answers
def amortised(yours: Callable):
    """yours(encoding, prompt, prompts): the cost of each of so many prompts on one image."""
    found = _filled(yours(76.0, 1.5, 1))
    assert np.isclose(found, 77.5), f"one prompt on one image costs an encoding and a prompt: 77.5, not {found:g}"
    found = yours(76.0, 1.5, 8)
    assert np.isclose(found, 11.0), f"eight prompts share one encoding of 76: 9.5 + 1.5 each, not {found:g}"


@answers
def attended(yours: Callable):
    """yours(logits, keep): the attention (..., N) of queries on N tokens that shuts out those where keep (N,) is 0."""
    keep = torch.tensor([1, 1, 0, 1, 0])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = torch.as_tensor(_filled(yours(logits.clone(), keep)))
    assert found.shape == logits.shape, f"a weight for every logit: shape {tuple(logits.shape)}"
    assert not found[:, keep == 0].any(), "tokens outside still get a weight: exp(0) is 1, only exp(-inf) is 0"
    assert torch.allclose(found.sum(-1), torch.ones(3)), "the weights of a query must add up to 1"
    assert torch.allclose(found[:, keep == 1], logits[:, keep == 1].softmax(-1)), "take the softmax of the logits kept"


@answers
def block_flops(yours: Callable):
    """yours(tokens, width, hidden): floating point operations of a transformer block's matrix products."""

    def counted(*products):
        with FlopCounterMode(display=False) as counter:
            for a, b in products:
                torch.empty(a) @ torch.empty(b)
        return counter.get_total_flops()

    for n, width, hidden in ((7, 16, 24), (485, 64, 2048)):
        parts = {
            "the four projections (query, key, value, output)": counted(*[((n, width), (width, width))] * 4),
            "the attention (queries by keys, weights by values)": counted(
                ((n, width), (width, n)), ((n, n), (n, width))
            ),
            "the MLP (up and down)": counted(((n, width), (width, hidden)), ((n, hidden), (hidden, width))),
        }
        found, right = _filled(yours(n, width, hidden)), sum(parts.values())
        assert 2 * found != right, "a multiplication and an addition are two operations: twice as many"
        for name, part in parts.items():
            assert found != right - part, f"{name} is missing"
        assert found == right, f"for {n} tokens, width {width}, hidden {hidden} PyTorch counts {right}, not {found}"


@answers
def darkened(yours: Callable):
    """yours(pixels, mask, share): (3, S, S), the background of normalised pixels kept to a share of its intensity."""
    pixels = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:7] = True
    for percent in (50, 10, 0):
        right = RECIPES[f"BG intensity {percent}%"].apply(pixels.clone(), mask)
        found = torch.as_tensor(_filled(yours(pixels.clone(), mask, percent / 100)))
        assert found.shape == right.shape, f"the picture keeps its shape {tuple(right.shape)}, not {tuple(found.shape)}"
        assert torch.allclose(found[:, mask], right[:, mask]), "the object, where the mask is true, stays as it is"
        assert torch.allclose(found, right), f"outside the mask, {percent}% of the pixels' values are left"


@answers
def drawn_phrase(yours: Callable):
    """yours(phrase, phrases, negative, rng): (the phrase to ask for, whether it is a negative)."""
    phrases, rng, n = ["cat", "dog", "red car", "tree"], np.random.default_rng(0), 4000
    _filled(yours("dog", phrases, 0.2, rng))
    assert tuple(yours("dog", phrases, 0.0, rng)) == ("dog", False), "without negatives the phrase stays, and is none"
    draws = [yours("dog", phrases, 0.2, rng) for _ in range(n)]
    assert all(bool(empty) == (phrase != "dog") for phrase, empty in draws), "a negative's phrase is another one"
    share = np.mean([bool(empty) for _, empty in draws])
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / n) ** 0.5, f"a share of 0.2 are negatives, yours: {share:.3f}"
    others = [sum(phrase == other for phrase, _ in draws) / (n * share) for other in phrases if other != "dog"]
    assert max(abs(o - 1 / 3) for o in others) < 0.08, "each of the other phrases is equally likely"


@answers
def ignorant_loss(yours: Callable):
    """yours(share): the mean binary cross entropy of saying p = share everywhere, where that share of pixels is 1."""
    for ones in (1, 5, 50):
        mask = torch.zeros(100)
        mask[:ones] = 1
        right = F.binary_cross_entropy(torch.full((100,), ones / 100), mask).item()
        found = float(_filled(yours(ones / 100)))
        assert np.isclose(found, right, atol=1e-4), f"share {ones / 100}: {found:.4f}, but PyTorch has {right:.4f}"


@answers
def two_ious(yours: Callable):
    """yours(hits, false, missed), pixels of N phrases (N,) each: their mIoU and IoU_FG, nothing added."""
    chance, size = torch.Generator().manual_seed(0), (5, 8, 8)
    maps = torch.rand(size, generator=chance) > torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).view(5, 1, 1)
    truth = torch.rand(size, generator=chance) > 0.5
    hits, false, missed = ((a & b).sum((1, 2)).numpy() for a, b in ((maps, truth), (maps, ~truth), (~maps, truth)))
    found = _filled(yours(hits, false, missed))
    assert np.size(found) == 2, "two numbers: mIoU, then IoU_FG"
    alone = np.mean([binary_jaccard_index(a, b) for a, b in zip(maps, truth)])
    pooled = float(binary_jaccard_index(maps, truth))
    assert np.isclose(found[0], alone, atol=1e-6), "mIoU: hits / (hits + false + missed) for each phrase, then the mean"
    assert np.isclose(found[1], pooled, atol=1e-6), "IoU_FG: sum each count over all phrases first, then one IoU"


@answers
def average_precision(yours: Callable):
    """yours(probability, truth), (N,) floats and (N,) bool: the exact AP of N pixels."""
    rng = np.random.default_rng(0)
    probability, truth = rng.permutation(200) / 200, rng.random(200) < 0.3
    found = _filled(yours(probability, truth))
    theirs = float(binary_average_precision(torch.from_numpy(probability), torch.from_numpy(truth).long()))
    assert not np.isclose(found, truth.mean(), atol=1e-3), "that is the share of objects; sort the pixels first"
    assert np.isclose(found, theirs, atol=1e-4), (
        "sort by probability, highest first; precision after k pixels is the share of objects among them; average it "
        "over the k at which an object's pixel is met"
    )


@answers
def named(yours: Callable):
    """yours(maps), (C, H, W) probabilities of which the first is the background's: the label of every pixel, (H, W)."""
    maps = np.array([[[0.3, 0.3, 0.05]], [[0.5, 0.95, 0.1]], [[0.7, 0.1, 0.2]]])
    given = maps.copy()
    found = np.asarray(_filled(yours(maps)))
    assert found.shape == (1, 3), f"a label for every pixel: shape {maps.shape[1:]}, not {found.shape}"
    assert np.array_equal(maps, given), "leave the maps that you are given as they are: work on a copy"
    assert not np.array_equal(found, maps.argmax(0)), "the background counts three times"
    assert np.array_equal(found, [[0, 1, 2]]), "the place of the highest value along the first axis"


@answers
def class_ious(yours: Callable):
    """yours(guess, truth, classes), two (H, W) label maps, 255 void in the truth: the IoU of each class, (classes,)."""
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, (20, 20)), rng.integers(0, 4, (20, 20))
    guess[:10] = truth[:10]
    truth[:, :3] = 255
    found = np.asarray(_filled(yours(guess.copy(), truth.copy(), 4)), float)
    assert found.shape == (4,), f"one IoU for each class: shape (4,), not {found.shape}"
    with_void = [((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum() for c in range(4)]
    assert not np.allclose(found, with_void), "where the truth is 255 no pixel counts, in the guess either"
    theirs = multiclass_jaccard_index(*map(torch.from_numpy, (guess, truth)), 4, average=None, ignore_index=255)
    assert np.allclose(found, theirs, atol=1e-6), "of class c: pixels that are c in both, over those in either"


@answers
def fold_miou(yours: Callable):
    """yours(hits, false, missed, classes), (N,) each, of N episodes: the mIoU of their fold, nothing added."""
    hits, false, missed = np.array([[8, 0, 5, 1], [2, 10, 0, 0], [0, 0, 5, 1]])
    found = _filled(yours(hits, false, missed, np.array([3, 3, 4, 7])))
    assert not np.isclose(found, (0.8 + 0 + 0.5 + 0.5) / 4), "a class counts once, whatever its number of episodes"
    assert not np.isclose(found, 14 / 32), "first sums within each class, then an IoU for each, then their mean"
    assert np.isclose(found, (0.4 + 0.5 + 0.5) / 3), "sum hits, false and missed over the episodes of a class"


@answers
def episode(yours: Callable):
    """yours(query, shown, held_out, rng): (class, support) of an episode; shown: every picture's classes (sets)."""
    shown = [{1, 2, 9}, {1}, {2, 9}, {2, 3}, {9}, {1, 2}]
    drawn = [_filled(yours(0, shown, [1, 2, 3], np.random.default_rng(seed))) for seed in range(200)]
    assert all(np.size(pair) == 2 for pair in drawn), "two things: the class, then the support picture"
    assert all(label in shown[0] for label, _ in drawn), "the class must be in the query"
    assert all(label in (1, 2, 3) for label, _ in drawn), "the class must be one of the fold's"
    assert all(support != 0 for _, support in drawn), "the query is no example of itself"
    assert all(label in shown[support] for label, support in drawn), "the support must show the class"
    again = yours(0, shown, [1, 2, 3], np.random.default_rng(7))
    assert tuple(again) == tuple(drawn[7]), "draw with `rng`, and nothing else, so that a seed repeats the episode"
    assert {tuple(map(int, pair)) for pair in drawn} == {(1, 1), (1, 5), (2, 2), (2, 3), (2, 5)}, (
        "every class of the fold in the query, and every picture that shows it, must have a chance"
    )


@answers
def property_mask(yours: Callable):
    """yours(masks, names): where one of the named things is, (H, W) bool; masks: {name: (H, W) bool}, one at least."""
    masks = {"horse": np.array([[True, False, False]]), "sofa": np.array([[False, True, False]])}
    found = np.asarray(_filled(yours(masks, ("horse", "pony", "motorcycle"))))
    assert found.shape == (1, 3) and found.dtype == bool, "a bool mask as large as those you are given"
    assert not found[0, 1], "nobody rides a sofa: take the named things only, and pass over names that are not there"
    assert np.array_equal(found, masks["horse"]), "a pixel belongs to it if it belongs to one of the named things"
    assert not np.asarray(yours(masks, ("boat",))).any(), "where none of the names is, the mask is empty, not missing"


@answers
def best_threshold(yours: Callable):
    """yours(counts, classes, thresholds), (N, T, 4) counts, (N,) and (T,): the best mIoU's threshold."""
    hits, false = np.array([[5, 3, 3], [26, 11, 6], [8, 6, 0]]), np.array([[15, 11, 8], [15, 6, 4], [17, 1, 1]])
    counts = np.stack([hits, false, np.array([[10], [30], [10]]) - hits, 90 - false], 2)
    thresholds = np.array([0.2, 0.5, 0.8])
    found = _filled(yours(counts, np.array([0, 0, 1]), thresholds))
    assert np.isscalar(found) or np.ndim(found) == 0, "one number, of those in `thresholds`"
    assert float(found) in thresholds, "the threshold itself, not its place or its mIoU"
    assert float(found) == 0.5, "sum counts within each class, then an IoU each, their mean; the highest wins"


@answers
def label_map(yours: Callable):
    """yours(maps, threshold): labels (H, W) of probabilities (K, H, W), i + 1 where map i is the highest and above the
    threshold, else 0."""
    maps = np.array([[[0.9, 0.2, 0.3]], [[0.6, 0.7, 0.1]], [[0.1, 0.1, 0.35]]])  # (3, 1, 3)
    found = np.asarray(_filled(yours(maps, 0.4)))
    assert found.shape == (1, 3), f"one label for each pixel: shape (1, 3), not {found.shape}"
    assert found[0, 2] == 0, "where no class exceeds the threshold, the label is 0"
    assert (found > 0)[0, :2].all(), "labels of classes start at 1: 0 is the background"
    assert found.tolist() == [[1, 2, 0]], "take the class of the highest probability at each pixel"


@answers
def film(yours: Callable):
    """yours(tokens, condition, multiply, add): FiLM of tokens (K, N, D) by conditions (K, P); the other two are linear
    layers, P to D."""
    torch.manual_seed(0)
    tokens, condition, layers = torch.randn(3, 3, 2), torch.randn(3, 4), [nn.Linear(4, 2) for _ in range(2)]
    with torch.no_grad():
        found = _filled(yours(tokens, condition, *layers))
        assert found.shape == tokens.shape, f"tokens keep their shape, (3, 3, 2), not {tuple(found.shape)}"
        factors, summands = (layer(condition) for layer in layers)
        crossed = factors * tokens + summands  # runs, as there are as many tokens as pictures
        assert not torch.allclose(found, crossed), (
            "row k of the condition belongs to picture k: give factors and summands an axis for the tokens, [:, None]"
        )
        rows = [factors[k] * token + summands[k] for k in range(3) for token in tokens[k]]
        assert torch.allclose(found.flatten(0, 1), torch.stack(rows), atol=1e-6), "multiply, then add: γ · token + β"


@answers
def painted_by(yours: Callable):
    """yours(y, x, patch): (row, column, i, j), the token that paints pixel (y, x) and the place in its stamp."""
    patch, rows, columns = 3, 2, 4
    for y, x in ((0, 0), (2, 5), (3, 2), (5, 11)):
        row, column, i, j = map(int, _filled(yours(y, x, patch)))
        told = f"of pixel ({y}, {x}) with stamps of {patch} x {patch}"
        assert 0 <= row < rows and 0 <= column < columns, f"{told}, the token would be ({row}, {column}): none is there"
        assert 0 <= i < patch and 0 <= j < patch, f"{told}, the place ({i}, {j}) is outside of the stamp"
        tokens, stamp = torch.zeros(1, 1, rows, columns), torch.zeros(1, 1, patch, patch)
        tokens[0, 0, row, column], stamp[0, 0, i, j] = 1, 1
        picture = nn.functional.conv_transpose2d(tokens, stamp, stride=patch)[0, 0]
        painted = tuple(picture.nonzero()[0].tolist())
        assert painted == (y, x), f"{told}, torch paints {painted}: which multiple of the patch, and what is left over?"


@answers
def ious(yours: Callable):
    """yours(probability, mask): the IoU at the 49 thresholds 0.02 to 0.98, (49,), of maps (H, W)."""
    rng = np.random.default_rng(0)
    mask = rng.random((8, 9)) < 0.4
    probability = np.clip(0.5 * mask + 0.5 * rng.random(mask.shape), 0, 1)
    probability[0, :3] = 0.5  # on a threshold, and not above it
    found = np.asarray(_filled(yours(probability, mask)))
    assert found.shape == (49,), f"one IoU for each threshold: shape (49,), not {found.shape}"
    known = [float(binary_jaccard_index(*map(torch.from_numpy, (probability, mask)), t / 50)) for t in range(1, 50)]
    assert np.allclose(np.delete(found, 24), np.delete(known, 24), atol=1e-6), (
        "of the pixels p > t and those of the mask: how many are in both, over how many in either?"
    )
    assert np.isclose(found[24], known[24], atol=1e-6), "a pixel counts where p > t: at p = t it does not"


@answers
def best_of(yours: Callable):
    """yours(larger, smaller): points that a number is ahead of the best of several."""
    found = _filled(yours(30.0, [12.5, 27.0, 3.0]))
    assert np.isclose(found, 3.0), f"ahead of the best of the others, 27: by 3, not {found:g}"
    assert np.isclose(yours(5.0, [6.0]), -1.0), "behind, the gap is negative: the claim is wrong"


@answers
def verdict(yours: Callable):
    """yours(low, high): what the rule says of a claim whose difference has that 95% interval."""
    for interval in ((0.2, 2.3), (-4.0, -0.1), (-0.4, 1.7), (0.0, 1.0), (np.nan, np.nan)):
        theirs = tables.verdict(*interval)
        assert _filled(yours(*interval)) == theirs, f"an interval from {interval[0]} to {interval[1]}: '{theirs}'"


@answers
def mean_prompt(yours: Callable):
    """yours(conditions): the one condition (P,) that asks for what all of several (K, P) have in common."""
    conditions = torch.tensor([[3.0, 4.0, 0.0], [0.0, 4.0, 3.0]])
    found = torch.as_tensor(_filled(yours(conditions.clone())))
    assert found.shape == (3,), f"one vector: shape (3,), not {tuple(found.shape)}"
    assert torch.allclose(found, torch.tensor([1.5, 4.0, 1.5])), (
        "the mean of the vectors, as they are: CLIPSeg normalises none"
    )
