"""Scenes of the mini world: pictograms on photographs or synthetic backgrounds, with masks and true phrases.

A scene is a pure function of its seed, so any scene can be made again alone, in any order, in any process.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import cv2
import numpy as np
import skimage.data
from PIL import Image

from clipseg_repro.mini.vocabulary import COLOURS, SPRITE_SIZE, load_vocabulary, recolour, sprite

SMALL, LARGE = 0.28, 0.46  # "small" and "large": longer side of the object over the shorter side of the image
MIN_VISIBLE = 0.75  # every object keeps at least this share of its area in view
DARKEST = 110  # of a background: pictograms have black outlines
GROUNDS = ("grass", "gravel", "brick")  # photographs that benchmarks of stuff have a name for


@dataclass(frozen=True)
class SceneRules:
    """What scenes of one split or training stage look like. Lengths: pixels, or shares of the image's shorter side."""

    sizes: tuple[tuple[int, int], ...] = ((320, 320), (320, 360), (360, 320), (320, 400), (400, 320))  # height, width
    objects: tuple[int, int] = (1, 5)
    scale: tuple[float, float] = (0.2, 0.6)
    max_angle: float = 25.0
    repeat: float = 0.25  # probability that an object is of a kind already in the scene
    recolour: float = 0.6  # probability that the colourable kinds of a scene are recoloured
    plain: float = 0.1  # probability of a uniform background


@dataclass(frozen=True)
class SceneObject:
    """One instance. `mask` is what of it can be seen, (H, W) bool; `box` is (x, y, width, height) of that."""

    kind: int
    colour: str | None
    size: str | None
    mask: np.ndarray
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return x + w / 2, y + h / 2


@dataclass(frozen=True)
class Scene:
    """`image` (H, W, 3) uint8 RGB, the objects, back to front, and the background: one of GROUNDS, or ""."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    ground: str = ""


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    """Photographs that scikit-image bundles, cut where they show none of the vocabulary's kinds."""
    data = skimage.data
    crops = [
        *(getattr(data, name)() for name in GROUNDS),
        data.moon(),
        data.immunohistochemistry(),
        data.coffee()[280:, 300:],
        data.coffee()[:110, :],
        data.rocket()[:200, :250],
        data.hubble_deep_field(),
        data.retina()[450:950, 450:950],
    ]
    crops = [np.dstack([c] * 3) if c.ndim == 2 else c[..., :3] for c in crops]
    return tuple(
        cv2.resize(c, None, fx=s, fy=s, interpolation=cv2.INTER_AREA)
        for c in crops
        for s in [max(400 / min(c.shape[:2]), 0.8)]
    )


def _background(rng: np.random.Generator, height: int, width: int, plain: float) -> tuple[np.ndarray, str]:
    """A photograph, smooth noise or stripes between two colours, or one colour: float32, at least DARKEST; and of a
    photograph its name in GROUNDS."""
    ground = ""
    if rng.random() < plain:
        picture = np.full((height, width, 3), rng.integers(0, 256, 3), np.float32)
    elif rng.random() < 0.6:
        chosen = rng.integers(len(_photographs()))
        photo, ground = _photographs()[chosen], dict(enumerate(GROUNDS)).get(int(chosen), "")
        side = int(rng.uniform(0.4, 1.0) * min(photo.shape[:2]))
        y, x = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
        picture = cv2.resize(photo[y : y + side, x : x + side], (width, height), interpolation=cv2.INTER_LINEAR)
        # A lens focused on the objects: the coarse is left, which no outline of a pictogram looks like.
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.004, 0.02) * min(height, width))
        picture = picture[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])].astype(np.float32)
        picture *= rng.uniform(0.7, 1.2, 3) if rng.random() < 0.6 else rng.uniform(0.7, 1.2)
    else:
        low, high = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        if rng.random() < 0.3:
            angle, period = rng.uniform(0, np.pi), rng.uniform(0.05, 0.4) * min(height, width)
            yy, xx = np.mgrid[:height, :width].astype(np.float32)
            wave = 0.5 + 0.5 * np.sin((np.cos(angle) * xx + np.sin(angle) * yy) * (2 * np.pi / period))
        else:
            cells = int(rng.integers(2, 9))
            wave = cv2.resize(rng.random((cells, cells), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        picture = low + (high - low) * wave[..., None].astype(np.float32)
    darkest = rng.uniform(DARKEST, DARKEST + 40)
    return darkest + np.clip(picture, 0, 255) * ((255 - darkest) / 255), ground


@lru_cache(maxsize=1024)
def _source(hexcode: str, colour: str | None, level: int) -> tuple[np.ndarray, np.ndarray]:
    """A pictogram at `level` pixels, uint8 with premultiplied alpha, and the (x, y) of its convex outline, (2, N)."""
    rgba = Image.fromarray(sprite(hexcode)).resize((level, level), Image.Resampling.BOX)
    rgba = np.array(rgba) if colour is None else recolour(np.asarray(rgba), colour)
    rgba[..., :3] = np.rint(rgba[..., :3] * (rgba[..., 3:] / np.float32(255)))
    ys, xs = np.nonzero(rgba[..., 3] > 127)
    outline = cv2.convexHull(np.stack([xs, ys], 1).astype(np.float32))[:, 0].T
    return rgba, outline


def _draw(rng, hexcode, colour, height, width, scale, max_angle):
    """Warp a pictogram to a random place. Returns float32 premultiplied RGB (h, w, 3), alpha (h, w) and the window."""
    side = scale * min(height, width)
    level = max(32, min(SPRITE_SIZE, 1 << int(np.ceil(np.log2(side)))))
    source, outline = _source(hexcode, colour, level)
    angle = np.deg2rad(rng.uniform(-max_angle, max_angle))
    zoom, flip = side / level, rng.choice([-1, 1])
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    matrix = np.array([[c * flip, -s], [s * flip, c]])
    corners = matrix @ outline
    low, high = corners.min(1), corners.max(1)
    w, h = np.ceil(high - low + 2).astype(int)
    if h >= height or w >= width:
        return None
    x = int(rng.integers(0, width - w + 1))
    y = int(rng.integers(0, height - h + 1))
    full = np.hstack([matrix, (1 - low)[:, None]]).astype(np.float32)
    warped = cv2.warpAffine(source, full, (int(w), int(h)), flags=cv2.INTER_LINEAR).astype(np.float32)
    return warped[..., :3], warped[..., 3] / 255, (slice(y, y + h), slice(x, x + w))


def compose(rng: np.random.Generator, rules: SceneRules = SceneRules(), kinds: tuple[int, ...] | None = None) -> Scene:
    """One random scene of some `kinds`, or of all. It has at most the drawn number of objects: those that find no free
    place are left out."""
    vocabulary = load_vocabulary()
    kinds = range(len(vocabulary)) if kinds is None else kinds
    height, width = rules.sizes[rng.integers(len(rules.sizes))]
    canvas, ground = _background(rng, height, width, rules.plain)
    wanted = int(rng.integers(rules.objects[0], rules.objects[1] + 1))
    placed: list[dict] = []
    recolours: dict[int, bool] = {}
    for _ in range(wanted):
        if placed and rng.random() < rules.repeat:
            kind = vocabulary[placed[rng.integers(len(placed))]["kind"]]
        else:
            kind = vocabulary[kinds[rng.integers(len(kinds))]]
        # A kind is recoloured in the whole scene or not at all, so that "red car" is never ambiguous.
        recoloured = recolours.setdefault(kind.index, kind.colourable and rng.random() < rules.recolour)
        colour = list(COLOURS)[rng.integers(len(COLOURS))] if recoloured else None
        hexcode = kind.pictograms[rng.integers(len(kind.pictograms))]
        for attempt in range(12):
            scale = rng.uniform(*rules.scale) * 0.95**attempt
            drawn = _draw(rng, hexcode, colour, height, width, scale, rules.max_angle)
            if drawn is None:
                continue
            rgb, alpha, window = drawn
            shape = alpha > 0.5
            hidden = [np.count_nonzero(p["mask"][window] & shape) for p in placed]
            if all(np.count_nonzero(p["mask"]) - h >= MIN_VISIBLE * p["area"] for p, h in zip(placed, hidden)):
                break
        else:
            continue
        for p in placed:
            p["mask"][window] &= ~shape
        mask = np.zeros((height, width), bool)
        mask[window] = shape
        longer = max(window[0].stop - window[0].start, window[1].stop - window[1].start) / min(height, width)
        size = "small" if longer < SMALL else "large" if longer > LARGE else None
        placed.append({"kind": kind.index, "colour": colour, "size": size, "mask": mask, "area": int(shape.sum())})
        light = rng.uniform(0.8, 1.1)
        canvas[window] = canvas[window] * (1 - alpha[..., None]) + np.minimum(rgb * light, 255)
    grain = rng.uniform(0, 3) * rng.standard_normal((height, width, 1), np.float32)
    canvas = canvas * np.float32(rng.uniform(0.9, 1.1)) + grain
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(_finish(p) for p in placed), ground)


def _finish(p: dict) -> SceneObject:
    x, y, w, h = cv2.boundingRect(p["mask"].astype(np.uint8))
    return SceneObject(p["kind"], p["colour"], p["size"], p["mask"], (x, y, w, h))
