"""PhraseCut (Wu et al., CVPR 2020) and PhraseCut+ (the paper, section 4), from the layout of `VGPhraseCut_v0`.

    VGPhraseCut_v0/images/<image_id>.jpg, image_data_split3000.json, refer_{train,val,test,miniv}.json

The table of images may also be called image_data_split.json, as the official script writes it.

The official data and the mini world's are read by the same code. Annotations are checked as they are read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from skimage.draw import polygon2mask

from clipseg_repro.datasets import phrasecut_files
from clipseg_repro.datasets.checks import Problems, check_pictures, read_picture
from clipseg_repro.datasets.phrasecut_files import REMEDY, SPLITS
from clipseg_repro.datasets.sample import Sample
from clipseg_repro.errors import InputError
from clipseg_repro.files import fingerprint
from clipseg_repro.prompts import DEFAULT_RECIPE, TRAIN_TEMPLATES, VisualPrompt

# Words that would show the decoder the prompts of Table 8 (released loader).
PROPERTY_WORDS = frozenset(
    {"drink", "drinks", "drinking", "sit", "sits", "sitting", "ride", "rides", "riding", "fly", "flies", "flying"}
    | {"drive", "drives", "driving", "driven", "swim", "swims", "swimming", "wheel", "wheels", "leg", "legs"}
    | {"ear", "ears"}
)
CROP_TRIES, CROP_SHARE = 50, 0.05


def mentions_property(phrase: str) -> bool:
    """Whether a phrase has one of the words of Table 8's prompts; for `PhraseCutPlus(remove=...)`."""
    return not PROPERTY_WORDS.isdisjoint(phrase.split(" "))


def rasterise(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Union of polygons as an (H, W) uint8 mask of 0 and 1. Polygons are (N, 2) arrays of x, y in pixels.

    A pixel belongs to a polygon that holds or touches its integer coordinates: `skimage.draw.polygon2mask`, as in the
    released loader. Outlines that follow the pixel grid (every edge of 0, 45 or 90 degrees between pixels) are drawn by
    OpenCV, sixty times faster. It differs only on lines that the outline passes twice, which scikit-image leaves out.
    """
    mask = np.zeros(shape, np.uint8)
    for polygon in polygons:
        edges = np.abs(polygon - np.roll(polygon, 1, axis=0))
        if (edges.min(1) * (edges[:, 0] - edges[:, 1]) == 0).all() and (polygon % 1 == 0).all():
            cv2.fillPoly(mask, [polygon.astype(np.int32)], 1)
        else:
            mask |= polygon2mask(shape, polygon[:, ::-1]).astype(np.uint8)
    return mask


@dataclass(frozen=True)
class View:
    """A window (rows, columns) of the picture that sample `sample` of a `PhraseCut` is about."""

    sample: int
    window: tuple[slice, slice]


class Samples(ABC):
    """Pictures of which phrases mean a part: what training and the protocols of phrases ask of data.

    phrases: the phrase of every sample. structures: its `phrase_structure`. by_phrase: phrase -> indices of its
    samples. by_image: image id -> indices of its samples. supported: indices of the samples whose phrase is not unique,
    the ones the paper tests image prompts on.
    """

    def __init__(self, phrases: list[str], structures: list[dict], image_ids: list[int], title: str):
        if not phrases:
            raise InputError(f"no phrase is left in {title}: use more data, or leave out fewer phrases")
        self.phrases, self.structures, self._image_ids = phrases, structures, image_ids
        self.by_phrase: dict[str, list[int]] = {}
        self.by_image: dict[int, list[int]] = {}
        for i, (phrase, image_id) in enumerate(zip(phrases, image_ids, strict=True)):
            self.by_phrase.setdefault(phrase, []).append(i)
            self.by_image.setdefault(image_id, []).append(i)
        self.supported = [i for i, phrase in enumerate(phrases) if len(self.by_phrase[phrase]) > 1]

    def __len__(self) -> int:
        return len(self.phrases)

    @abstractmethod
    def __getitem__(self, i: int) -> Sample:
        """Sample i: the whole image and all that the phrase means."""

    @abstractmethod
    def picture(self, view: View) -> np.ndarray:
        """What `view` shows, (H, W, 3) uint8."""

    @abstractmethod
    def mask(self, view: View) -> np.ndarray:
        """The objects of the view's sample in its window, (H, W) uint8 of 0 and 1."""

    @abstractmethod
    def fingerprint(self) -> str | None:
        """Of the annotations: the same for the same data."""

    @abstractmethod
    def check_pictures(self):
        """One InputError for all pictures that are missing, no pictures or of another size."""

    def image_id(self, i: int) -> int:
        """Of the image that sample i is about."""
        return self._image_ids[i]

    def visual_support(self, i: int, rng: np.random.Generator) -> Sample | None:
        """Another sample of the same phrase, drawn uniformly; None if the phrase is unique."""
        others = [j for j in self.by_phrase[self.phrases[i]] if j != i]
        return self[others[rng.integers(len(others))]] if others else None

    def may_show(self, image_id: int, name: str) -> bool:
        """Whether something in an image goes by `name`, or by a longer name that ends in it ("car": "race car"), as far
        as the phrases about the image say."""
        return any(n == name or n.endswith(f" {name}") for n in self._names(image_id))

    def _names(self, image_id: int) -> list[str]:
        said = [self.structures[j] for j in self.by_image[image_id]]
        return [s["name"] for s in said] + [other for s in said for _, other in s["relation_descriptions"]]

    def things(self, image_id: int) -> dict[str, np.ndarray]:
        """What an image shows, by name, in order of name: {name: (H, W) bool mask}.

        A name's mask is the union of its phrases' masks. Two names with the same pixels are two words for one thing
        (half of the smaller mask lies in the larger), which CLIP cannot be asked to tell apart: the first stands for
        both.
        """
        masks = {}
        for i in self.by_image[image_id]:
            name = self.structures[i]["name"]
            masks[name] = masks.get(name, False) | (self[i].mask == 1)
        things = {}
        for name in sorted(name for name, mask in masks.items() if mask.any()):
            mask = masks[name]
            same = (n for n, m in things.items() if (m & mask).sum() > min(m.sum(), mask.sum()) / 2)
            first = next(same, name)
            things[first] = things.get(first, False) | mask
        return things


class PhraseCut(Samples):
    """One split of PhraseCut: item i is the `Sample` of one phrase, the whole image with the union of its polygons.

    root: the folder that holds `VGPhraseCut_v0`, or that folder. Samples are in order of image id, then as in the file.
    Raises one InputError that names everything wrong with the annotations, and one for an unknown split.
    """

    def __init__(self, root: str | Path, split: str):
        if split not in SPLITS:
            raise InputError(f"unknown PhraseCut split '{split}': choose one of {', '.join(SPLITS)}")
        self.split = split
        self.folder, problems = phrasecut_files.find(root), Problems()
        images = phrasecut_files.read_images(self.folder, problems)
        tasks = phrasecut_files.read_tasks(self.folder, split, problems)
        self._tasks = tasks = phrasecut_files.used_tasks(tasks, split, images, problems)
        self._sizes = {t["image_id"]: phrasecut_files.image_size(images[t["image_id"]]) for t in tasks}
        names = phrasecut_files.read_names(self.folder, self._sizes, problems)
        problems.stop(f"PhraseCut in '{self.folder}'", REMEDY)
        phrases, structures = ([task[key] for task in tasks] for key in ("phrase", "phrase_structure"))
        title = f"split '{split}' of '{self.folder}'"
        super().__init__(phrases, structures, [task["image_id"] for task in tasks], title)
        self._known_names = names
        self._last = None, None  # image id and image: the phrases about an image are asked for together

    def __getitem__(self, i: int) -> Sample:
        task = self._tasks[i]
        image_id = task["image_id"]
        info = {key: task[key] for key in ("task_id", "ann_ids", "phrase_structure")}
        return Sample(self._image(image_id), self._mask(i), self.phrases[i], image_id, info=info)

    def picture(self, view: View) -> np.ndarray:
        return self._image(self.image_id(view.sample))[view.window]

    def mask(self, view: View) -> np.ndarray:
        return self._mask(view.sample)[view.window]

    def fingerprint(self) -> str | None:
        return fingerprint(self.folder)

    def check_pictures(self):
        problems, images = Problems(), self.folder / "images"
        check_pictures({images / f"{i}.jpg": size for i, size in self._sizes.items()}, problems, decode=False)
        problems.stop(f"PhraseCut in '{self.folder}'", REMEDY)

    def _names(self, image_id: int) -> list[str]:  # the mini world's data say what is there, said or not
        return super()._names(image_id) if self._known_names is None else self._known_names[image_id]

    def _mask(self, i: int) -> np.ndarray:
        task = self._tasks[i]
        return rasterise(task["polygons"], self._sizes[task["image_id"]])

    def _image(self, image_id: int) -> np.ndarray:
        last = self._last
        if last[0] != image_id:
            last = self._last = image_id, self._read_image(image_id)
        return last[1]  # not self._last[1], which another thread may have replaced

    def _read_image(self, image_id: int) -> np.ndarray:
        try:  # as stored, EXIF rotation not applied: so are the polygons
            return read_picture(self.folder / "images" / f"{image_id}.jpg", self._sizes[image_id])
        except InputError as error:
            raise InputError(f"{error}: {REMEDY}") from None


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One draw of PhraseCut+: condition = text_weight * text + (1 - text_weight) * support.

    mask: what is right in `view`, (S, S) uint8 of 0 and 1 (of any shape without cropping); all 0 for a negative and for
    an object that the crop leaves out. text: the phrase in its template. supported: the view that is the example; None
    if the phrase is unique, text_weight is 1 then. recipe: how the example is shown.
    """

    dataset: PhraseCut
    view: View
    mask: np.ndarray
    phrase: str
    text: str
    supported: View | None
    text_weight: float
    recipe: str = DEFAULT_RECIPE

    @property
    def image(self) -> np.ndarray:
        """The query (S, S, 3) uint8, read when it is asked for."""
        return self.dataset.picture(self.view)

    @property
    def support(self) -> VisualPrompt | None:
        """The example, read when it is asked for."""
        view = self.supported
        return view and VisualPrompt(self.dataset.picture(view), self.dataset.mask(view) > 0, self.recipe)


class PhraseCutPlus:
    """The training view of a PhraseCut split (paper, section 4): PC+, or PC with `negative=0, visual=False`.

    Item (epoch, i) is a list of `phrases_per_image` draws on one crop: sample i (the crop is drawn around its object),
    then samples of the same image at random. It depends on nothing but seed, epoch and i, so a training run resumes
    exactly. Each draw replaces the phrase by another with probability `negative` (the mask is empty then), puts
    the phrase into a template, and draws a support among the samples of the phrase, as released the query itself
    included, with a crop of its own. `crop_once`: every image has one crop, around all its objects, and every support
    one, whatever seed and epoch, so that what a frozen backbone makes of them can be kept. text_weight: range of the
    uniform text weight; (0, 1) in the paper, (0, 0.5) in the released experiment files; (0, 0) leaves out the samples
    and the negatives whose phrase no other sample has (`only_visual` in the released code). remove: neither samples nor
    negatives have a phrase for which it is true (`datasets.held_out`); crops are drawn as if they had.
    """

    def __init__(
        self,
        dataset: PhraseCut,
        negative: float = 0.2,
        text_weight: tuple[float, float] = (0.0, 1.0),
        templates: Sequence[str] = TRAIN_TEMPLATES,
        crop: bool = True,
        visual: bool = True,
        phrases_per_image: int = 1,
        crop_once: bool = False,
        recipe: str = DEFAULT_RECIPE,
        remove: Callable[[str], bool] | None = None,
        seed: int = 0,
    ):
        low, high = text_weight
        if not 0 <= negative <= 1:
            raise InputError(f"negative = {negative}: a probability is in [0, 1]")
        if not 0 <= low <= high <= 1:
            raise InputError(f"text_weight = ({low}, {high}): give 0 <= low <= high <= 1")
        self.dataset, self.negative, self.text_weight = dataset, negative, (low, high)
        self.templates, self.crop, self.visual, self.seed = tuple(templates), crop, visual, seed
        self.phrases_per_image, self.crop_once, self.recipe = phrases_per_image, crop_once, recipe
        least = 2 if visual and high == 0 else 1
        left = {p: samples for p, samples in dataset.by_phrase.items() if not (remove and remove(p))}
        self._phrases = sorted(p for p, samples in left.items() if len(samples) >= least)
        needed = 2 if negative else 1  # a negative's phrase is another one
        if len(self._phrases) < needed:
            shared = " that two samples share" if least == 2 else ""
            remedy = "use more data, or negative=0" if self._phrases else "use more data"
            raise InputError(f"the data have {len(self._phrases)} phrase(s){shared}, {needed} needed: {remedy}")
        kept = {i for phrase in self._phrases for i in dataset.by_phrase[phrase]}
        self._samples = sorted(kept)
        self._by_image = {image: [i for i in own if i in kept] for image, own in dataset.by_image.items()}

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, n: int) -> tuple[int, int]:
        """(epoch, i) of the n-th draw of a training run: every epoch visits all samples in an order of its own."""
        epoch, place = divmod(n, len(self))
        if getattr(self, "_order", (None,))[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return epoch, self._samples[self._order[1][place]]

    def __getitem__(self, key: tuple[int, int]) -> list[TrainingSample]:
        epoch, i = key
        rng = np.random.default_rng([self.seed, epoch, i])
        own = self._by_image[self.dataset.image_id(i)]
        window = self._window(self.dataset.by_image[self.dataset.image_id(i)] if self.crop_once else [i], rng)
        more = rng.choice(own, self.phrases_per_image - 1)
        return [self._draw(View(int(j), window), rng) for j in (i, *more)]

    def _window(self, around: list[int], rng: np.random.Generator) -> tuple[slice, slice]:
        """Of a crop around the objects of some samples of one image."""
        if not self.crop:
            return slice(None), slice(None)
        mask = np.maximum.reduce([self.dataset.mask(View(j, (slice(None), slice(None)))) for j in around])
        return crop_window(mask, np.random.default_rng(around) if self.crop_once else rng)

    def _draw(self, view: View, rng: np.random.Generator) -> TrainingSample:
        phrase, mask = self.dataset.phrases[view.sample], self.dataset.mask(view)
        if rng.random() < self.negative:
            others = len(self._phrases) - 1
            j = int(rng.integers(others))
            # The last phrase stands in for the sample's own, so that each other one is equally likely.
            phrase = self._phrases[j] if self._phrases[j] != phrase else self._phrases[others]
            mask = np.zeros_like(mask)
        text = self.templates[rng.integers(len(self.templates))].format(phrase)
        weight = rng.uniform(*self.text_weight)
        supported = self._support(phrase, rng) if self.visual else None
        weight = weight if supported else 1.0
        return TrainingSample(self.dataset, view, mask, phrase, text, supported, weight, self.recipe)

    def _support(self, phrase: str, rng: np.random.Generator) -> View | None:
        candidates = self.dataset.by_phrase[phrase]
        if len(candidates) < 2:
            return None
        i = candidates[rng.integers(len(candidates))]
        view = View(i, self._window([i], rng))
        return view if self.dataset.mask(view).any() else None


def crop_window(mask: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random square, its side the shorter side of `mask` (H, W), that the object fills to more
    than 5%: the first such of 50 tries, else the fullest."""
    height, width = mask.shape
    side = min(height, width)
    starts = rng.integers(0, max(height, width) - side + 1, CROP_TRIES)  # it can move along the longer side only
    sums = np.concatenate([[0], np.cumsum(np.count_nonzero(mask, axis=0 if width > height else 1))])
    filled = sums[starts + side] - sums[starts]
    enough = filled > CROP_SHARE * side * side
    start = int(starts[np.argmax(enough) if enough.any() else np.argmax(filled)])
    moving, whole = slice(start, start + side), slice(0, side)
    return (whole, moving) if width > height else (moving, whole)
