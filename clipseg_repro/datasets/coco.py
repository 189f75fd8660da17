"""COCO's instances (Lin et al. 2014), of 2014 or 2017, as masks by class.

    COCO/
        annotations/instances_{train,val}{2014,2017}.json
        images/{train,val}{2014,2017}/<file_name>       or {train,val}{2014,2017}/<file_name>

Pictures without annotation are kept: they show none of the classes. Crowds (RLE) are VOID, as in COCO's own evaluation.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from pycocotools import mask as rle

from clipseg_repro.datasets.checks import (
    Problems,
    check_pictures,
    is_number,
    is_size,
    is_text,
    read_json,
    read_picture,
    sift,
)
from clipseg_repro.datasets.class_masks import VOID, ClassMasks
from clipseg_repro.errors import InputError

_NAMES = (  # of the numbers 1 to 90, "" where COCO uses none
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "", "backpack", "umbrella", "", "", "handbag", "tie", "suitcase"),
    *("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard"),
    *("surfboard", "tennis racket", "bottle", "", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana"),
    *("apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "", "dining table", "", "", "toilet", "", "tv", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "", "book", "clock", "vase", "scissors"),
    *("teddy bear", "hair drier", "toothbrush"),
)
THINGS = {number: name for number, name in enumerate(_NAMES, start=1) if name}  # 80, by COCO's number

IMAGE_RULES = {
    "entry that is no object": lambda image: isinstance(image, dict),
    "id that is no whole number": lambda image: is_number(image.get("id")),
    "image without file_name and coco_url": lambda image: bool(file_name(image)),
    "image of an impossible size": lambda image: is_size(image.get("width"), image.get("height")),
}
CATEGORY_RULES = {
    "entry that is no object": lambda category: isinstance(category, dict),
    "id that is no whole number": lambda category: is_number(category.get("id")),
    "category without a name": lambda category: is_text(category.get("name")),
}
ANNOTATION_RULES = {
    "entry that is no object": lambda annotation: isinstance(annotation, dict),
    "id that is no whole number": lambda annotation: is_number(annotation.get("id")),
    "segmentation that is neither polygons nor RLE": lambda annotation: _is_segmentation(
        annotation.get("segmentation")
    ),
}


def _is_segmentation(value) -> bool:
    polygons = isinstance(value, list) and all(isinstance(part, list) for part in value)
    return polygons or (isinstance(value, dict) and {"size", "counts"} <= set(value))


def file_name(image: dict) -> str:
    """Of a picture: LVIS v1 gives its address in place of the name."""
    return PurePosixPath(image.get("file_name") or image.get("coco_url") or "").name


class Instances(ClassMasks):
    """The pictures and categories of one annotation file in COCO's form; see `COCO` and `lvis.LVIS`.

    file: the JSON. pictures: folders that hold the pictures, tried in this order; a picture is looked for under its
    name and without the prefix of 2014 (`COCO_val2014_`). Raises one InputError for all faults of the annotations.
    """

    remedy = "fetch the annotations anew (data/README.md)"

    def __init__(self, file: Path, pictures: list[Path]):
        problems = Problems()
        content = read_json(file, dict, problems)
        images, categories, annotations = (
            sift(content.get(part, []), rules, problems, f"{file.name}: {part}", "id")
            for part, rules in (
                ("images", IMAGE_RULES),
                ("categories", CATEGORY_RULES),
                ("annotations", ANNOTATION_RULES),
            )
        )
        categories = sorted(categories, key=lambda category: category["id"])
        place = {category["id"]: c for c, category in enumerate(categories)}
        self.classes = [category["name"] for category in categories]
        self.file, self.pictures = file, pictures
        self._images = sorted(images, key=lambda image: image["id"])
        self.ids = [image["id"] for image in self._images]
        known = set(self.ids)
        lost = [a["id"] for a in annotations if a.get("image_id") not in known or a.get("category_id") not in place]
        problems.add(f"{file.name}: annotation whose image or category has no sound entry", *map(str, lost))
        problems.stop(self.title, self.remedy)
        self._annotations = defaultdict(lambda: defaultdict(list))
        for annotation in annotations:
            self._annotations[annotation["image_id"]][place[annotation["category_id"]]].append(annotation)

    def picture_path(self, i: int) -> Path:
        name = file_name(self._images[i])
        candidates = [folder / n for folder in self.pictures for n in dict.fromkeys((name, name.split("_")[-1]))]
        return next((path for path in candidates if path.exists()), candidates[0])

    def annotation_files(self) -> list[Path]:
        return [self.file]

    def _size(self, i: int) -> tuple[int, int]:
        return self._images[i]["height"], self._images[i]["width"]

    def image(self, i: int) -> np.ndarray:
        return read_picture(self.picture_path(i), self._size(i))

    def labelled(self, i: int) -> set[int]:
        """The classes that picture i has annotations of."""
        return set(self._annotations.get(self.ids[i], {}))

    def areas(self, i: int) -> dict[int, int]:
        found = {c: int((self.mask(i, c) == 1).sum()) for c in sorted(self.labelled(i))}
        return {c: area for c, area in found.items() if area}

    def mask(self, i: int, c: int) -> np.ndarray:
        mask = np.zeros(self._size(i), np.uint8)
        annotations = self._annotations.get(self.ids[i], {}).get(c, [])
        for annotation in sorted(annotations, key=lambda a: -a.get("iscrowd", 0)):  # what is known lies over a crowd
            segmentation = encoded(annotation["segmentation"], *mask.shape)
            mask[rle.decode(segmentation) > 0] = VOID if annotation.get("iscrowd", 0) else 1
        return mask

    def check(self) -> Problems:
        problems = Problems()
        for i in range(len(self)):
            for c, annotations in self._annotations.get(self.ids[i], {}).items():
                if not self.mask(i, c).any():
                    problems.add("mask that comes out empty", *(f"annotation {a['id']}" for a in annotations))
        check_pictures({self.picture_path(i): self._size(i) for i in range(len(self))}, problems)
        return problems


class COCO(Instances):
    """A split (val2017, val2014, train2014 ...). root: the folder that holds `annotations`."""

    title = "COCO"

    def __init__(self, root: str | Path, split: str = "val2014"):
        self.split = split
        super().__init__(Path(root) / "annotations" / f"instances_{split}.json", [pictures_of(Path(root), split)])


def pictures_of(root: Path, split: str) -> Path:
    """The folder of a split's pictures. InputError if it is neither at `images/` nor at `root`."""
    found = next((folder for folder in (root / "images" / split, root / split) if folder.is_dir()), None)
    if found is None:
        raise InputError(f"no pictures of COCO in '{root / 'images' / split}': fetch {split}.zip and unpack it there")
    return found


def encoded(segmentation, height: int, width: int) -> dict:
    """An annotation's polygons or RLE, in either form, as compressed RLE. Polygons of one or two points are empty."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6] or [[0.0] * 6]
        return rle.merge(rle.frPyObjects(polygons, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation
