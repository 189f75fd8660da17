"""Answers to the notebooks' exercises: `check.<name>(yours)` says "Right.", or what to look at again."""

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipseg_repro.prompts import RECIPES


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
