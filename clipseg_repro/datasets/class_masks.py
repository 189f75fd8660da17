"""What the readers of masks by class share: they differ in where things are and what the classes are called."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from clipseg_repro.datasets.checks import FORMATS, Problems, check_pictures, read_picture
from clipseg_repro.datasets.sample import Sample
from clipseg_repro.errors import InputError

VOID = 255  # in masks and label maps: left out of every metric


class ClassMasks(ABC):
    """One split of a data set. Picture i has a mask for each class that it shows.

    title: what messages call the data. classes: the official names, in the official order. prompts: the words that ask
    for each. ids: a name for each picture, unique in the split.
    """

    title: str
    classes: Sequence[str]
    renamed: Mapping[str, str] = MappingProxyType({})  # official names that are no words
    ids: list

    @property
    def phrases(self) -> list[str]:
        """What `measure` knows a data set by: the prompts."""
        return self.prompts

    @property
    def prompts(self) -> list[str]:
        return [self.renamed.get(name, name) for name in self.classes]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def picture_path(self, i: int) -> Path:
        """The file of picture i."""

    @abstractmethod
    def annotation_files(self) -> list[Path]:
        """The files that hold the masks of this split."""

    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of the annotations: another split or version is another."""
        files = "".join(f"{path.name} {path.stat().st_size}\n" for path in self.annotation_files() if path.exists())
        return hashlib.sha256(f"{self.ids} {files}".encode()).hexdigest()

    def check_pictures(self):
        """One InputError for all pictures that are missing; `check` reads them too."""
        problems = Problems()
        lost = [path for path in map(self.picture_path, range(len(self))) if not path.is_file()]
        problems.add("missing picture", *(path.name for path in lost))
        problems.stop(self.title, "fetch the pictures (data/README.md)")

    @abstractmethod
    def image(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, EXIF rotation not applied: so are the annotations."""

    @abstractmethod
    def areas(self, i: int) -> dict[int, int]:
        """The classes that picture i shows, in order, and how many pixels each."""

    @abstractmethod
    def mask(self, i: int, c: int) -> np.ndarray:
        """(H, W) uint8: 1 where picture i shows class c, VOID where nobody knows, 0 elsewhere."""

    def sample(self, i: int, c: int) -> Sample:
        return Sample(self.image(i), self.mask(i, c), self.prompts[c], i, info={"id": self.ids[i], "class": c})

    @abstractmethod
    def check(self) -> Problems:
        """Everything that is wrong with the files of this split, pictures decoded."""

    @cached_property
    def shown(self) -> list[dict[int, int]]:
        """`areas` of every picture: one pass over all annotations."""
        return [self.areas(i) for i in tqdm(range(len(self)), f"{self.title}: classes", unit="picture", mininterval=1)]


class LabelMaps(ClassMasks):
    """Data whose every picture has a map of labels: a PNG of one byte per pixel (palette or grey).

    folder: of the data. pictures, maps: folders below it. lookup: (256,) uint8, stored label -> place in `classes`,
    VOID for none; labels that are not `known` are refused.
    """

    folder: Path
    pictures: str
    maps: str
    lookup = np.arange(256, dtype=np.uint8)

    def picture_path(self, i: int) -> Path:
        return self.folder / self.pictures / f"{self.ids[i]}.jpg"

    def map_path(self, i: int) -> Path:
        return self.folder / self.maps / f"{self.ids[i]}.png"

    def annotation_files(self) -> list[Path]:
        return [self.map_path(i) for i in range(len(self))]

    @cached_property
    def known(self) -> np.ndarray:
        """(256,) bool: the labels that may be stored. VOID may always."""
        return (self.lookup < len(self.classes)) | (np.arange(256) == VOID)

    def image(self, i: int) -> np.ndarray:
        return read_picture(self.picture_path(i), self.labels(i).shape)

    def labels(self, i: int) -> np.ndarray:
        """(H, W) uint8: the place in `classes` of what each pixel shows, VOID for none of them."""
        return self.lookup[self._stored(i)]

    def areas(self, i: int) -> dict[int, int]:
        counts = np.bincount(self.labels(i).ravel(), minlength=256)[: len(self.classes)]
        return {int(c): int(counts[c]) for c in np.flatnonzero(counts)}

    def mask(self, i: int, c: int) -> np.ndarray:
        labels = self.labels(i)
        return np.where(labels == VOID, VOID, labels == c).astype(np.uint8)

    def _stored(self, i: int) -> np.ndarray:
        path = self.map_path(i)
        fault, labels = read_labels(path)
        if fault is None and not self.known[labels].all():
            strange = np.unique(labels[~self.known[labels]])
            fault = f"labels {', '.join(map(str, strange[:5]))} are none of the {len(self.classes)} classes'"
        if fault:
            raise InputError(f"label map '{path}': {fault}. Fetch it anew, as the authors of {self.title} ship it")
        return labels

    def check(self) -> Problems:
        problems, sizes = Problems(), {}
        for i in tqdm(range(len(self)), f"{self.title}: label maps", unit="map", mininterval=1):
            try:
                labels = self._stored(i)
            except InputError as error:
                problems.add("label map that cannot be used", str(error))
                continue
            sizes[self.picture_path(i)] = labels.shape
            if (self.lookup[labels] == VOID).all():
                problems.add("label map without any class", self.map_path(i).name)
        check_pictures(sizes, problems)
        return problems


def read_labels(path: Path) -> tuple[str | None, np.ndarray | None]:
    """(what is wrong, or None; (H, W) uint8 labels) of a PNG of one byte per pixel."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.mode not in ("P", "L"):
                return f"its pixels are {picture.mode}, not labels of one byte (a palette saved as colours?)", None
            if picture.format != "PNG":
                return f"a {picture.format} picture, which does not keep labels: PNG does", None
            return None, np.asarray(picture)
    except FileNotFoundError:
        return "missing", None
    except Exception as error:  # of any type, on damaged files
        return f"unreadable ({error})", None
