"""Write results/demo.mp4, its captions demo.vtt and its poster demo.png: `make video`.

Whatever a frame shows is computed by the mini model while the frame is made; what is timed is timed then.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from time import perf_counter

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from clipseg_repro import VisualPrompt, interpolate, load_segmenter
from clipseg_repro.devices import device_name
from clipseg_repro.errors import InputError
from clipseg_repro.files import written_whole
from clipseg_repro.mini.scenes import Scene, SceneRules, compose
from clipseg_repro.mini.vocabulary import load_vocabulary
from clipseg_repro.plotting import HEAT, OKABE_ITO, contour, heat, overlay
from clipseg_repro.prompts import as_seen
from clipseg_repro.study.results import record
from clipseg_repro.study.scales import get_scale
from clipseg_repro.video import writing

WIDTH, HEIGHT, FPS = 1280, 720, 10  # nothing moves, pictures change
LEFT, RIGHT, TOP = 56, WIDTH - 56, 168  # margins, and where pictures begin
PANEL, SECOND = 532, 628  # width of one of two pictures side by side, and where the second begins
BAND = 608  # below it the caption
CAPTION_LETTERS = 76  # in a line of which there are two
INK, GREY, PALE, PAPER = "#202020", "#5F5F5F", "#F0F0EC", "#FFFFFF"
BLUE, ORANGE, GREEN, VERMILLION = (OKABE_ITO[name] for name in ("blue", "orange", "green", "vermillion"))
ROUNDS = 20  # of what is timed; the fastest is shown: other programs can only slow a call down

# What is said in each scene, in order, under the name of its function: the captions of the film.
CAPTIONS = {
    "words": (
        "A prompt is typed. After each letter the model says how probable it is, pixel by pixel.",
        "Yellow is probable; the white line is the truth. There is no list of classes …",
        "… so that a use can be asked for, too, not just a name.",
    ),
    "many": (
        "The picture is encoded once: here {encode:.0f} ms. After that a prompt costs {prompt:.0f} ms.",
        "All six: {together:.0f} ms. Each with an encoding of its own: 6 × {alone:.0f} ms. "
        "The best of {rounds} rounds, measured while this film was made ({machine}, {threads} threads).",
    ),
    "example": (
        "In place of words: a picture, and the mask of one thing in it.",
        "CLIP is shown the thing close up, what surrounds it dark and blurred. What it makes of that is the prompt …",
        "… that finds such a thing in another picture: IoU {iou:.2f} with the truth.",
    ),
    "mix": (
        "Words t and example s become vectors of one space; a slides from the one to the other: x = a s + (1 - a) t.",
    ),
    "threshold": (
        "A mask is where the probability exceeds a threshold: blue. The white line is the truth.",
        "Too low, and it marks too much; too high, and too little. Here t = {best:.2f} is best, with IoU {iou:.2f}.",
    ),
    "labels": (
        "Each pixel takes the prompt that is most probable there, or none if none exceeds 0.5.",
        "{right:.0%} of the things' pixels have the right name.",
    ),
    "limits": (
        "“no dog” marks the dog, too: its mask and that of “a dog” agree, IoU {agreed:.2f}.",
        "And there is no cat. Asked for one, the model marks the dog: probability {highest:.2f}.",
        "Pictures for a film are chosen. How often the model is right is in results/tables.",
    ),
    "closing": ("All that you saw was computed while this film was made. To make it again: make video",),
}


class World:
    """The model, what of it was timed (milliseconds), and the pictures of the film: scenes of the mini world that are
    easy to see, chosen by their seed."""

    def __init__(self):
        self.segmenter, self.measured = load_segmenter(dtype="float32"), {}
        self.names = [kind.name for kind in load_vocabulary()]
        pets, things = ("cat", "dog", "apple", "car", "chair"), ("banana", "sofa", "guitar", "bicycle", "cup")
        self.meadow, self.room, self.wall = self.scene(73, pets), self.scene(28, things), self.scene(63, things)

    def scene(self, seed: int, kinds: tuple[str, ...]) -> Scene:
        rules = SceneRules(sizes=((448, 560),), objects=(4, 4), scale=(0.28, 0.5), repeat=0.0, plain=0.0)
        return compose(np.random.default_rng(seed), rules, tuple(map(self.names.index, kinds)))

    def mask(self, scene: Scene, name: str) -> np.ndarray:
        """What can be seen of things of that name, (H, W) bool."""
        return np.any([each.mask for each in scene.objects if self.names[each.kind] == name], axis=0)


class Card:
    """A frame that is drawn: white, with a heading. Raises InputError for text that does not fit."""

    def __init__(self, heading: str = ""):
        self.image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        if heading:
            self.text((LEFT, 36), heading, 40, bold=True)
            self.text((RIGHT, 50), "CLIPSeg, mini model", 24, GREY, anchor="ra")

    def text(self, at, text, size, colour=INK, bold=False, mono=False, anchor="la"):
        letters = font(size, bold, mono)
        left, top, right, bottom = self.draw.textbbox(at, text, letters, anchor)
        if left < 0 or top < 0 or right > WIDTH or bottom > HEIGHT:
            raise InputError(f"'{text}' does not fit on the frame at {at}: make it shorter or smaller")
        self.draw.text(at, text, colour, letters, anchor)
        return right

    def picture(self, array, x, y, width):
        height = round(width * len(array) / len(array[0]))
        shrinks = width < len(array[0])
        scaled = cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        self.image.paste(Image.fromarray(scaled), (x, y))
        return y + height

    def prompt(self, x, text):
        """The box that a prompt is typed in, with its cursor."""
        self.draw.rounded_rectangle((x, 100, x + PANEL, 152), 10, PAPER, BLUE, 3)
        end = self.text((x + 18, 110), text, 28)
        self.draw.line((end + 4, 110, end + 4, 142), BLUE, 3)

    def captioned(self, caption: str) -> np.ndarray:
        """The frame as (H, W, 3) uint8, with the caption in its band, in one line or two of about the same length."""
        lines = textwrap.wrap(caption, CAPTION_LETTERS)
        if len(lines) > 2:
            raise InputError(f"caption '{caption}' has more than two lines: make it shorter")
        if len(lines) == 2:
            width = next(w for w in range(len(caption) // 2, 99) if len(textwrap.wrap(caption, w)) == 2)
            lines = textwrap.wrap(caption, width)
        self.draw.rectangle((0, BAND, WIDTH, HEIGHT), PALE)
        for n, line in enumerate(lines):
            y = (BAND + HEIGHT) / 2 + 40 * (n - (len(lines) - 1) / 2)
            self.text((WIDTH / 2, y), line, 28, anchor="mm")
        return np.asarray(self.image)


@cache
def font(size, bold=False, mono=False):
    name = f"DejaVuSans{'Mono' * mono}{'-Bold' * bold}.ttf"  # which matplotlib brings
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def scale_of_probability(card: Card):
    """The colours of `heat`, beside the second of two pictures."""
    height = round(0.8 * PANEL)
    colours = plt.get_cmap(HEAT)(np.linspace(1, 0, height))[:, None, :3]
    card.picture(np.round(255 * colours).astype(np.uint8).repeat(18, 1), SECOND + PANEL + 14, TOP, 18)
    card.text((SECOND + PANEL + 40, TOP), "1", 24, GREY)
    card.text((SECOND + PANEL + 40, TOP + height), "0", 24, GREY, anchor="ld")


def words(world: World) -> Iterator[tuple[Card, float, str]]:
    first, then, last = CAPTIONS["words"]
    image = world.meadow.image
    world.segmenter.set_image(image)
    for text, thing, wait, pace, (during, after) in (
        ("an apple", "apple", 2.0, 0.3, (first, then)),
        ("something to sit on", "chair", 0.6, 0.2, (last, last)),
    ):
        for prompt in (text[:n] for n in range(len(text) + 1)):
            card = Card("Say what you look for")
            card.picture(image, LEFT, TOP, PANEL)
            card.prompt(LEFT, prompt)
            if prompt:
                (probability,) = world.segmenter.predict(prompt)
                truth = world.mask(world.meadow, thing) if prompt == text else None
                card.picture(heat(image, probability, outline=truth), SECOND, TOP, PANEL)
                scale_of_probability(card)
            if prompt != text:
                yield card, pace if prompt else wait, during
        yield card, 4.0, after


def many(world: World) -> Iterator[tuple[Card, float, str]]:
    prompts = ["a guitar", "a bicycle", "a cup", "a sofa", "to sit on", "to ride on"]
    encode, predict, image = world.segmenter.set_image, world.segmenter.predict, world.room.image
    encode(image)
    maps = predict(prompts)  # embeds the words; they are kept
    calls = {prompt: lambda prompt=prompt: predict(prompt) for prompt in prompts}
    calls |= {"encode": lambda: encode(image), "together": lambda: (encode(image), predict(prompts))}
    calls["alone"] = lambda: (encode(image), predict(prompts[0]))
    times = world.measured = fastest(calls)
    times["prompt"], apart = sum(times[prompt] for prompt in prompts) / len(prompts), len(prompts) * times["alone"]
    facts = {"rounds": ROUNDS, "threads": torch.get_num_threads(), "machine": device_name(world.segmenter.device)}
    first, then = (caption.format(**times, **facts) for caption in CAPTIONS["many"])
    for shown in range(len(prompts) + 2):
        card, last = Card("One encoding, many prompts"), shown > len(prompts)
        card.text((LEFT, 112), f"encoded once: {times['encode']:.0f} ms", 28, BLUE, bold=True)
        card.picture(image, LEFT, 152, 400)
        for n, prompt in enumerate(prompts[:shown]):
            x, y = 500 + 248 * (n % 3), 112 + 240 * (n // 3)
            card.text((x, y), prompt, 24, bold=True)
            card.text((x + 228, y + 2), f"{times[prompt]:.0f} ms", 22, anchor="ra")
            card.picture(heat(image, maps[n]), x, y + 36, 228)
        for y, time, told, colour in (
            (488, times["together"], "all six, encoded once", BLUE),
            (546, apart, "all six, encoded anew", GREY),
        ) * last:
            card.text((LEFT, y), f"{told}: {time:.0f} ms", 24, colour)
            card.draw.rectangle((LEFT, y + 32, LEFT + 400 * time / apart, y + 50), colour)
        yield card, 6.0 if last else 0.9, then if last else first


def example(world: World) -> Iterator[tuple[Card, float, str]]:
    mask, query, truth = world.mask(world.room, "guitar"), world.wall, world.mask(world.wall, "guitar")
    prompt = VisualPrompt(world.room.image, mask)
    world.segmenter.set_image(query.image)
    found = world.segmenter.predict(prompt)[0] > 0.5
    facts = {"iou": iou(found, truth)}
    columns = [
        (LEFT, 384, overlay(world.room.image, mask, BLUE), "an example, its mask"),
        (486, 307, as_seen(prompt, world.segmenter.processor.image_processor), "what CLIP is shown"),
        (840, 384, overlay(query.image, found, BLUE, outline=truth), "another picture"),
    ]
    for shown, (seconds, caption) in enumerate(zip((3.5, 4.5, 4.0), CAPTIONS["example"]), start=1):
        card = Card("Show it, instead of saying it")
        for x, width, picture, title in columns[:shown]:
            card.text((x, 152), title, 28, bold=True)
            card.picture(picture, x, 200, width)
            if x > LEFT:
                card.text((x - 23, 353), "→", 40, GREY, anchor="mm")
        if shown == len(columns):
            card.text((840, 524), f"IoU {facts['iou']:.2f} at t = 0.5", 28, BLUE, bold=True)
        yield card, seconds, caption.format(**facts)


def mix(world: World) -> Iterator[tuple[Card, float, str]]:
    prompt = VisualPrompt(world.room.image, world.mask(world.room, "guitar"))
    shown = as_seen(prompt, world.segmenter.processor.image_processor)
    (visual,) = world.segmenter.conditions(prompt)
    left, right, y = 400, 880, 134
    world.segmenter.set_image(world.wall.image)
    for a in np.linspace(0, 1, 26):
        (probability,) = world.segmenter.predict(interpolate("a cup", visual, float(a)))
        card, x = Card("Between words and example"), left + a * (right - left)
        card.picture(heat(world.wall.image, probability), 374, TOP, PANEL)
        card.draw.line((left, y, right, y), GREY, 4)
        card.draw.ellipse((x - 12, y - 12, x + 12, y + 12), BLUE)
        card.text((x, 88), f"a = {a:.2f}", 26, BLUE, bold=True, anchor="ma")
        card.text((LEFT, 116), "words, t", 28, bold=True)
        card.text((LEFT, TOP), "“a cup”", 40)
        card.text((RIGHT, 116), "example, s", 28, bold=True, anchor="ra")
        card.picture(shown, RIGHT - 280, TOP, 280)
        yield card, 0.2 if 0 < a < 1 else 2.4, CAPTIONS["mix"][0]


def threshold(world: World) -> Iterator[tuple[Card, float, str]]:
    image, truth = world.wall.image, world.mask(world.wall, "guitar")
    world.segmenter.set_image(image)
    (probability,) = world.segmenter.predict("a guitar")
    thresholds = np.arange(1, 25) / 25
    ious = [iou(probability > t, truth) for t in thresholds]
    best = int(np.argmax(ious))
    first, then = CAPTIONS["threshold"]
    for n, upto in [*((n, n) for n in range(len(ious))), (best, len(ious))]:
        card = Card("From a map to a mask")
        card.text((LEFT, 112), f"“a guitar”, t = {thresholds[n]:.2f}", 28, bold=True)
        card.picture(overlay(image, probability > thresholds[n], BLUE, outline=truth), LEFT, TOP, PANEL)
        card.text((SECOND + PANEL, 112), f"IoU {ious[n]:.2f}", 28, BLUE, bold=True, anchor="ra")
        card.picture(curve(thresholds[: upto + 1], ious[: upto + 1], (thresholds[n], ious[n])), SECOND, TOP, 560)
        last = upto == len(ious)
        yield card, 5.0 if last else 0.2, then.format(best=thresholds[n], iou=ious[n]) if last else first


def curve(thresholds, ious, point) -> np.ndarray:
    """IoU over threshold, with a point on it, as a picture."""
    figure, axis = plt.subplots(figsize=(5.6, 4.3), dpi=100, layout="constrained")
    axis.plot(thresholds, ious, color=BLUE, linewidth=3)
    axis.plot(*point, "o", color=BLUE, markersize=13)
    axis.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0.5, 1])
    axis.set_xlabel("threshold t", fontsize=18)
    axis.set_ylabel("IoU with the truth", fontsize=18)
    axis.tick_params(labelsize=18)
    axis.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    picture = np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    plt.close(figure)
    return picture


def labels(world: World) -> Iterator[tuple[Card, float, str]]:
    things = {"a dog": ("dog", ORANGE), "a car": ("car", BLUE), "an apple": ("apple", VERMILLION)}
    things["a chair"] = ("chair", GREEN)
    prompts, image, empty = list(things), world.meadow.image, "#3C3C3C"
    colours = np.array([ImageColor.getrgb(c) for c in (empty, *(colour for _, colour in things.values()))], np.uint8)
    names = np.zeros(image.shape[:2], int)
    for label, (thing, _) in enumerate(things.values(), start=1):
        names[world.mask(world.meadow, thing)] = label
    world.segmenter.set_image(image)
    first, then = CAPTIONS["labels"]
    for shown in range(len(prompts) + 1):
        found = world.segmenter.label_map(prompts[:shown]) if shown else np.zeros_like(names)
        card, last = Card("Every pixel takes a name"), shown == len(prompts)
        card.picture(image, LEFT, TOP, PANEL)
        card.picture(contour(colours[found], names > 0) if last else colours[found], SECOND, TOP, PANEL)
        x = LEFT
        for prompt, colour in [("background", empty), *((p, things[p][1]) for p in prompts[:shown])]:
            card.draw.rectangle((x, 114, x + 28, 142), colour)
            x = card.text((x + 40, 110), prompt, 28) + 40
        yield card, 2.0 if last else 0.9, first
    yield card, 3.0, then.format(right=(found == names)[names > 0].mean())


def limits(world: World) -> Iterator[tuple[Card, float, str]]:
    """Two failures; raises InputError where the model makes them no more: then the film must show others."""
    prompts, image, truth = ["a dog", "no dog", "a cat"], world.meadow.image, world.mask(world.meadow, "dog")
    world.segmenter.set_image(image)
    maps = world.segmenter.predict(prompts)
    marked = maps > 0.5
    agreed = iou(marked[0], marked[1])
    if min(agreed, iou(marked[2], truth)) < 0.5:
        raise InputError("“no dog” or “a cat” marks the dog no more: show other failures in presentation/video.py")
    for shown, seconds, caption in zip((2, 3, 3), (5.0, 5.0, 4.0), CAPTIONS["limits"]):
        card = Card("Where it fails")
        for n, prompt in enumerate(prompts[:shown]):
            x = LEFT + 400 * n
            card.text((x, 144), f"“{prompt}”", 32, bold=True)
            card.picture(heat(image, maps[n], outline=truth), x, 200, 368)
            card.text((x, 510), f"IoU with the dog: {iou(marked[n], truth):.2f}", 28)
        yield card, seconds, caption.format(agreed=agreed, highest=maps[2][truth].max())


def closing(world: World) -> Iterator[tuple[Card, float, str]]:
    card = Card()
    card.text((LEFT, 72), "CLIPSeg, reproduced in notebooks", 52, bold=True)
    card.text((LEFT, 160), "Lüddecke and Ecker, Image Segmentation Using Text and Image", 30)
    card.text((LEFT, 202), "Prompts, CVPR 2022, arXiv 2112.10003", 30)
    for y, command, told in (
        (290, "make reproduce", "every table and figure, from the notebooks"),
        (400, 'clipseg-repro segment clip.mp4 "a cat"', "pictures and videos of your own"),
    ):
        card.text((LEFT, y), command, 34, BLUE, bold=True, mono=True)
        card.text((LEFT, y + 46), told, 26, GREY)
    card.text((LEFT, 548), "Pictograms: OpenMoji, CC BY-SA 4.0. Grounds: photographs from scikit-image.", 26, GREY)
    yield card, 5.6, CAPTIONS["closing"][0]


SCENES: tuple[Callable, ...] = (words, many, example, mix, threshold, labels, limits, closing)


def fastest(calls: dict[str, Callable]) -> dict[str, float]:
    """The least milliseconds that each call takes, in ROUNDS rounds of all."""
    times = dict.fromkeys(calls, np.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name] = min(times[name], 1000 * (perf_counter() - start))
    return times


def iou(mask, truth) -> float:
    return (mask & truth).sum() / (mask | truth).sum()


def vtt(cues: Iterable[tuple[int, int, str]]) -> str:
    """WebVTT of cues (first frame, frame after the last, text)."""

    def clock(frame):
        ms = round(1000 * frame / FPS)
        return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"

    parts = [f"{n}\n{clock(start)} --> {clock(end)}\n{text}\n" for n, (start, end, text) in enumerate(cues, start=1)]
    return "\n".join(["WEBVTT\n", *parts])


def film(folder: Path, world: World, scenes: Iterable[Callable] = SCENES, poster: str = "words"):
    """Write demo.mp4, demo.vtt and demo.png to the folder: all three or none. poster: the scene whose last frame it
    is."""
    cues, frames = [], 0
    with ExitStack() as stack:
        paths = {end: stack.enter_context(written_whole(folder / f"demo.{end}")) for end in ("mp4", "png", "vtt")}
        with writing(paths["mp4"], (WIDTH, HEIGHT), FPS) as write:
            for scene in scenes:
                for card, seconds, caption in scene(world):
                    frame, repeats = card.captioned(caption), round(seconds * FPS)
                    for _ in range(repeats):
                        write(frame)
                    start, before = (cues[-1][0], cues[-1][2]) if cues else (0, caption)
                    if before == caption:
                        cues[-1:] = [(start, frames + repeats, caption)]
                    else:
                        cues.append((frames, frames + repeats, caption))
                    frames += repeats
                if scene.__name__ == poster:
                    Image.fromarray(frame).save(paths["png"], "PNG", optimize=True)
        paths["vtt"].write_text(vtt(cues), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    scale, world = get_scale(), World()
    film(scale.results, world)
    for name, told in {"demo.mp4": "the film", "demo.png": "its poster", "demo.vtt": "its captions"}.items():
        measured = {name: round(world.measured[name], 1) for name in ("encode", "prompt", "together", "alone")}
        record(scale.results / name, scale, command="make video", caption=told, measured=measured)
