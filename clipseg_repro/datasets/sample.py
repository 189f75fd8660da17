"""What every reader gives: the `Sample`."""

from dataclasses import dataclass, field

import numpy as np

from clipseg_repro.prompts import VisualPrompt


@dataclass(frozen=True, eq=False)
class Sample:
    """A query image, what is asked for, and the truth.

    image: (H, W, 3) uint8 RGB. mask: (H, W) uint8, 1 object, 0 background, 255 left out of every metric. phrase: the
    words, without template. support: an image prompt for the same thing, where the benchmark has one. info: the
    benchmark's own fields (PhraseCut: `task_id`, `ann_ids`, `phrase_structure`).
    """

    image: np.ndarray
    mask: np.ndarray
    phrase: str
    image_id: int
    support: VisualPrompt | None = None
    info: dict = field(default_factory=dict)
