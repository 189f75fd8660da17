"""The mini world in the layouts of the other benchmarks: small, seeded, read by the same readers as the real ones."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from pycocotools import mask as rle
from tqdm.auto import tqdm

from clipseg_repro.datasets import coco, coco_stuff, own, pascal_context, voc
from clipseg_repro.datasets.class_masks import VOID
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.generalized import PROMPTS
from clipseg_repro.files import alone, record_files, written_whole
from clipseg_repro.mini.export import JPEG_QUALITY, MANIFEST, damaged, outline, replace, sources, start_worker
from clipseg_repro.mini.scenes import Scene, SceneRules, compose
from clipseg_repro.mini.vocabulary import Kind, load_vocabulary

FIRST_CODE = 100  # of the replicas' scenes; export.CODES are PhraseCut's
BORDER = 5  # pixels of VOC's void borders
FSS_SIZE = 224  # pixels, as FSS-1000's pictures
AHEAD = 4  # scenes that a process is given at a time
RULES = SceneRules()
# Pictures by split; stuff: of val2017 that have a label map; fss: classes of ten pictures.
COUNTS = {
    "voc": {"train": 20, "val": 140},
    "context": {"train": 10, "val": 30},
    "coco": {"train2014": 600, "val2014": 200, "val2017": 100},
    "stuff": 12,
    "fss": 16,
    "own": {"train": 12, "val": 6},
}
CONTEXT_GROUNDS = {"grass": "grass", "gravel": "ground", "brick": "wall"}
STUFF_GROUNDS = {"grass": "grass", "gravel": "gravel", "brick": "wall-brick"}


def build(root: Path, seed: int = 0):
    """Write every replica into a folder of `root`; the same seed writes the same bytes. One that is whole is left as it
    is, a damaged or older one is replaced. Raises InputError for a folder of that name that was not written here."""
    context = multiprocessing.get_context("spawn")  # a forked copy of a process that runs torch can hang
    try:
        with ProcessPoolExecutor(min(4, os.cpu_count() or 1), context, start_worker) as pool:
            for name, write in REPLICAS.items():
                _build(root, name, write, Scenes(seed, pool))
    except BrokenProcessPool:
        raise InputError(f"a process that built '{root}' was killed (no memory?): run again, it goes on") from None


def _build(root: Path, name: str, write: Callable, scenes: "Scenes"):
    final, partly, old = root / name, root / f".{name}.partial", root / f".{name}.old"
    manifest = {"seed": scenes.seed, "sources": sources("replicas.py")}
    if damaged(final, manifest) == []:
        return
    if final.exists() and not (final / MANIFEST).exists():
        raise InputError(f"'{final}' was not built here: choose another folder, or move that one away")
    root.mkdir(parents=True, exist_ok=True)
    with alone(root / f".{name}.lock", f"building '{final}'"):
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partly, ignore_errors=True)
        partly.mkdir()
        write(partly, scenes)
        _write_json(partly / MANIFEST, manifest)
        record_files(partly)
        replace(final, partly, old)


def _named(names: Callable[[Kind], str]) -> dict[int, str]:
    """kind -> what a benchmark calls it, of the kinds that it has."""
    return {kind.index: names(kind) for kind in load_vocabulary() if names(kind)}


def _context_name(kind: Kind) -> str:
    of_voc = {theirs: own for own, theirs in pascal_context.IN_VOC.items()}
    return of_voc.get(kind.pascal, kind.pascal) or next((n for n in kind.names if n in pascal_context.CLASSES), "")


@dataclass(frozen=True)
class Scenes:
    """Scenes of a seed, drawn by the processes of a pool."""

    seed: int
    pool: ProcessPoolExecutor

    def __call__(
        self,
        code: int,
        what: str,
        count: int,
        *kinds: Iterable[int],
        rules: SceneRules = RULES,
        some: Iterable[int] = (),
        made: Callable | None = None,
    ) -> Iterator:
        """`count` scenes, or what is `made` of each, in turn of these collections of kinds; each shows one of them at
        least, of `some` where they are given."""
        chosen = islice(cycle(map(tuple, kinds)), count)
        draw = partial(_scene, self.seed, code, rules, tuple(some), made)
        scenes = self.pool.map(draw, range(count), chosen, chunksize=AHEAD)
        yield from tqdm(scenes, what, count, unit="scene", leave=False, mininterval=0.5)


def _scene(seed: int, code: int, rules: SceneRules, some: tuple[int, ...], made: Callable | None, i: int, chosen):
    rng = np.random.default_rng([seed, FIRST_CODE + code, i])
    scene = compose(rng, rules, chosen)
    while not any(thing.kind in (some or chosen) for thing in scene.objects):
        scene = compose(rng, rules, chosen)
    return made(scene) if made else scene


def _save(path: Path, array: np.ndarray, palette: bool = False):
    """A picture as JPEG, labels as PNG, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(array, path.suffix, palette))


def _encoded(array: np.ndarray, suffix: str, palette: bool = False) -> bytes:
    """As in `_save`; with VOC's palette, whose colours deal the bits of a label to the channels."""
    picture, content = Image.fromarray(array), BytesIO()
    if palette:
        picture.putpalette(
            sum(((n >> 3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
            for n in range(256)
            for channel in range(3)
        )
    options = {".jpg": {"format": "JPEG", "quality": JPEG_QUALITY}, ".png": {"format": "PNG", "optimize": True}}
    picture.save(content, **options[suffix])
    return content.getvalue()


def _write_json(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")))


def _labels(scene: Scene, names: dict[int, str], number: Callable[[str], int], ground: int) -> np.ndarray:
    """(H, W) uint8 map of the objects that have names here; the rest is `ground`."""
    labels = np.full(scene.image.shape[:2], ground, np.uint8)
    for thing in scene.objects:
        labels[thing.mask] = number(names[thing.kind]) if thing.kind in names else ground
    return labels


def _voc(folder: Path, scenes: Scenes):
    """VOC 2012, whose maps have void borders, SBD's not."""
    names, lists = _named(lambda kind: kind.pascal), folder / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for n, (split, count) in enumerate(COUNTS["voc"].items()):
        stems = [f"2012_{1000 * n + i:06}" for i in range(count)]
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem, scene in zip(stems, scenes(n, f"VOC 2012 {split}", count, names)):
            _save(folder / "VOC2012" / "JPEGImages" / f"{stem}.jpg", scene.image)
            labels = _labels(scene, names, voc.CLASSES.index, 0)
            _save(folder / "VOC2012" / "SegmentationClassAug" / f"{stem}.png", labels)  # grey, as it circulates
            borders = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((BORDER, BORDER), np.uint8)) > 0
            labels[borders] = VOID
            _save(folder / "VOC2012" / "SegmentationClass" / f"{stem}.png", labels, palette=True)
    _context(folder / "VOC2010", scenes)


def _context(folder: Path, scenes: Scenes):
    """Pascal Context as the converter writes it; where the ground has a name it is labelled."""
    names, number = _named(_context_name), {name: n for n, name in enumerate(pascal_context.CLASSES, start=1)}
    lists = folder / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    for n, (split, count) in enumerate(COUNTS["context"].items()):
        stems = [f"2010_{1000 * n + i:06}" for i in range(count)]
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem, scene in zip(stems, scenes(10 + n, f"Pascal Context {split}", count, names)):
            _save(folder / "JPEGImages" / f"{stem}.jpg", scene.image)
            ground = number.get(CONTEXT_GROUNDS.get(scene.ground), 0)
            labels = _labels(scene, names, number.get, ground)
            _save(folder / pascal_context.PascalContext.maps / f"{stem}.png", labels, palette=True)


def _coco(folder: Path, scenes: Scenes):
    """COCO 2014, and 2017 with COCO-Stuff's maps: train2017, which LVIS annotates, has the pictures of train2014."""
    names, numbers = _named(lambda kind: kind.coco), {name: n for n, name in coco.THINGS.items()}
    for split in COUNTS["coco"]:
        pictures, prefix = _coco_pictures(scenes, split), f"COCO_{split}_" if split.endswith("2014") else ""
        for id, picture in pictures.items():
            for home in (split, "train2017") if split == "train2014" else (split,):
                path = folder / "images" / home / f"{prefix if home == split else ''}{id:012}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture["jpeg"])
        if prefix:
            content = _instances(pictures, names, numbers, "file_name", prefix + "{:012}.jpg")
            _write_json(folder / "annotations" / f"instances_{split}.json", content)
    stuff = {name: coco_stuff.FIRST_STUFF + i for i, name in enumerate(coco_stuff.STUFF)}
    for i, scene in enumerate(_coco_scenes(scenes, "val2017", COUNTS["stuff"]), start=1):
        ground = stuff.get(STUFF_GROUNDS.get(scene.ground), VOID + 1) - 1
        labels = _labels(scene, names, lambda name: numbers[name] - 1, ground)
        labels[np.any([t.mask for t in scene.objects if t.kind not in names] or [np.zeros_like(labels)], 0) > 0] = VOID
        _save(folder / "stuffthingmaps" / "val2017" / f"{i:012}.png", labels)


def _coco_scenes(scenes: Scenes, split: str, count: int, made: Callable | None = None) -> Iterator:
    """All show one of COCO's things; those that LVIS annotates, too, often what Table 8 asks for, and what COCO has
    not."""
    meant = {name for prompts in PROMPTS.values() for names in prompts.values() for name in names}
    vocabulary, things = load_vocabulary(), _named(lambda kind: kind.coco)
    asked, every = [kind.index for kind in vocabulary if kind.lvis in meant], range(len(vocabulary))
    code, kinds = {
        "train2014": (20, (things, asked, every)),
        "val2014": (21, (things,)),
        "val2017": (30, (asked, every)),
    }[split]
    return scenes(code, f"COCO {split}", count, *kinds, some=things, made=made)


@lru_cache(len(COUNTS["coco"]))
def _coco_pictures(scenes: Scenes, split: str) -> dict[int, dict]:
    """`_picture` of every scene of a split, by its id."""
    first = {"train2014": 100_001, "val2014": 10_001, "val2017": 1}[split]
    return dict(enumerate(_coco_scenes(scenes, split, COUNTS["coco"][split], _picture), start=first))


def _picture(scene: Scene) -> dict:
    """What annotations need of a scene, with the picture as JPEG: far smaller than the scene itself."""
    objects = []
    for thing in scene.objects:
        polygons = [p for p in outline(thing.mask) if len(p) > 2]
        segmentation = [(p + 0.5).ravel().tolist() for p in polygons] or _rle(thing.mask)
        shape = {"segmentation": segmentation, "area": int(thing.mask.sum()), "bbox": list(thing.box), "iscrowd": 0}
        objects.append((thing.kind, shape))
    return {"size": scene.image.shape[:2], "jpeg": _encoded(scene.image, ".jpg"), "objects": objects}


def _lvis(folder: Path, scenes: Scenes):
    names = _named(lambda kind: kind.lvis.replace(" ", "_"))
    numbers = {name: n for n, name in enumerate(sorted(set(names.values())), start=1)}
    for split, of_coco in (("train", "train2014"), ("val", "val2017")):
        address = f"http://images.cocodataset.org/{split}2017/{{:012}}.jpg"
        content = _instances(_coco_pictures(scenes, of_coco), names, numbers, "coco_url", address)
        _write_json(folder / f"lvis_v1_{split}.json", content)


def _instances(pictures: dict[int, dict], names: dict[int, str], numbers: dict[str, int], key: str, place: str) -> dict:
    """COCO's annotation file of some pictures, for the kinds that have `names`; under `key` stands the `place` of each,
    its id filled in."""
    images, annotations = [], []
    for id, picture in pictures.items():
        height, width = picture["size"]
        images.append({"id": id, "height": height, "width": width, key: place.format(id)})
        for kind, shape in picture["objects"]:
            if kind in names:
                number = len(annotations) + 1
                annotations.append({"id": number, "image_id": id, "category_id": numbers[names[kind]]} | shape)
    categories = [{"id": n, "name": name} for name, n in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _rle(mask: np.ndarray) -> dict:
    found = rle.encode(np.asfortranarray(mask, np.uint8))
    return found | {"counts": found["counts"].decode()}


def _fss(folder: Path, scenes: Scenes):
    """FSS-1000: ten pictures of one object for each class, masks as the authors have them, RGB of 0 and 1."""
    vocabulary = load_vocabulary()
    chosen = np.random.default_rng([scenes.seed, FIRST_CODE]).permutation(len(vocabulary))[: COUNTS["fss"]].tolist()
    rules = SceneRules(sizes=((FSS_SIZE, FSS_SIZE),), objects=(1, 1), scale=(0.3, 0.8))
    names = {kind: vocabulary[kind].name.replace(" ", "_") for kind in chosen}
    for kind, name in names.items():
        for n, scene in enumerate(scenes(1000 + kind, f"FSS-1000 {name}", 10, [kind], rules=rules), start=1):
            _save(folder / name / f"{n}.jpg", scene.image)
            _save(folder / name / f"{n}.png", np.repeat(scene.objects[0].mask[..., None], 3, 2).astype(np.uint8))
    (folder / "splits").mkdir()
    (folder / "splits" / "test.txt").write_text("".join(f"{name}\n" for name in sorted(names.values())))


def _own(folder: Path, scenes: Scenes):
    """A table of one's own: the words for each kind in a picture, and the mask of all of that kind."""
    rows = []
    for n, (split, count) in enumerate(COUNTS["own"].items()):
        kinds = range(len(load_vocabulary()))
        for i, scene in enumerate(scenes(40 + n, f"own {split}", count, kinds)):
            _save(folder / "pictures" / f"{split}{i}.jpg", scene.image)
            for kind in sorted({thing.kind for thing in scene.objects}):
                mask = np.any([thing.mask for thing in scene.objects if thing.kind == kind], 0)
                name = f"masks/{split}{i}_{kind}.png"
                _save(folder / name, mask.astype(np.uint8) * 255)
                rows.append((f"pictures/{split}{i}.jpg", name, load_vocabulary()[kind].name, split))
    pd.DataFrame(rows, columns=[*own.COLUMNS, "split"]).to_csv(
        folder / "segments.csv", index=False, lineterminator="\n"
    )


REPLICAS = {"VOCdevkit": _voc, "COCO": _coco, "LVIS": _lvis, "FSS-1000": _fss, "own": _own}
