"""PhraseCut's files, read and checked in one pass: what would change a score in silence is refused by name.

Tolerated is what the official data have, or what the released loader lets pass: polygons that reach beyond the image,
polygons of one or two points, instances without polygons (beside others that have some), tasks of images of another
split, and the images of BAD_IMAGES.
"""

import reprlib
from array import array
from collections.abc import Iterable
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np

from clipseg_repro.datasets.checks import Problems, check_pictures, is_number, is_size, is_text, read_json, sift
from clipseg_repro.errors import InputError
from clipseg_repro.files import CHECKSUMS, changed_files

FOLDER = "VGPhraseCut_v0"
# (phrases, images) of the official files. Their README counts miniv with val, and says that val's file is without it.
COUNTS = {
    "train": [(310_816, 71_746)],
    "val": [(20_316, 2_971), (20_316 - 821, 2_971 - 100)],
    "test": [(14_354, 2_545)],
    "miniv": [(821, 100)],
}
SPLITS = tuple(COUNTS)
IMAGE_TABLES = ("image_data_split3000.json", "image_data_split.json")  # of the authors' drive, of their script
# Annotation and image differ in size (released loader, datasets/phrasecut.py).
BAD_IMAGES = frozenset(
    {150417, 285665, 498246, 61564, 285743, 498269, 498010, 150516, 150344}
    | {286093, 61530, 150333, 286065, 285814, 498187, 285761, 498042}
)
REMEDY = (
    "build the data again (clipseg-repro data build) or, at --scale paper, download them again; "
    "clipseg-repro data check phrasecut [--scale paper] names all that is wrong"
)


def _is_structure(value) -> bool:
    try:
        name, attributes, relations = (value[key] for key in ("name", "attributes", "relation_descriptions"))
        are_lists = all(isinstance(part, list) for part in (attributes, relations, *relations))
        texts = all(isinstance(text, str) for text in chain([name], attributes, *relations))
        return are_lists and texts and all(len(pair) == 2 for pair in relations)
    except (KeyError, TypeError):
        return False


# What is wrong with an entry: whether it is right.
IMAGE_RULES = {
    "entry that is no object": lambda image: isinstance(image, dict),
    "image_id that is no whole number": lambda image: is_number(image.get("image_id")),
    "image without a split": lambda image: isinstance(image.get("split", 0), str | None),
    "image of an impossible size": lambda image: is_size(image.get("width"), image.get("height")),
}
TASK_RULES = {
    "entry that is no object": lambda task: isinstance(task, dict),
    "task_id that is no text": lambda task: is_text(task.get("task_id")),
    "image_id that is no whole number": lambda task: is_number(task.get("image_id")),
    "phrase that is no text": lambda task: is_text(task.get("phrase")),
    "phrase_structure without name, attributes or relations": lambda task: _is_structure(task.get("phrase_structure")),
}


def find(root: str | Path) -> Path:
    """The folder of PhraseCut's files: `root`, or the VGPhraseCut_v0 in it. InputError if there is none."""
    root = Path(root)
    folder = root if root.name == FOLDER else root / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"no PhraseCut data at '{folder}': make the mini world's with `clipseg-repro data build`, or "
            f"put the official {FOLDER} (downloader: ChenyunWu/PhraseCutDataset on GitHub) there"
        )
    return folder


def missing_parts(folder: Path) -> list[str]:
    """What is not there at all of data that should have been fetched; whether the rest is whole is asked by `check`."""
    parts = {
        " or ".join(IMAGE_TABLES): IMAGE_TABLES,
        "refer_<split>.json": ["refer_*.json"],
        "images/<image_id>.jpg": ["images/*.jpg"],
    }
    return [part for part, patterns in parts.items() if not any(list(folder.glob(p)) for p in patterns)]


def read_images(folder: Path, problems: Problems) -> dict[int, dict]:
    """image_id -> entry of the table of images (split, width, height), under either of its official names."""
    name = next((name for name in IMAGE_TABLES if (folder / name).exists()), IMAGE_TABLES[0])
    images = sift(read_json(folder / name, list, problems), IMAGE_RULES, problems, name, "image_id")
    return {image["image_id"]: image for image in images}


def read_tasks(folder: Path, split: str, problems: Problems) -> list[dict]:
    """The entries of refer_<split>.json. Their Polygons are checked by `used_tasks`, of those that are used."""
    name = f"refer_{split}.json"
    return sift(read_json(folder / name, list, problems), TASK_RULES, problems, name, "task_id")


def used_tasks(tasks: list[dict], split: str, images: dict[int, dict], problems: Problems) -> list[dict]:
    """The tasks that the released loader uses, by image id: those of the images that the table gives to this split.

    In place of `Polygons` they have `polygons`: those of all instances, (N, 2) float64 arrays of x, y.
    """
    name = f"refer_{split}.json"
    if images:  # else there is a worse problem
        unknown = [reprlib.repr(task["task_id"]) for task in tasks if task["image_id"] not in images]
        problems.add(f"{name}: task whose image has no sound entry in the table of images", *unknown)
    used = [t for t in tasks if images.get(t["image_id"], {}).get("split") == split]
    used = [t for t in used if t["image_id"] not in BAD_IMAGES]
    used.sort(key=lambda task: task["image_id"])  # stable: within an image as in the file
    drawable, lengths, numbers = [], [], array("d")  # of all polygons in one array, for numpy to check at once
    for task in used:
        try:
            own_lengths, own_numbers = _flatten(task.get("Polygons"))
        except (TypeError, OverflowError):  # no list where one is read, or an int beyond float64
            wrong = "Polygons that are empty, or no lists of instances of polygons of [x, y]"
            problems.add(f"{name}: {wrong}", reprlib.repr(task["task_id"]))
        else:
            drawable.append(task)
            lengths.append(own_lengths)
            numbers.extend(own_numbers)
    points = np.asarray(numbers).reshape(-1, 2)
    if drawable:
        sides = np.array([[max(image_size(images[task["image_id"]]))] for task in drawable])
        firsts = np.cumsum([0, *map(sum, lengths[:-1])])
        low, high = np.minimum.reduceat(points, firsts), np.maximum.reduceat(points, firsts)
        sound = ((low >= -sides) & (high <= 2 * sides)).all(1)  # NaN is neither
        wrong = "coordinates that are not finite, or farther outside than the image's longer side"
        problems.add(f"{name}: {wrong}", *(reprlib.repr(drawable[i]["task_id"]) for i in np.flatnonzero(~sound)))
    ends = np.cumsum([0, *chain.from_iterable(lengths)]).tolist()
    polygons = iter([points[first:end] for first, end in pairwise(ends)])
    kept = ("task_id", "image_id", "ann_ids", "phrase", "phrase_structure")
    return [
        {key: task.get(key) for key in kept} | {"polygons": list(islice(polygons, len(own)))}
        for task, own in zip(drawable, lengths, strict=True)
    ]


def _flatten(instances) -> tuple[list[int], array]:
    """(number of points of every polygon, their x and y in turn). TypeError, OverflowError where that cannot be."""
    polygons = list(chain.from_iterable(instances))
    points = list(chain.from_iterable(polygons))
    numbers = list(chain.from_iterable(points))
    lengths = list(map(len, polygons))
    if 0 in lengths or set(map(len, points)) != {2} or not {int, float}.issuperset(map(type, numbers)):
        raise TypeError
    return lengths, array("d", numbers)


def image_size(image: dict) -> tuple[int, int]:
    return image["height"], image["width"]


def read_names(folder: Path, images: Iterable[int], problems: Problems) -> dict[int, list[str]] | None:
    """image_id -> names of everything in it, from names.json; None where the data have none, as the official ones."""
    if not (folder / "names.json").exists():
        return None
    names = read_json(folder / "names.json", dict, problems)
    found = {i: names.get(str(i)) for i in images}
    bad = [str(i) for i, own in found.items() if not (isinstance(own, list) and all(map(is_text, own)))]
    problems.add("names.json: image without a list of names", *bad)
    return found


def check(root: str | Path) -> tuple[dict[str, tuple[int, int]], Problems]:
    """({split: (phrases, images)}, everything that is wrong with the data in `root`), pictures and checksums included.

    Of the official data all four splits are expected, with the official counts; of data that were built, what the build
    listed.
    """
    folder, problems = find(root), Problems()
    built = (folder / CHECKSUMS).exists()
    if built:
        problems.add("file that is missing, or not as it was built", *changed_files(folder, every=True))
    images = read_images(folder, problems)
    counts, sizes = {}, {}
    for split in SPLITS:
        if built and not (folder / f"refer_{split}.json").exists():
            continue
        before = len(problems)
        tasks = read_tasks(folder, split, problems)
        counts[split] = len(tasks), len({task["image_id"] for task in tasks})
        if not built and counts[split] not in COUNTS[split] and len(problems) == before:
            found, wanted = ("{} phrases on {} images".format(*pair) for pair in (counts[split], COUNTS[split][0]))
            problems.add(f"refer_{split}.json: not the official number of entries", f"{found}, official {wanted}")
        used = used_tasks(tasks, split, images, problems)
        sizes |= {folder / "images" / f"{t['image_id']}.jpg": image_size(images[t["image_id"]]) for t in used}
    read_names(folder, [int(path.stem) for path in sizes], problems)
    check_pictures(sizes, problems)
    return counts, problems
