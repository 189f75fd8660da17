"""What the playground shows, and the Python call that gives the same: without widgets."""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import ImageColor

from clipseg_repro.errors import InputError
from clipseg_repro.pictures import load_image
from clipseg_repro.plotting import PALETTE, heat, overlay
from clipseg_repro.prompts import DEFAULT_RECIPE, VisualPrompt, checked_share, interpolate
from clipseg_repro.segmenter import Segmenter
from clipseg_repro.strips import write_png

COLOURS = PALETTE[:5]  # one for each row of words
STRENGTH = 0.35  # of a tint: the picture's own colours stay visible, its outline says where the mask ends
VIEWS = ("masks", "probabilities", "label map")


def drawn_mask(shape, drawn):
    """The mask that boxes and brush strokes make, (H, W) bool for `shape` (H, W), True inside.

    drawn: dicts of "tool" ("box" or "brush"), "points" ([x, y] in pixels: of a box two opposite corners, of a brush its
    way) and, of a brush, "width" in pixels. Raises InputError for anything else."""
    mask = np.zeros(shape, np.uint8)
    for mark in drawn:
        try:
            points, tool = np.array([[round(x), round(y)] for x, y in mark["points"]], np.int32), mark["tool"]
            if tool == "box":
                cv2.rectangle(mask, points[0].tolist(), points[-1].tolist(), 1, cv2.FILLED)
            elif tool == "brush":  # the last point twice: a dot is a way, too
                cv2.polylines(mask, [np.vstack([points, points[-1:]])], False, 1, max(1, round(mark["width"])))
            else:
                raise ValueError(f"unknown tool '{tool}'")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, cv2.error) as error:
            raise InputError(f"drawn {mark!r} ({error}): give tool (box or brush), points, a brush's width") from None
    return mask > 0


@dataclass
class Playground:
    """An image, rows of words and an example that is drawn: the maps, pictures and Python call that follow from them.

    Set the fields, then ask. A field with a wrong value raises one InputError when it is used.

    segmenter: its model is used, its query image is left alone. pictures: {name: path, or what `load_image` takes}.
    source: what `load_segmenter` made the segmenter of, for `call`. image, support: names of pictures, the first if
    empty. words: a phrase for each row, at most len(COLOURS); empty ones ask nothing. background: a phrase for what is
    none of them, in the label map. drawn: what marks the example on the support picture, as for `drawn_mask`. recipe:
    of prompts.RECIPES. mix: a in [0, 1], the example's share of the first row's prompt; without words there, the
    example is the prompt. threshold: in [0, 1]. view: one of VIEWS.
    """

    segmenter: Segmenter
    pictures: dict
    source: str = "mini"
    image: str = ""
    support: str = ""
    words: list = field(default_factory=list)
    background: str = ""
    drawn: list = field(default_factory=list)
    recipe: str = DEFAULT_RECIPE
    mix: float = 0.5
    threshold: float = 0.5
    view: str = VIEWS[0]
    _made: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        self.segmenter = Segmenter(self.segmenter.model, self.segmenter.processor)
        self.image = self.image or next(iter(self.pictures), "")
        self.support = self.support or self.image

    def add(self, name, content):
        """Take an uploaded picture, a file's bytes, under its name, and make it the image. InputError if it is none."""
        name = Path(name).name or "picture"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "uploaded"
            path.write_bytes(content)
            try:
                picture = load_image(path)
            except InputError as error:
                raise InputError(str(error).replace(str(path), name)) from None
        self._made.clear()  # another picture may have had this name
        self.pictures[name] = picture
        self.image = name

    def rows(self):
        """The rows that ask something: those with words and, once an example is drawn, the first."""
        if len(self.words) > len(COLOURS):
            raise InputError(f"{len(self.words)} rows of words: the playground has {len(COLOURS)} colours, give fewer")
        return [row for row in range(len(COLOURS)) if self._words(row) or (row == 0 and self.drawn)]

    def maps(self):
        """Probability maps of the image, (K, H, W) float32 in [0, 1], one for each of `rows`."""
        if not self.rows():
            return np.zeros((0, *self.picture().shape[:2]), np.float32)

        def predict(row):  # one by one: while one row is typed in, the others stay
            self._encode()
            return self.segmenter.predict(self._prompt(row))[0]

        return np.stack([self._once(f"map {r}", self._asked(r), lambda r=r: predict(r)) for r in self.rows()])

    def labels(self):
        """The label map, (H, W) int64: 0 background, k + 1 for the k-th of `rows` (see `Segmenter.label_map`)."""
        background, threshold = self.background.strip() or None, checked_share(self.threshold, "threshold")
        if not self.rows():
            return np.zeros(self.picture().shape[:2], np.int64)

        def label():
            self._encode()
            return self.segmenter.label_map([self._prompt(row) for row in self.rows()], background, threshold)

        return self._once("labels", ([self._asked(row) for row in self.rows()], background, threshold), label)

    def found(self):
        """Of each of `rows`: (its highest probability, the share of the image above the threshold)."""
        return [(float(p.max()), float((p > self.threshold).mean())) for p in self.maps()]

    def picture(self, name=None):
        """The picture of that name (the image if None), (H, W, 3) uint8."""
        name = self.image if name is None else name
        if name not in self.pictures:
            raise InputError(f"no picture '{name}': choose one of {', '.join(map(repr, self.pictures))}")
        return self._once(f"picture {name}", None, lambda: load_image(self.pictures[name]))

    def shown(self):
        """What `view` says, (H, W, 3) uint8: masks or labels with outlines on the image, or a map for each row, framed
        in its colour."""
        image, colours = self.picture(), [COLOURS[row] for row in self.rows()]
        if self.view not in VIEWS:
            raise InputError(f"unknown view '{self.view}': choose one of {', '.join(VIEWS)}")
        if self.view == "probabilities" and colours:
            return _sheet([heat(image, p) for p in self.maps()], colours)
        if self.view == "label map":
            masks = [self.labels() == label for label in range(1, len(colours) + 1)]
        else:
            masks = self.maps() > checked_share(self.threshold, "threshold")
        for mask, colour in zip(masks, colours):
            image = overlay(image, mask, colour, strength=STRENGTH)
        return image

    def save(self, path):
        """Write what is shown as a PNG file. Raises InputError for another suffix, or where it cannot be written."""
        if Path(path).suffix.lower() != ".png":
            raise InputError(f"'{path}' is no name of a PNG picture: let it end in .png")
        try:
            write_png(Path(path), self.shown())
        except OSError as error:
            raise InputError(f"cannot write '{path}' ({error.strerror or error}): give another name") from None

    def call(self):
        """Python code that gives the same maps, masks and labels, ready to be copied."""
        rows = self.rows()
        if not rows:
            return "# type a prompt, or draw an example"
        mixed = self.drawn and self._words(0)
        names = ["VisualPrompt"] * bool(self.drawn) + ["interpolate"] * bool(mixed) + ["load_segmenter"]
        lines = [f"from clipseg_repro import {', '.join(names)}"]
        prompts = [repr(self._words(row)) for row in rows]
        if self.drawn:
            lines.append("from clipseg_repro.playground.state import drawn_mask")
            prompts[0] = f"interpolate({prompts[0]}, example, {self.mix})" if mixed else "example"
        dtype = str(self.segmenter.model.dtype).removeprefix("torch.")
        lines += ["", f"segmenter = load_segmenter({str(self.source)!r}, dtype={dtype!r})"]
        lines += [f"segmenter.set_image({self._named(self.image)})"]
        if self.drawn:
            lines += [f"mask = drawn_mask({self.picture(self.support).shape[:2]}, {self.drawn})"]
            lines += [f"example = VisualPrompt({self._named(self.support)}, mask, {self.recipe!r})"]
        lines += [f"prompts = [{', '.join(prompts)}]", "maps = segmenter.predict(prompts)  # (prompts, height, width)"]
        lines += [f"masks = maps > {self.threshold}"]
        asked = f"background={self.background.strip()!r}, " if self.background.strip() else ""
        lines += [f"labels = segmenter.label_map(prompts, {asked}threshold={self.threshold})"]
        return "\n".join(lines)

    def _named(self, name):
        """A picture in code: the path where it is known, else the name of the file that was uploaded."""
        source = self.pictures[name]
        return repr(str(source) if isinstance(source, (str, Path)) else name)

    def _words(self, row):
        return self.words[row].strip() if row < len(self.words) else ""

    def _example(self):
        """The example's condition, (P,)."""
        picture = self.picture(self.support)
        prompt = VisualPrompt(picture, drawn_mask(picture.shape[:2], self.drawn), self.recipe)
        asked = self.support, repr(self.drawn), self.recipe
        return self._once("example", asked, lambda: self.segmenter.conditions(prompt)[0])

    def _prompt(self, row):
        """What a row asks, for the segmenter."""
        words = self._words(row)
        if row or not self.drawn:
            return words
        return interpolate(words, self._example(), self.mix) if words else self._example()

    def _asked(self, row):
        """All that a row's map depends on."""
        drawn = None if row or not self.drawn else (self.support, repr(self.drawn), self.recipe, self.mix)
        return row, self.image, self._words(row), drawn

    def _encode(self):
        self._once("encoded", self.image, lambda: self.segmenter.set_image(self.picture()))

    def _once(self, what, given, make):
        """make(), or what it gave last time if that was `given` the same."""
        if what not in self._made or self._made[what][0] != given:
            self._made[what] = given, make()
        return self._made[what][1]


def _sheet(pictures, colours):
    """Pictures (H, W, 3) in rows and columns, each in a frame of its colour."""
    frame = max(2, min(pictures[0].shape[:2]) // 40)
    framed = [
        cv2.copyMakeBorder(p, *[frame] * 4, cv2.BORDER_CONSTANT, value=ImageColor.getrgb(colour))
        for p, colour in zip(pictures, colours)
    ]
    columns = math.ceil(math.sqrt(len(framed)))
    framed += [np.full_like(framed[0], 255)] * (-len(framed) % columns)
    return np.vstack([np.hstack(framed[i : i + columns]) for i in range(0, len(framed), columns)])
