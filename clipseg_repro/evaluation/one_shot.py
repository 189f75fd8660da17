"""One-shot segmentation by episodes: Pascal-5i by example and by text, COCO-20i, FSS-1000 (paper, Tables 5 to 7)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from clipseg_repro.datasets.class_masks import ClassMasks
from clipseg_repro.datasets.episodes import Episode
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.by_class import ClassResult
from clipseg_repro.evaluation.metrics import SegmentationMetrics
from clipseg_repro.evaluation.per_image import measure
from clipseg_repro.prompts import DEFAULT_RECIPE, TEST_TEMPLATE, VisualPrompt


def one_shot(
    segmenter,
    data: ClassMasks,
    folds: Mapping[int, list[Episode]],
    prompts: str = "visual",
    recipe: str = DEFAULT_RECIPE,
    template: str = TEST_TEMPLATE,
    limit: int | None = None,
    keep: Path | None = None,
) -> ClassResult:
    """Every episode of some folds. `segmenter`: a Segmenter, or a function that gives the one of a fold, which has not
    seen the fold's classes. A fold without episodes is left out.

    prompts: "visual" (the supports; of several the mean condition) or "text" (the class's name in `template`). `limit`
    takes so many episodes of each fold, spread evenly; `keep`: as in `per_image.measure`.
    """
    rows, counts = [], []
    for fold, episodes in folds.items():
        if not episodes:  # too few pictures for so many supports
            continue
        chosen = segmenter(fold) if callable(segmenter) else segmenter
        if limit is not None:
            episodes = [episodes[i] for i in np.unique(np.linspace(0, len(episodes) - 1, limit).astype(int))]
        metrics = SegmentationMetrics(num_groups=len(episodes))

        def read(n, episodes=episodes):
            episode = episodes[n]
            query = data.sample(episode.query, episode.label)
            supports = [data.sample(i, episode.label) for i in episode.supports] if prompts == "visual" else []
            return query, [VisualPrompt(s.image, s.mask == 1, recipe) for s in supports], n

        def work(segmenter, query, examples, n):
            asked = examples or [template.format(query.phrase)]
            condition = segmenter.conditions(asked).mean(0, keepdim=True)
            image, (height, width) = squared(query.image), query.mask.shape
            segmenter.set_image(image)
            return [], (segmenter.predict(condition)[:, :height, :width], query.mask[None], [n])

        label = f"{data.title}, fold {fold}: {prompts}"
        settings = {"prompts": prompts, "recipe": recipe, "template": template, "episodes": [vars(e) for e in episodes]}
        measure(chosen, data, list(range(len(episodes))), read, work, label, metrics, keep, settings)
        counts.append(metrics.counts.numpy())
        rows += [{"fold": fold, "picture": data.ids[e.query], "class": data.classes[e.label]} for e in episodes]
    if not rows:
        raise InputError(f"no episode of {data.title}: use more data")
    return ClassResult(pd.DataFrame(rows), np.concatenate(counts))


def squared(image: np.ndarray) -> np.ndarray:
    """An image with black below or to the right of it, so that the model's square input keeps its aspect (PFENet's
    test_Resize)."""
    height, width = image.shape[:2]
    side = max(height, width)
    return np.pad(image, ((0, side - height), (0, side - width), (0, 0)))
