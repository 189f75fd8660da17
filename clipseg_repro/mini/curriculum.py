"""What the mini world's CLIP is shown: cycles of stages, and captioned scenes made to their rules. Never a mask."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from clipseg_repro.mini.phrases import Phrase, describe, general_phrases
from clipseg_repro.mini.scenes import SceneRules, compose
from clipseg_repro.mini.vocabulary import COLOURS, load_vocabulary
from clipseg_repro.prompts import IMAGENET_MEAN, IMAGENET_STD, TRAIN_TEMPLATES


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: `images` scenes of `size` pixels; rules run linearly from `first` to `last`.

    `details` adds attributes, relations and the properties of Table 8 to the captions' names.
    """

    images: int
    size: int
    first: SceneRules
    last: SceneRules
    details: bool = True

    def rules(self, progress: float) -> SceneRules:
        def mix(a, b):
            return a + (b - a) * progress

        a, b = self.first, self.last
        return replace(
            b,
            objects=(1, round(mix(a.objects[1], b.objects[1]))),
            scale=(mix(a.scale[0], b.scale[0]), mix(a.scale[1], b.scale[1])),
            max_angle=mix(a.max_angle, b.max_angle),
        )


def scene_rules(size: int, most: int, scale: tuple[float, float], angle: float) -> SceneRules:
    """Rules of scenes that are `size` pixels on the shorter side, with at most `most` objects."""
    wide = round(size * 1.2)
    return SceneRules(
        sizes=((size, size), (size, size), (size, wide), (wide, size)), objects=(1, most), scale=scale, max_angle=angle
    )


@dataclass(frozen=True)
class Cycle:
    """One cycle of the learning rate over some stages: up in `warm_up` steps, level at `peak` (1 for the optimisers'
    own rates), and linearly to zero over the last share `decay` of the steps."""

    stages: tuple[Stage, ...]
    batch: int
    peak: float
    warm_up: int
    decay: float

    @property
    def steps(self) -> int:
        return sum(stage.images for stage in self.stages) // self.batch

    def rate(self, step: int) -> float:
        return self.peak * min((step + 1) / self.warm_up, 1.0, (self.steps - step) / (self.decay * self.steps))

    def shortened(self, budget: float) -> "Cycle":
        """The same with `budget` times the images, whole batches of every stage."""
        stages = (replace(s, images=max(1, round(s.images * budget / self.batch)) * self.batch) for s in self.stages)
        return replace(self, stages=tuple(stages))


def _gentle(images: int, rules: SceneRules) -> Cycle:
    """A cycle of crowded scenes at full size that refines what the towers know."""
    stage = Stage(images, 112, rules, scene_rules(112, 5, (0.2, 0.6), 25))
    return Cycle((stage,), batch=32, peak=0.3, warm_up=50, decay=1.0)


# Less than four hours on two cores. First from nothing to scenes, names before details: captions with details before
# the towers agree on names slow everything down. Then at full size, gently: a second start at the full rate forgets the
# first.
CYCLES = (
    Cycle(
        (
            Stage(80_000, 56, scene_rules(56, 1, (0.75, 0.97), 5), scene_rules(56, 1, (0.6, 0.97), 20), details=False),
            Stage(32_000, 56, scene_rules(56, 1, (0.6, 0.97), 20), scene_rules(56, 2, (0.45, 0.9), 25)),
            Stage(56_000, 80, scene_rules(80, 2, (0.4, 0.9), 25), scene_rules(80, 3, (0.28, 0.75), 25)),
            Stage(16_000, 112, scene_rules(112, 3, (0.22, 0.7), 25), scene_rules(112, 5, (0.2, 0.6), 25)),
        ),
        batch=64,
        peak=1.0,
        warm_up=200,
        decay=0.4,
    ),
    _gentle(76_800, scene_rules(112, 4, (0.22, 0.65), 25)),
    *2 * (_gentle(144_000, scene_rules(112, 4, (0.2, 0.6), 25)),),
)


LAST = CYCLES[-1].stages[-1]


class CaptionedScenes(Dataset):
    """Item i is (image (3, S, S) float32, objects (N, 3) int64: kind, colour, size; true phrases), given the seed."""

    def __init__(self, stages: tuple[Stage, ...], seed: int):
        self.stages, self.seed = stages, seed

    def __len__(self) -> int:
        return sum(stage.images for stage in self.stages)

    def __getitem__(self, i: int):
        rng = np.random.default_rng([self.seed, i])
        start = 0
        for stage in self.stages:
            if i < start + stage.images:
                break
            start += stage.images
        scene = compose(rng, stage.rules((i - start) / stage.images))
        image = cv2.resize(scene.image, (stage.size, stage.size), interpolation=cv2.INTER_AREA)
        phrases = [p for j in range(len(scene.objects)) for p in self._captions(rng, scene, j, stage.details)]
        templated = rng.random(len(phrases)) < (0.5 if stage.details else 0.0)
        texts = [
            TRAIN_TEMPLATES[rng.integers(len(TRAIN_TEMPLATES))].format(p.text) if t else p.text
            for p, t in zip(phrases, templated, strict=True)
        ]
        objects = [(o.kind, _code(o.colour, COLOUR_CODES), _code(o.size, SIZE_CODES)) for o in scene.objects]
        return image, np.array(objects, np.int64).reshape(-1, 3), phrases, texts

    @staticmethod
    def _captions(rng, scene, index: int, details: bool) -> list[Phrase]:
        chosen = [describe(rng, scene, index, "category")]
        if not details:
            return chosen
        if rng.random() < 0.6:
            chosen.append(describe(rng, scene, index, "attribute"))
        if rng.random() < 0.25:
            chosen.append(describe(rng, scene, index, "relation"))
        if rng.random() < 0.3:
            kind = scene.objects[index].kind
            general = [p for p in general_phrases() if kind in p.kinds]
            chosen.append(general[rng.integers(len(general))])
        return [p for p in chosen if p is not None]


COLOUR_CODES = {colour: code for code, colour in enumerate(COLOURS, start=1)}
SIZE_CODES = {"small": 1, "large": 2}


def _code(value: str | None, codes: dict[str, int]) -> int:
    return codes[value] if value else 0


def _normalised(images: list[np.ndarray]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def fresh_scenes(rules: SceneRules, size: int, scenes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised scenes (N, 3, S, S) that no stage shows, and the kind of each 8-pixel patch (N, patches).

    A patch less than 70% inside an object has kind -1.
    """
    images, labels = [], []
    for i in range(scenes):
        scene = compose(np.random.default_rng([987, i]), rules)
        images.append(cv2.resize(scene.image, (size, size), interpolation=cv2.INTER_AREA))
        grid = np.full((size // 8, size // 8), -1)
        for thing in scene.objects:
            share = cv2.resize(thing.mask.astype(np.float32), grid.shape, interpolation=cv2.INTER_AREA)
            grid[share > 0.7] = thing.kind
        labels.append(grid)
    return _normalised(images), torch.from_numpy(np.stack(labels)).flatten(1)


def collate(items: list) -> tuple[torch.Tensor, np.ndarray, np.ndarray, list[Phrase], list[int], list[str]]:
    """Images (B, 3, S, S) normalised, objects (N, 3), their images (N,), phrases (P), their images (P), texts (P)."""
    images = _normalised([item[0] for item in items])
    objects = np.concatenate([item[1] for item in items])
    owners = np.concatenate([np.full(len(item[1]), b) for b, item in enumerate(items)])
    phrases = [p for item in items for p in item[2]]
    sources = [b for b, item in enumerate(items) for _ in item[2]]
    return images, objects, owners, phrases, sources, [t for item in items for t in item[3]]


def truth(objects, owners, phrases, sources, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which phrase is true of which image: (true, unknown), both (images, P) bool.

    A relation is known for the image it was said of; elsewhere it is false without its kinds and unknown otherwise.
    """
    kinds = np.zeros((len(phrases), len(load_vocabulary())), bool)
    for row, phrase in zip(kinds, phrases):
        row[list(phrase.kinds)] = True
    colours = np.array([_code(p.colour, COLOUR_CODES) for p in phrases])
    sizes = np.array([_code(p.size, SIZE_CODES) for p in phrases])
    holds = kinds[:, objects[:, 0]].T
    holds &= (colours == 0) | (colours == objects[:, 1:2])
    holds &= (sizes == 0) | (sizes == objects[:, 2:3])
    true = np.zeros((images, len(phrases)), bool)
    np.logical_or.at(true, owners, holds)
    unknown = true & np.array([p.relation is not None for p in phrases])
    said = np.array(sources) >= 0
    own = np.array(sources)[said], np.nonzero(said)[0]
    unknown[own], true[unknown] = False, False
    true[own] = True
    return torch.from_numpy(true), torch.from_numpy(unknown)
