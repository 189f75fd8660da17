"""Many pictures, or videos, and many prompts, to files: what `clipseg-repro segment` does."""

import json
import os
import re
import sys
from collections import Counter
from hashlib import sha256
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageColor
from pycocotools import mask as coco
from tqdm import tqdm

from clipseg_repro import __version__
from clipseg_repro.errors import InputError
from clipseg_repro.files import sweep, written_whole
from clipseg_repro.pictures import load_image
from clipseg_repro.plotting import OKABE_ITO, overlay
from clipseg_repro.prompts import VisualPrompt
from clipseg_repro.segmenter import load_segmenter
from clipseg_repro.strips import write_png
from clipseg_repro.video import SUFFIXES, Video, is_video, read_lines, rework

KINDS = ("probability", "mask", "overlay")
RECORD = "_segments.json"  # ends the name of what `segment` knows of a picture
COLOURS = [
    colour for name, colour in OKABE_ITO.items() if name != "black"
]  # of the label map, whose background is black, and of a video's overlays
NAME_BYTES, WORDS_BYTES = 140, 80  # in file names, which file systems limit to 255 bytes


def pictures_and_words(arguments, prompts, out):
    """Sort a command's arguments: (paths of pictures and videos, words). What exists is a picture, or a folder of them.

    Of a folder, what is directly in it and has the suffix of a video, or of a picture that Pillow knows, sorted.
    `prompts` follow the words. Raises InputError for a folder without pictures, for what looks like a path and does not
    exist, and for a picture as prompt."""
    Image.init()
    kinds = {kind for kind in Image.OPEN if Image.MIME.get(kind, "").startswith("image/")}
    suffixes = SUFFIXES | {suffix for suffix, kind in Image.EXTENSION.items() if kind in kinds}
    pictures, words = [], []
    for argument in arguments:
        path = Path(argument)
        if os.path.isdir(path):
            if os.path.abspath(path) == os.path.abspath(out):
                raise InputError(f"--out '{out}' is a folder of pictures, too: give another for the results")
            try:
                files = sorted(path.iterdir())
            except OSError as error:
                raise InputError(f"folder '{path}' cannot be read ({error.strerror}): check its permissions") from None
            found = [p for p in files if p.suffix.lower() in suffixes and not p.name.startswith(".")]
            if not found:
                raise InputError(
                    f"no pictures in folder '{path}': check the path; words of that name go after --prompt"
                )
            pictures += found
        elif os.path.exists(path):
            pictures.append(path)
        elif path.suffix.lower() in suffixes or "/" in argument or os.sep in argument:
            raise InputError(f"no picture '{argument}': check the path; words that look like a path go after --prompt")
        else:
            words.append(argument)
    if not pictures:
        raise InputError("no pictures: give files or folders, and what to look for in quotes")
    for prompt in prompts:
        if os.path.isfile(prompt) and Path(prompt).suffix.lower() in suffixes:
            raise InputError(f"--prompt '{prompt}' is a picture: leave --prompt out to segment it, or name it in words")
    return list({os.path.abspath(picture): picture for picture in pictures}.values()), [*words, *prompts]


def file_names(pictures, out):
    """{picture: what its files' names begin with}: its stem; of several with the same, its folder, stem and suffix.

    A name is also taken where the folder `out` has another picture's results under it."""
    names = {}
    for name in (
        lambda path: path.stem,
        lambda path: "-".join((path.absolute().parent.name, path.stem, path.suffix[1:])),
        lambda path: f"{sha256(os.fsencode(path.absolute())).hexdigest()[:8]}-{path.stem}",
    ):
        left = {path: _cut(name(path), NAME_BYTES) for path in pictures if path not in names}
        count = Counter(text.casefold() for text in [*left.values(), *names.values()])
        count.update(text.casefold() for path, text in left.items() if _is_of_another(out / f"{text}{RECORD}", path))
        names |= {path: text for path, text in left.items() if count[text.casefold()] == 1}
    return {path: names[path] for path in pictures}


def segment(
    pictures,
    words,
    out,
    *,
    support=None,
    mask=None,
    background=(),
    model="mini",
    device=None,
    threshold=None,
    labels=False,
):
    """Write NAME_N_WORDS_{probability,mask,overlay}.png to the folder `out` for each picture and prompt; a generator.

    Yields, per picture, (results, new). results: one dict per prompt, as `_written` gives them, or the InputError that
    says why the picture cannot be read. new: False where an earlier call with the same settings, model and picture has
    written them, as NAME_segments.json tells, which is written last. support, mask: one more prompt. labels: also write
    the label map NAME_labels.png, whose legend is in the results. background, model, device and threshold are those of
    `load_segmenter` and `Segmenter.label_map`; masks are where the probability exceeds 0.5 if None.

    For a video, writes NAME.mp4, every prompt's map as a tint of its own over every frame, and NAME_frames.jsonl; its
    results are an iterator, to be used up before the next picture, of one dict per frame: frame (from 0), time
    (seconds), video, files, and prompts: per prompt what a picture has of it, and the colour.
    """
    prompts = [*words, *([VisualPrompt(support, mask)] if support else [])]
    if not prompts:
        raise InputError(
            "nothing to look for: all that was given are pictures; give words in quotes, or after --prompt if a file "
            "has the same name"
        )
    for picture in filter(is_video, pictures):
        if labels:
            raise InputError(f"'{picture}' is a video, which gets no label map: leave --labels and --background out")
        if os.path.realpath(picture.parent) == os.path.realpath(out):
            raise InputError(f"--out '{out}' is the folder of '{picture}': give another for the video with overlays")
    names = [*words, *([f"like {support.stem}"] if support else [])]
    if labels and len(prompts) > 255:
        raise InputError(f"{len(prompts)} prompts: a label map holds at most 255, leave --labels and --background out")
    settings = {
        "version": __version__,
        "model": [str(model), _stamp(model)],
        "prompts": names,
        "example": [_stamp(support or ""), _stamp(mask or "")],
        "background": list(background),
        "threshold": threshold,
        "labels": labels,
    }
    slugs = [_cut(re.sub(r"\W+", "-", name.lower()).strip("-")[:40], WORDS_BYTES) for name in names]
    for written in (*(f"{kind}.png" for kind in (*KINDS, "labels")), "segments.json", "frames.jsonl"):
        sweep(out, f".*_{written}.*.tmp")
    segmenter, limit = None, 0.5 if threshold is None else threshold
    for picture, prefix in file_names(pictures, out).items():
        stems = [out / f"{prefix}_{number}_{slug}" for number, slug in enumerate(slugs, start=1)]
        label_map, record = out / f"{prefix}_labels.png", out / f"{prefix}{RECORD}"
        files = [Path(f"{stem}_{kind}.png") for stem in stems for kind in KINDS] + [label_map] * labels
        if is_video(picture):
            files = [out / f"{prefix}_frames.jsonl", out / f"{prefix}.mp4"]
        made_with = settings | {"picture": [os.path.abspath(picture), _stamp(picture)]}
        known = _read(record)
        if known.get("made_with") == made_with and all(file.is_file() for file in files):
            yield read_lines(files[0]) if is_video(picture) else known["results"], False
            continue
        try:
            image = Video(picture) if is_video(picture) else load_image(picture)
        except InputError as error:
            yield error, True
            continue
        if segmenter is None:
            segmenter = load_segmenter(model, device, dtype="float32")  # the same masks on every machine
            conditions = segmenter.conditions(prompts)
            floors = segmenter.conditions(background) if background else None
        if is_video(picture):
            yield _frames(image, out / prefix, made_with, segmenter, conditions, limit), True
            continue
        segmenter.set_image(image)
        maps, results = segmenter.maps(conditions), []
        try:
            record.unlink(missing_ok=True)
            for name, stem in zip(names, stems):
                found = _written(stem, image, next(maps), limit)
                results.append({"picture": str(picture), "prompt": name, "files": f"{stem.name}_*.png"} | found)
            if labels:
                colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
                indices = segmenter.label_map(conditions, floors, threshold).astype(np.uint8)
                write_png(label_map, indices, palette=[(0, 0, 0), *map(ImageColor.getrgb, colours)])
                for label, (found, colour) in enumerate(zip(results, colours), start=1):
                    found |= {"label": label, "colour": colour}
            with written_whole(record) as temporary:
                temporary.write_text(json.dumps({"made_with": made_with, "results": results}, indent=1))
        except OSError as error:
            raise InputError(f"cannot write to '{out}' ({error.strerror or error}): give another --out") from error
        yield results, True


def _written(stem, image, probability, threshold):
    """Write a prompt's three pictures. Returns what `_found` does."""
    mask = probability > threshold
    write_png(f"{stem}_probability.png", probability, lambda rows: (rows * 65535).round().astype(np.uint16))
    write_png(f"{stem}_mask.png", mask, lambda rows: rows * np.uint8(255))
    write_png(f"{stem}_overlay.png", overlay(image, probability))
    return _found(probability, mask)


def _frames(video, stem, made_with, segmenter, conditions, threshold):
    """Write a video's files. Yields what is found in each frame, as `segment` gives it."""

    def work(frame):
        segmenter.set_image(frame)
        picture, prompts = frame, []
        for name, probability, colour in zip(made_with["prompts"], segmenter.maps(conditions), cycle(COLOURS)):
            mask = probability > threshold
            picture = overlay(picture, probability, colour, outline=mask)
            prompts.append({"prompt": name} | _found(probability, mask) | {"colour": colour})
        return picture, {"video": str(video.path), "files": f"{stem.name}.mp4", "prompts": prompts}

    try:
        Path(f"{stem}{RECORD}").unlink(missing_ok=True)
        frames = rework(video, stem, made_with, work)
        for found in tqdm(frames, video.path.name, video.total or None, unit="frame", leave=False):
            yield found
        if video.total - found["frame"] > max(video.fps, 0.1 * video.total):  # sound may be a little longer
            note = f"Note: '{video.path}' ends after {found['frame'] + 1} of {video.total} frames: it may be truncated"
            tqdm.write(note, file=sys.stderr)
        with written_whole(Path(f"{stem}{RECORD}")) as temporary:
            temporary.write_text(json.dumps({"made_with": made_with}, indent=1))
    except OSError as error:
        raise InputError(f"cannot write to '{stem.parent}' ({error.strerror or error}): give another --out") from error


def _found(probability, mask):
    """A mask's area (share of the picture), box (x, y, width, height in pixels, or None), highest_probability, and mask
    in COCO's compressed run-length encoding."""
    mask = mask.view(np.uint8)
    runs = coco.encode(cv2.transpose(mask).T)  # column by column, as COCO has it
    area = int(coco.area(runs))
    return {
        "area": area / mask.size,
        "box": list(cv2.boundingRect(mask)) if area else None,
        "highest_probability": round(float(probability.max()), 6),
        "mask": {"size": runs["size"], "counts": runs["counts"].decode("ascii")},
    }


def _read(record):
    """A record of `segment`, or {} if there is none that can be read."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _is_of_another(record, picture):
    known = _read(record).get("made_with", {}).get("picture")
    return bool(known) and known[0] != os.path.abspath(picture)


def _stamp(path):
    """What changes when a file, or one in a folder, is written anew: sizes and times of all, [] if there are none."""
    paths = sorted(Path(path).rglob("*")) if os.path.isdir(path) else [path]
    return [[os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in paths if os.path.isfile(p)]


def _cut(text, size):
    """The text in `size` bytes at most: of a longer one the beginning and a digest."""
    raw = os.fsencode(text)
    return text if len(raw) <= size else f"{raw[: size - 9].decode(errors='ignore')}-{sha256(raw).hexdigest()[:8]}"
