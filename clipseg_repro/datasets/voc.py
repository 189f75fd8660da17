"""Pascal VOC 2012 (Everingham et al. 2010), with SBD's extra annotations (Hariharan et al. 2011) where they are there.

    VOCdevkit/VOC2012/
        ImageSets/Segmentation/{train,val,trainval}.txt     one name per line
        JPEGImages/<name>.jpg
        SegmentationClass/<name>.png                        palette: 0 background, 1 to 20 classes, 255 their borders
        SegmentationClassAug/<name>.png                     VOC's and SBD's, as few-shot work has them (no borders)

With SBD the lists are `trainaug.txt`, as its users write it, or HSNet's.
"""

from pathlib import Path
from types import MappingProxyType

import numpy as np

from clipseg_repro.datasets.checks import read_names
from clipseg_repro.datasets.class_masks import VOID, LabelMaps
from clipseg_repro.errors import InputError

CLASSES = tuple(
    """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
""".split()
)
# Official names that are no words of people. The released code asks for Table 4 and 7 with the names as they are.
RENAMED = MappingProxyType({"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"})


class VOC(LabelMaps):
    """A split of VOC 2012: val has 1,449 pictures, train 1,464. root: the folder that holds `VOCdevkit`, or one in it.

    sbd: take SBD's maps where the devkit has them. background: whether it is a class, the first; else it is VOID, as
    open-vocabulary work has it (VOC-20). Raises InputError if the folder or the split's list is not there.
    """

    title, renamed = "Pascal VOC 2012", RENAMED
    pictures = "JPEGImages"

    def __init__(self, root: str | Path, split: str = "val", sbd: bool = False, background: bool = True):
        self.classes = CLASSES[not background :]
        self.lookup = np.append(np.arange(255) - (not background), VOID).astype(np.uint8)  # 0 may become 255
        self.known = np.isin(np.arange(256), [*range(len(CLASSES)), VOID])
        self.folder, self.split = find(root, "VOC2012"), split
        self.maps = "SegmentationClassAug" if sbd else "SegmentationClass"
        self.ids = read_names(self.folder / "ImageSets" / "Segmentation" / f"{split}.txt", self.title)


def find(root: str | Path, year: str) -> Path:
    """The folder of a year of VOC, `root` being that or the one that it is in."""
    root = Path(root)
    for folder in (root, root / year, root / "VOCdevkit" / year):
        if folder.name == year and folder.is_dir():
            return folder
    raise InputError(
        f"no {year} at '{root}': fetch the devkit (see data/README.md) and put it there as VOCdevkit/{year}"
    )
