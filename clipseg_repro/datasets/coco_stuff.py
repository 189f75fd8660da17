"""COCO-Stuff (Caesar et al. 2018), the 164k version: COCO 2017's pictures with every pixel labelled, things and stuff.

    COCO/
        images/{train,val}2017/<name>.jpg               or {train,val}2017/<name>.jpg
        stuffthingmaps/{train,val}2017/<name>.png       grey: the class's number minus 1; 255 none

Of the 91 numbers of things COCO uses 80, and there are 91 sorts of stuff: 171 classes.
"""

from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

from clipseg_repro.datasets.class_masks import VOID, LabelMaps
from clipseg_repro.datasets.coco import THINGS, pictures_of
from clipseg_repro.errors import InputError

STUFF = tuple(
    """
    banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other ceiling-tile cloth
    clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble floor-other floor-stone
    floor-tile floor-wood flower fog food-other fruit furniture-other grass gravel ground-other hill house leaves
    light mat metal mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform
    playingfield railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow solid-other
    stairs stone straw structural-other table tent textile-other towel tree vegetable wall-brick wall-concrete
    wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops window-blind window-other wood
""".split()
)
FIRST_STUFF = 92  # number of "banner"
ODD = {"playingfield": "playing field", "waterdrops": "water drops", "structural-other": "structure"}
ODD |= {"window-blind": "window blind"}


def words(name: str) -> str:
    """A sort of stuff as people say it: "wall-brick" is a brick wall, "sky-other" the sky, "door-stuff" a door."""
    thing, _, kind = name.partition("-")
    return ODD.get(name) or (thing if kind in ("", "other", "stuff") else f"{kind} {thing}")


class COCOStuff(LabelMaps):
    """A split, val2017 (5,000 pictures) or train2017 (118,287). root: the folder that holds `stuffthingmaps`."""

    title = "COCO-Stuff 164k"
    classes = (*THINGS.values(), *STUFF)
    renamed = MappingProxyType({name: words(name) for name in STUFF})

    def __init__(self, root: str | Path, split: str = "val2017"):
        self.folder, self.split = Path(root), split
        self.maps = f"stuffthingmaps/{split}"
        self.ids = sorted(path.stem for path in (self.folder / self.maps).glob("*.png"))
        if not self.ids:
            raise InputError(
                f"no label maps in '{self.folder / self.maps}': fetch stuffthingmaps_trainval2017.zip (data/README.md) "
                "and unpack it in stuffthingmaps/"
            )
        self.pictures = pictures_of(self.folder, split).relative_to(self.folder).as_posix()

    @cached_property
    def lookup(self) -> np.ndarray:
        table = np.full(256, VOID, np.uint8)
        numbers = [*THINGS, *range(FIRST_STUFF, FIRST_STUFF + len(STUFF))]
        table[np.array(numbers) - 1] = np.arange(len(numbers))
        return table
