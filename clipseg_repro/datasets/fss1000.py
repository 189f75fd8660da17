"""FSS-1000 (Li et al. 2020): a thousand classes, ten pictures of each, one object in a picture.

    FSS-1000/
        <class>/{1..10}.jpg, <class>/{1..10}.png
        or <class>/image/{1..10}.jpg, <class>/label/{1..10}.png
        splits/{trn,val,test}.txt                   the published lists of 520, 240 and 240 classes

Masks circulate as RGB of 0 and 1 (the authors'), of 0 and 255, and with smooth edges: the object is what is lighter
than half of the lightest. A threshold at 128, as elsewhere, finds nothing in the first.
"""

from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from clipseg_repro.datasets.checks import Problems, read_names
from clipseg_repro.datasets.class_masks import ClassMasks
from clipseg_repro.errors import InputError
from clipseg_repro.pictures import load_image

NESTED = ("image", "label")


class FSS1000(ClassMasks):
    """The classes of a split's list; `split` None takes every folder that is there. root: the folder of the classes."""

    title = "FSS-1000"

    def __init__(self, root: str | Path, split: str | None = "test"):
        self.folder, self.split = Path(root), split
        there = (
            sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name != "splits")
            if self.folder.is_dir()
            else []
        )
        names = there if split is None else read_names(self.folder / "splits" / f"{split}.txt", self.title)
        if lost := sorted(set(names) - set(there)):
            raise InputError(
                f"{self.title} in '{self.folder}' lacks {len(lost)} of the {len(names)} classes of '{split}': "
                f"{', '.join(lost[:5])}: fetch it anew (data/README.md)"
            )
        self.classes = sorted(names)
        self._files = [path for name in self.classes for path in self._pictures(self.folder / name)]
        if not self._files:
            raise InputError(f"no class of {self.title} in '{self.folder}': fetch it as data/README.md says")
        self.ids = [f"{self._class_name(path)}/{path.stem}" for path in self._files]

    @property
    def prompts(self) -> list[str]:
        return [name.replace("_", " ") for name in self.classes]

    @staticmethod
    def _pictures(folder: Path) -> list[Path]:
        inner = folder / NESTED[0] if (folder / NESTED[0]).is_dir() else folder
        return sorted(inner.glob("*.jpg"), key=lambda path: (len(path.stem), path.stem))

    def _class_name(self, path: Path) -> str:
        return path.relative_to(self.folder).parts[0]

    def picture_path(self, i: int) -> Path:
        return self._files[i]

    def mask_path(self, i: int) -> Path:
        path = self._files[i]
        folder = path.parent.with_name(NESTED[1]) if path.parent.name == NESTED[0] else path.parent
        return folder / f"{path.stem}.png"

    def annotation_files(self) -> list[Path]:
        return [self.mask_path(i) for i in range(len(self))]

    def image(self, i: int) -> np.ndarray:
        return load_image(self.picture_path(i))

    def areas(self, i: int) -> dict[int, int]:
        c = self.classes.index(self._class_name(self._files[i]))
        return {c: int(self.mask(i, c).sum())}

    def mask(self, i: int, c: int) -> np.ndarray:
        colours = load_image(self.mask_path(i)).astype(np.uint16).sum(-1)
        if colours.shape != self.image(i).shape[:2] or not colours.any():
            wrong = "is empty" if not colours.any() else "is not of its picture's size"
            raise InputError(f"mask '{self.mask_path(i)}' {wrong}: fetch {self.title} anew")
        own = self.classes[c] == self._class_name(self._files[i])
        return (own & (2 * colours > colours.max())).astype(np.uint8)

    def check(self) -> Problems:
        problems = Problems()
        for i in tqdm(range(len(self)), f"{self.title}: pictures", unit="picture", mininterval=1):
            try:
                (area,) = self.areas(i).values()
            except InputError as error:
                problems.add("picture or mask that cannot be used", str(error))
                continue
            if area == self.image(i)[..., 0].size:
                problems.add("mask that fills the picture", self.ids[i])
        return problems
