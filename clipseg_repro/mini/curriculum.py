"""What the mini world's CLIP is shown: cycles of stages, and captioned scenes made to their rules. Never a mask."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from clipseg_repro.mini.phrases import Phrase, contrary, describe, general_phrases
from clipseg_repro.mini.scenes import SceneRules, compose
from clipseg_repro.mini.vocabulary import COLOURS, load_vocabulary
from clipseg_repro.prompts import IMAGENET_MEAN, IMAGENET_STD, RELEASED_SIZE, TRAIN_TEMPLATES


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: `images` scenes of `size` pixels; rules run linearly from `first` to `last`.

    `details`: how often a caption names an object's attributes, its relation to another and a property of Table 8, in
    addition to its name.
    """

    images: int
    size: int
    first: SceneRules
    last: SceneRules
    details: tuple[float, float, float] = (0.6, 0.25, 0.3)

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


NAMES = (0.0, 0.0, 0.0)  # no details

# First from nothing to scenes, names before details: captions with details before the towers agree on names slow
# everything down. Then at full size, gently: a second start at the full rate forgets the first.
CYCLES = (
    Cycle(
        (
            Stage(80_000, 56, scene_rules(56, 1, (0.75, 0.97), 5), scene_rules(56, 1, (0.6, 0.97), 20), details=NAMES),
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


def _fine(images: int, scale: tuple[float, float]) -> Cycle:
    """A gentle cycle at the paper's geometry, where small things are more than a patch, with what is hardest."""
    rules = SceneRules(scale=scale)
    stage = Stage(images, RELEASED_SIZE, rules, rules, details=(0.8, 0.8, 0.2))
    return Cycle((stage,), batch=32, peak=0.3, warm_up=50, decay=1.0)


# An hour or so each, the second with smaller things.
FINE = (_fine(19_200, (0.16, 0.6)), _fine(19_200, (0.13, 0.5)))


class CaptionedScenes(Dataset):
    """Item i, given the seed: an image (S, S, 3) uint8, its objects (N, 3) int64: kind, colour, size; phrases, whether
    each is true of it, and the captions that say them."""

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
        # Each with a near miss, where there is one: only these tell left from right and red from blue.
        misses = [miss for p in phrases if (miss := contrary(rng, p)) and not miss.find(scene)]
        said = [True] * len(phrases) + [False] * len(misses)
        phrases += misses
        templated = rng.random(len(phrases)) < (0.0 if stage.details == NAMES else 0.5)
        texts = [
            TRAIN_TEMPLATES[rng.integers(len(TRAIN_TEMPLATES))].format(p.text) if t else p.text
            for p, t in zip(phrases, templated, strict=True)
        ]
        objects = [(o.kind, _code(o.colour, COLOUR_CODES), _code(o.size, SIZE_CODES)) for o in scene.objects]
        return image, np.array(objects, np.int64).reshape(-1, 3), phrases, said, texts

    @staticmethod
    def _captions(rng, scene, index: int, details: tuple[float, float, float]) -> list[Phrase]:
        attribute, relation, general = rng.random(3) < details
        chosen = [describe(rng, scene, index, "category")]
        chosen += [describe(rng, scene, index, c) for c, on in (("attribute", attribute), ("relation", relation)) if on]
        if general:
            kind = scene.objects[index].kind
            true = [p for p in general_phrases() if kind in p.kinds]
            chosen.append(true[rng.integers(len(true))])
        return [p for p in chosen if p is not None]


COLOUR_CODES = {colour: code for code, colour in enumerate(COLOURS, start=1)}
SIZE_CODES = {"small": 1, "large": 2}


def _code(value: str | None, codes: dict[str, int]) -> int:
    return codes[value] if value else 0


def _normalised(images: list[np.ndarray]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def fresh_scenes(rules: SceneRules, size: int, patch: int, scenes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised scenes (N, 3, S, S) that no stage shows, and the kind of each patch (N, patches).

    A patch less than 70% inside an object has kind -1.
    """
    images, labels = [], []
    for i in range(scenes):
        scene = compose(np.random.default_rng([987, i]), rules)
        images.append(cv2.resize(scene.image, (size, size), interpolation=cv2.INTER_AREA))
        grid = np.full((size // patch, size // patch), -1)
        for thing in scene.objects:
            share = cv2.resize(thing.mask.astype(np.float32), grid.shape, interpolation=cv2.INTER_AREA)
            grid[share > 0.7] = thing.kind
        labels.append(grid)
    return _normalised(images), torch.from_numpy(np.stack(labels)).flatten(1)


def collate(items: list) -> tuple[torch.Tensor, np.ndarray, np.ndarray, list[Phrase], list[int], list[bool], list[str]]:
    """Images (B, 3, S, S) normalised, objects (N, 3), their images (N,), phrases (P), their images (P), whether they
    are true of those (P), texts (P)."""
    images = _normalised([item[0] for item in items])
    objects = np.concatenate([item[1] for item in items])
    owners = np.concatenate([np.full(len(item[1]), b) for b, item in enumerate(items)])
    sources = [b for b, item in enumerate(items) for _ in item[2]]
    phrases, said, texts = ([x for item in items for x in item[part]] for part in (2, 3, 4))
    return images, objects, owners, phrases, sources, said, texts


def truth(objects, owners, phrases, sources, said, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which phrase is true of which image: (true, unknown), both (images, P) bool.

    sources, said: the image that a phrase is about (-1 for none), and whether it is true of it. A relation is known
    for that image only; elsewhere it is false without its kinds and unknown otherwise.
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
    sources = np.array(sources)
    own = sources[sources >= 0], np.nonzero(sources >= 0)[0]
    unknown[own], true[unknown] = False, False
    true[own] = np.array(said)[own[1]]
    return torch.from_numpy(true), torch.from_numpy(unknown)
