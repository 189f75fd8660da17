"""Answers to the notebooks' exercises: `check.<name>(yours)` says "Right.", or what to look at again."""

from collections.abc import Callable
from functools import wraps

import numpy as np


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
