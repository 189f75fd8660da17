"""Answers to the notebooks' exercises: `check.<name>(yours)` says "Right.", or what to look at again."""

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
from torch import nn
from torchmetrics.functional.classification import binary_jaccard_index


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
