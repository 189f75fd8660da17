"""Pascal Context (Mottaghi et al. 2014): VOC 2010's pictures with every pixel labelled, its 59 most frequent classes.

    VOCdevkit/VOC2010/
        JPEGImages/<name>.jpg
        ImageSets/SegmentationContext/{train,val}.txt
        SegmentationClassContext/<name>.png     0 none, 1 to 59 the classes
    or, in place of the last two,
        trainval_merged.json                    the `detail` annotations: masks as RLE, categories by their 459 numbers

Maps circulate in two orders of classes: alphabetical, as the converter writes them and as they are read here, and VOC's
classes first. `check` tells, where VOC's own maps are beside them.
"""

from collections import defaultdict
from functools import cached_property
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from clipseg_repro.datasets import voc
from clipseg_repro.datasets.checks import Problems, read_json, read_names
from clipseg_repro.datasets.class_masks import VOID, LabelMaps, read_labels
from clipseg_repro.datasets.coco import encoded
from clipseg_repro.errors import InputError

CLASSES = tuple(
    """
    aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair cloth
    computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain
    mouse person plate platform pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train tree
    truck tvmonitor wall water window wood
""".split()
)
# Numbers of the 59 among the 459 categories: those are in order of the alphabet too.
NUMBERS = tuple(
    map(
        int,
        """
    2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187 189 207 220 232 258
    259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420 424 427 440 445 454 458
""".split(),
    )
)
IN_VOC = {"table": "diningtable"}
SHARED = frozenset(CLASSES) & frozenset(voc.CLASSES) | frozenset(IN_VOC)


class PascalContext(LabelMaps):
    """A split, train (4,998 pictures) or val (5,105). root: the folder that holds `VOCdevkit`, or one in it."""

    title, classes, renamed = "Pascal Context", CLASSES, voc.RENAMED
    pictures, maps = "JPEGImages", "SegmentationClassContext"

    def __init__(self, root: str | Path, split: str = "val"):
        self.folder, self.split = voc.find(root, "VOC2010"), split
        detail = self.folder / "trainval_merged.json"
        if (self.folder / self.maps).is_dir():
            self._detail = None
            self.ids = read_names(self.folder / "ImageSets" / "SegmentationContext" / f"{split}.txt", self.title)
        elif detail.exists():
            self.ids, self._detail = read_detail(detail, split)
        else:
            raise InputError(
                f"no label maps '{self.folder / self.maps}' and no '{detail}': fetch either (data/README.md)"
            )

    @cached_property
    def lookup(self) -> np.ndarray:
        table = np.full(256, VOID, np.uint8)
        table[1 : 1 + len(CLASSES)] = np.arange(len(CLASSES))
        return table

    @cached_property
    def known(self) -> np.ndarray:
        return super().known | (np.arange(256) == 0)

    def annotation_files(self) -> list[Path]:
        return super().annotation_files() if self._detail is None else [self.folder / "trainval_merged.json"]

    def _stored(self, i: int) -> np.ndarray:
        return super()._stored(i) if self._detail is None else draw(*self._detail[self.ids[i]])

    def check(self) -> Problems:
        problems = super().check()
        same = {voc.CLASSES.index(IN_VOC.get(name, name)): c for c, name in enumerate(CLASSES) if name in SHARED}
        for i in range(len(self)):
            fault, known = read_labels(self.folder / "SegmentationClass" / f"{self.ids[i]}.png")
            shown = np.isin(known, list(same)) if fault is None else np.zeros(1, bool)
            if shown.any():
                expected = np.vectorize(same.get, otypes=[int])(known[shown])
                if (self.labels(i)[shown] == expected).mean() < 0.5:
                    problems.add("label map that contradicts VOC's own (classes in another order?)", self.ids[i])
        return problems


def read_detail(path: Path, split: str) -> tuple[list[str], dict[str, tuple]]:
    """(names of a split's pictures, {name: (height, width, annotations)}) of the `detail` annotations."""
    problems = Problems()
    content = read_json(path, dict, problems)
    problems.stop("Pascal Context", "fetch trainval_merged.json anew")
    annotations = defaultdict(list)
    for annotation in content["annos_segmentation"]:
        annotations[annotation["image_id"]].append(annotation)
    chosen = [image for image in content["images"] if image["phase"] == split]
    if not chosen:
        raise InputError(f"'{path}' has no split '{split}': choose train or val")
    found = {
        Path(image["file_name"]).stem: (image["height"], image["width"], annotations[image["image_id"]])
        for image in chosen
    }
    return sorted(found), found


def draw(height: int, width: int, annotations: list[dict]) -> np.ndarray:
    """The map of labels 0 (none of the 59) to 59: later annotations lie over earlier ones (`detail.getMask`)."""
    labels = np.zeros((height, width), np.uint8)
    places = {number: place for place, number in enumerate(NUMBERS, start=1)}
    for annotation in annotations:
        labels[rle.decode(encoded(annotation["segmentation"], height, width)) > 0] = places.get(
            annotation["category_id"], 0
        )
    return labels
