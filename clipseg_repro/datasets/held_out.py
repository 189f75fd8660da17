"""Phrases that training must not see: those that name a held-out class (paper, sections 5.2 and 5.3), or what Table 8
asks for.

The words of a class are the lemmas of its WordNet synset and of all below it; see `WordNet`. Who has another source of
words (the mini world) gives it.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Protocol

from clipseg_repro.datasets import coco
from clipseg_repro.datasets.episodes import FOLDS, coco_fold, pascal_fold
from clipseg_repro.datasets.phrasecut import mentions_property
from clipseg_repro.datasets.voc import CLASSES
from clipseg_repro.downloads import download
from clipseg_repro.errors import InputError
from clipseg_repro.files import checksum

# Classes of VOC that training must not have seen, pair by pair: unseen-2 is the first, unseen-10 all (paper, Table 4).
UNSEEN_PAIRS = (
    *(("cow", "motorbike"), ("aeroplane", "sofa"), ("cat", "tvmonitor"), ("train", "bottle"), ("chair", "pottedplant")),
)
# Synsets of VOC's classes, in their order (released datasets/phrasecut.py).
SYNSETS = dict(
    zip(
        CLASSES[1:],
        (
            *("aeroplane.n.01", "bicycle.n.01", "bird.n.01", "vessel.n.02", "bottle.n.01", "bus.n.01", "car.n.01"),
            *("cat.n.01", "chair.n.01", "cattle.n.01", "table.n.02", "dog.n.01", "horse.n.01", "motorcycle.n.01"),
            *("person.n.01", "pot_plant.n.01", "sheep.n.01", "sofa.n.01", "train.n.01", "television.n.03"),
        ),
        strict=True,
    )
)
PERSON = frozenset({"person", "human", "man", "woman", "toddler", "baby", "body", "child", "infant"})  # in their place
NLTK_DATA = "https://raw.githubusercontent.com/nltk/nltk_data/5db857e6f7df11eabb5e5665836db9ec8df07e28"
WORDNET = f"{NLTK_DATA}/packages/corpora/wordnet.zip"
WORDNET_MD5 = "b3f38606f626e54c6f060548546f71f0"  # of nltk's index


class Words(Protocol):
    """lemmas(a class of VOC): what it may be called. base(word): its dictionary form."""

    def lemmas(self, name: str) -> set[str]: ...

    def base(self, word: str) -> str: ...


class WordNet:
    """WordNet 3.0 by nltk: what it has on this machine, else its own archive, fetched once into `folder` (11 MB)."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    @cached_property
    def _reader(self):
        import nltk.data  # late: slow to import
        from nltk.corpus.reader import WordNetCorpusReader
        from nltk.corpus.util import LazyCorpusLoader

        nltk.data.path.append(str(self.folder.resolve()))
        archive = self.folder / "corpora" / "wordnet.zip"
        try:
            nltk.data.find("corpora/wordnet" if (archive.parent / "wordnet").is_dir() else "corpora/wordnet.zip")
        except LookupError:
            advice = f"put nltk's wordnet.zip into '{archive.parent}'"
            download(WORDNET, archive, otherwise=advice)
            if checksum(archive, "md5") != WORDNET_MD5:
                archive.unlink()
                raise InputError(f"{WORDNET} is not nltk's WordNet 3.0: run the same again, or {advice}") from None
        return LazyCorpusLoader("wordnet", WordNetCorpusReader, None)

    def lemmas(self, name: str) -> set[str]:
        if name == "person":
            return set(PERSON)
        top = self._reader.synset(SYNSETS[name])
        every = [top, *top.closure(lambda synset: synset.hyponyms())]
        return {lemma.replace("_", " ").lower() for synset in every for lemma in synset.lemma_names()}

    def base(self, word: str) -> str:
        return min(self._reader._morphy(word, "n") or [word], key=len)  # as nltk's WordNetLemmatizer


def held_out(key: str) -> tuple[str, ...]:
    """The classes of VOC that a key of experiments.yaml leaves out: "unseen-10" (Table 4), "pascal-5i-0" (Table 5)."""
    kind, _, number = key.rpartition("-")
    if kind == "unseen" and number in map(str, range(2, 2 * len(UNSEEN_PAIRS) + 1, 2)):
        return tuple(name for pair in UNSEEN_PAIRS[: int(number) // 2] for name in pair)
    if kind == "pascal-5i" and number in map(str, range(FOLDS)):
        return tuple(CLASSES[c] for c in pascal_fold(int(number)))
    raise InputError(
        f"held_out: '{key}' is neither unseen-2 to unseen-10 nor pascal-5i-0 to pascal-5i-3, nor properties"
    )


def remover(key: str, words: Words) -> Callable[[str], bool]:
    """Whether a phrase must go; for `PhraseCutPlus(remove=...)`. key: as in `held_out`, "properties" (Table 8)
    or "coco-20i-0" and so on, whose classes go by the names that they have in training (Table 6)."""
    if key == "properties":
        return mentions_property
    if key.startswith("coco-20i-"):
        names = list(coco.THINGS.values())
        return {names[c] for c in coco_fold(int(key.rpartition("-")[2]))}.__contains__
    return mentions({lemma for name in held_out(key) for lemma in words.lemmas(name)}, words.base)


def mentions(lemmas: Iterable[str], base: Callable[[str], str]) -> Callable[[str], bool]:
    """Whether a phrase has a single-word lemma as one of its words, or one of several words anywhere: even within other
    words, as the released loader has it."""
    single = {lemma for lemma in lemmas if " " not in lemma}
    several = [lemma for lemma in lemmas if " " in lemma]

    def check(phrase: str) -> bool:
        return any(lemma in phrase for lemma in several) or any(base(word) in single for word in phrase.split(" "))

    return check
