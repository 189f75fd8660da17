"""Class masks in PhraseCut's place: a sample for every class of a picture, so that what trains on phrases, and measures
them, also takes COCO, LVIS and data of one's own."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from clipseg_repro.datasets.class_masks import ClassMasks
from clipseg_repro.datasets.phrasecut import Samples, View
from clipseg_repro.datasets.sample import Sample


class ClassPhrases(Samples):
    """classes: places in `data.classes` of those that become samples, all without them. A sample's phrase is the
    class's prompt, its mask all of the class in the picture. Fields as those of `PhraseCut`."""

    def __init__(self, data: ClassMasks, classes: Iterable[int] | None = None):
        self.data = data
        chosen = set(range(len(data.classes)) if classes is None else classes)
        self._pairs = [(i, c) for i, areas in enumerate(data.shown) for c in areas if c in chosen]
        names = [data.prompts[c] for _, c in self._pairs]
        structures = [{"name": name, "attributes": [], "relation_descriptions": []} for name in names]
        super().__init__(names, structures, [i for i, _ in self._pairs], data.title)
        self._image = lru_cache(1)(data.image)

    def __getitem__(self, i: int) -> Sample:
        return self.data.sample(*self._pairs[i])

    def picture(self, view: View) -> np.ndarray:
        return self._image(self._pairs[view.sample][0])[view.window]

    def mask(self, view: View) -> np.ndarray:
        return (self.data.mask(*self._pairs[view.sample]) == 1).astype(np.uint8)[view.window]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.data.fingerprint()} {self._pairs}".encode()).hexdigest()

    def check_pictures(self):
        self.data.check_pictures()
