"""LVIS (Gupta et al. 2019), v1 and v0.5: COCO's pictures with masks of 1,203 (1,230) kinds of objects.

    LVIS/
        lvis_v1_{train,val}.json or lvis_v0.5_{train,val}.json      or in annotations/
    COCO/                                                           beside it, or the folders in LVIS/ itself
        images/{train,val}2017/<name>.jpg                           or {train,val}2017/

Annotations are not exhaustive: a kind that a picture has no mask of may be in it all the same.
"""

import re
from pathlib import Path

from clipseg_repro.datasets.coco import Instances
from clipseg_repro.errors import InputError

VERSIONS = ("v1", "v0.5")


class LVIS(Instances):
    """A split, val or train. root: the folder that holds the annotations, of v1 where both versions are there."""

    title = "LVIS"

    def __init__(self, root: str | Path, split: str = "val"):
        root, self.split = Path(root), split
        names = [f"{place}lvis_{v}_{split}.json" for v in VERSIONS for place in ("", "annotations/")]
        file = next((root / name for name in names if (root / name).exists()), None)
        if file is None:
            raise InputError(f"no annotations '{root / names[0]}': fetch them as data/README.md says")
        homes = [base / kind for base in (root, root.parent / "COCO") for kind in ("images", ".")]
        # Both splits: v1 divides COCO's pictures in another way.
        super().__init__(file, [home / folder for home in homes for folder in ("train2017", "val2017")])

    @property
    def prompts(self) -> list[str]:
        return [words(name) for name in self.classes]


def words(name: str) -> str:
    """A category's name as people say it: "shirt_(clothing)" is a shirt, "deck_chair" a deck chair."""
    return re.sub(r"_?\([^)]*\)", "", name).replace("_", " ").strip()
