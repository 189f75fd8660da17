"""The data sets of the study by name: where each is read from, what must be there, and where its publisher has it."""

import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from clipseg_repro.datasets import phrasecut_files
from clipseg_repro.datasets.checks import Problems
from clipseg_repro.datasets.coco import COCO
from clipseg_repro.datasets.coco_stuff import COCOStuff
from clipseg_repro.datasets.fss1000 import FSS1000
from clipseg_repro.datasets.lvis import LVIS
from clipseg_repro.datasets.pascal_context import PascalContext
from clipseg_repro.datasets.phrasecut import PhraseCut
from clipseg_repro.datasets.voc import VOC
from clipseg_repro.downloads import download, foreign_content
from clipseg_repro.errors import InputError
from clipseg_repro.files import CHECKSUMS, changed_files, checksum

VOC_SITE = "http://host.robots.ox.ac.uk/pascal/VOC"
COCO_SITE = "http://images.cocodataset.org"


@dataclass(frozen=True)
class Archive:
    """A file of the publisher's; unpacked in, or put into, the folder `to` below the data set's. md5: as torchvision
    has it; most publishers give none."""

    url: str
    to: str = "."
    md5: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class DataSet:
    """folder: below the data folder. splits: the first is the one that the study's tables need. parts: what must be
    there, by the names that messages use: patterns below the folder, one of which finds something. by_hand: what cannot
    be fetched by a program."""

    title: str
    folder: str
    open: Callable
    splits: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    archives: tuple[Archive, ...] = ()
    terms: str = ""
    by_hand: str = ""

    def missing(self, data: Path) -> list[str]:
        """The parts that are not there at all; whether the rest is whole is asked by `check`."""
        folder = Path(data) / self.folder
        return [part for part, patterns in self.parts.items() if not any(any(folder.glob(p)) for p in patterns)]

    def check(self, data: Path) -> tuple[list[str], Problems]:
        """(lines about what is there, everything that is wrong): the first split, and the others as far as they are
        there; of data that were built, the checksums too. Raises InputError where the first cannot be opened."""
        folder = Path(data) / self.folder
        if self.open is PhraseCut:
            counts, problems = phrasecut_files.check(folder)
            return [
                f"{split}: {phrases} phrases on {images} images" for split, (phrases, images) in counts.items()
            ], problems
        lines, problems = [], Problems()
        if (folder / CHECKSUMS).exists():
            problems.add("file that is missing, or not as it was built", *changed_files(folder, every=True))
        for split in self.splits:
            try:
                opened = self.open(folder, split)
            except InputError as error:
                if split == self.splits[0]:
                    raise
                lines.append(f"{split}: not there ({error})")
                continue
            found = opened.check()
            for wrong, things in found.found.items():
                problems.add(f"{split}: {wrong}", *things)
            shown = sorted({c for areas in opened.shown for c in areas}) if not found else opened.classes
            lines.append(f"{split}: {len(opened)} pictures, {len(shown)} classes")
        return lines, problems

    def fetch(self, data: Path):
        """Download and unpack what is not there yet; goes on where it was stopped. Raises InputError where a file
        is not the publisher's, and where all must be fetched by hand."""
        folder = Path(data) / self.folder
        advice = self.by_hand or f"fetch it in a browser and unpack it in '{folder}'"
        if not self.archives:
            raise InputError(f"{self.title} cannot be fetched by a program: {self.by_hand}, into '{folder}'")
        for archive in self.archives:
            home = folder / archive.to
            done = home / f".{archive.name}.unpacked"
            if not done.exists():
                download(archive.url, home / archive.name, otherwise=advice)
                _unpack(home / archive.name, archive)
                done.touch()


def _unpack(path: Path, archive: Archive):
    """Extract an archive beside itself, and delete it; a plain file stays. Members that would land elsewhere are
    refused."""
    fault = foreign_content(path)
    if not fault and archive.md5 and checksum(path, "md5") != archive.md5:
        fault = f"not the file with MD5 {archive.md5}"
    try:
        if fault:
            raise ValueError(fault)
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tqdm(tar, f"unpacking {path.name}", unit="file", mininterval=1):
                    tar.extract(member, path.parent, filter="data")
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as bundle:
                names = bundle.namelist()
                if any(name.startswith(("/", "\\")) or ".." in Path(name).parts for name in names):
                    raise ValueError("a member lies outside its folder")
                for name in tqdm(names, f"unpacking {path.name}", unit="file", mininterval=1):
                    bundle.extract(name, path.parent)
        else:
            return
    except (ValueError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        path.unlink()
        raise InputError(f"'{path}' is not what {archive.url} publishes ({error}): run the same again") from None
    path.unlink()


def _voc(year: str, lists: str, maps: str) -> dict[str, tuple[str, ...]]:
    return {f"{year}/{part}": (f"{year}/{part}", f"VOCdevkit/{year}/{part}") for part in ("JPEGImages", lists, maps)}


def _coco(*parts: str) -> dict[str, tuple[str, ...]]:
    return {part: (part, part.removeprefix("images/")) for part in parts}


CATALOGUE = {
    "phrasecut": DataSet(
        title="PhraseCut",
        folder=f"PhraseCut/{phrasecut_files.FOLDER}",
        open=PhraseCut,
        splits=("test", "train", "val", "miniv"),
        parts={
            " or ".join(phrasecut_files.IMAGE_TABLES): phrasecut_files.IMAGE_TABLES,
            "refer_<split>.json": ("refer_*.json",),
            "images/<image_id>.jpg": ("images/*.jpg",),
        },
        terms="annotations CC BY-NC-SA 4.0; Visual Genome's pictures CC BY 4.0",
        by_hand="run the download script of ChenyunWu/PhraseCutDataset (GitHub)",
    ),
    "voc": DataSet(
        title="Pascal VOC 2012",
        folder="VOCdevkit",
        open=VOC,
        splits=("val", "train"),
        parts=_voc("VOC2012", "ImageSets/Segmentation", "SegmentationClass"),
        archives=(
            Archive(f"{VOC_SITE}/voc2012/VOCtrainval_11-May-2012.tar", "..", "6cd6e144f989b92b3379bac3b3de84fd"),
        ),
        terms="Flickr's terms; for research",
    ),
    "pascal-context": DataSet(
        title="Pascal Context",
        folder="VOCdevkit",
        open=PascalContext,
        splits=("val", "train"),
        parts={"VOC2010/JPEGImages": ("VOC2010/JPEGImages",)}
        | {"VOC2010/trainval_merged.json": ("VOC2010/trainval_merged.json", "VOC2010/SegmentationClassContext")},
        archives=(
            Archive(f"{VOC_SITE}/voc2010/VOCtrainval_03-May-2010.tar", "..", "da459979d0c395079b5c75ee67908abb"),
            Archive("https://codalabuser.blob.core.windows.net/public/trainval_merged.json", "VOC2010"),
        ),
        terms="Flickr's terms; for research",
    ),
    "coco": DataSet(
        title="COCO 2014",
        folder="COCO",
        open=COCO,
        splits=("val2014", "train2014"),
        parts=_coco("annotations/instances_val2014.json", "images/val2014"),
        archives=(
            Archive(f"{COCO_SITE}/annotations/annotations_trainval2014.zip"),
            Archive(f"{COCO_SITE}/zips/val2014.zip", "images"),
            Archive(f"{COCO_SITE}/zips/train2014.zip", "images"),
        ),
        terms="annotations CC BY 4.0; Flickr's terms",
    ),
    "coco-stuff": DataSet(
        title="COCO-Stuff 164k",
        folder="COCO",
        open=COCOStuff,
        splits=("val2017", "train2017"),
        parts=_coco("stuffthingmaps/val2017", "images/val2017"),
        archives=(
            Archive(
                "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
                "stuffthingmaps",
            ),
            Archive(f"{COCO_SITE}/zips/val2017.zip", "images"),
        ),
        terms="annotations CC BY 4.0; Flickr's terms",
    ),
    "lvis": DataSet(
        title="LVIS",
        folder="LVIS",
        open=LVIS,
        splits=("val", "train"),
        parts={"lvis_v1_val.json": ("lvis_*_val.json", "annotations/lvis_*_val.json")},
        archives=(
            Archive("https://dl.fbaipublicfiles.com/LVIS/lvis_v1_val.json.zip"),
            Archive("https://dl.fbaipublicfiles.com/LVIS/lvis_v1_train.json.zip"),
            Archive(f"{COCO_SITE}/zips/val2017.zip", "../COCO/images"),
            Archive(f"{COCO_SITE}/zips/train2017.zip", "../COCO/images"),
        ),
        terms="annotations CC BY 4.0; Flickr's terms",
    ),
    "fss-1000": DataSet(
        title="FSS-1000",
        folder="FSS-1000",
        open=FSS1000,
        splits=("test",),
        parts={"<class>/1.jpg": ("*/1.jpg", "*/image/1.jpg"), "splits/test.txt": ("splits/test.txt",)},
        terms="none stated; for research",
        by_hand=(
            "get the archive that HKUSTCV/FSS-1000 (GitHub) links to on Google Drive and, as splits/test.txt, the list "
            "of test classes that juhongm999/hsnet (GitHub) has as data/splits/fss/test.txt"
        ),
    ),
}
