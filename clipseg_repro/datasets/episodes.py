"""Folds and episodes of one-shot segmentation: Pascal-5i, COCO-20i and FSS-1000 (paper, Tables 5 to 7).

An episode is a query picture, a class that it shows, and other pictures that show the class. All are drawn with a seed
and can be stored beside a result, so that another implementation is scored on the same ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipseg_repro.datasets.class_masks import ClassMasks
from clipseg_repro.errors import InputError
from clipseg_repro.files import written_whole

FOLDS = 4
LEAST_PIXELS = 2 * 32 * 32  # of a held-out class, for a picture of Pascal-5i to count (PFENet's util/dataset.py)


@dataclass(frozen=True)
class Episode:
    """Places in a `ClassMasks`: query picture, class, support pictures."""

    query: int
    label: int
    supports: tuple[int, ...]


def pascal_fold(fold: int) -> list[int]:
    """The classes (of voc.CLASSES) that a fold of Pascal-5i holds out: 5 i + 1 to 5 i + 5."""
    return list(range(5 * _sound(fold) + 1, 5 * fold + 6))


def coco_fold(fold: int) -> list[int]:
    """The classes (of COCO's 80) that a fold of COCO-20i holds out: i, i + 4, ... i + 76."""
    return list(range(_sound(fold), 80, FOLDS))


def _sound(fold: int) -> int:
    if fold not in range(FOLDS):
        raise InputError(f"fold {fold}: there are {FOLDS}, 0 to {FOLDS - 1}")
    return fold


def by_class(data: ClassMasks, classes: list[int], least: int = 1) -> dict[int, list[int]]:
    """The pictures that show at least `least` pixels of each class."""
    return {c: [i for i, areas in enumerate(data.shown) if areas.get(c, 0) >= least] for c in classes}


def episode_per_picture(
    data: ClassMasks, classes: list[int], shots: int = 1, least: int = LEAST_PIXELS, seed: int = 0
) -> list[Episode]:
    """Pascal-5i as the paper has it, and FSS-1000 (`least` 1): every picture that shows enough of a class is a query.

    Its class is drawn among those that it shows at all, the supports among the other pictures with enough of that. A
    class with too few of them is not drawn, and a picture that shows no other is no query.
    """
    pictures = by_class(data, classes, least)
    queries = sorted({i for own in pictures.values() for i in own})
    episodes = []
    for query in queries:
        rng = np.random.default_rng([seed, query])
        present = [c for c in data.shown[query] if c in pictures and len(set(pictures[c]) - {query}) >= shots]
        if present:
            label = present[rng.integers(len(present))]
            episodes.append(_with_supports(data, query, label, pictures[label], shots, rng))
    return episodes


def random_episodes(
    data: ClassMasks, classes: list[int], count: int = 1000, shots: int = 1, seed: int = 0
) -> list[Episode]:
    """COCO-20i: class, then query, then supports drawn uniformly (HSNet's data/coco.py, which has no seed)."""
    pictures, rng = (
        {c: own for c, own in by_class(data, classes).items() if len(own) > shots},
        np.random.default_rng(seed),
    )
    if not pictures:
        raise InputError(
            f"{data.title}: no class of the fold is on more than {shots} pictures: use more data or fewer shots"
        )
    episodes = []
    for label in rng.choice(list(pictures), count).tolist():
        query = pictures[label][rng.integers(len(pictures[label]))]
        episodes.append(_with_supports(data, query, label, pictures[label], shots, rng))
    return episodes


def published(data: ClassMasks, path: Path, shots: int = 1, seed: int = 0) -> list[Episode]:
    """Queries and classes of a list of HSNet's (`<name>__<class from 1>` a line), supports drawn among its pictures."""
    place = {name: i for i, name in enumerate(data.ids)}
    pairs = [line.rsplit("__", 1) for line in path.read_text(encoding="utf-8").split()]
    lost = sorted({name for name, _ in pairs} - set(place))
    if lost:
        raise InputError(
            f"'{path}' names {len(lost)} pictures that the split of {data.title} lacks: {', '.join(lost[:5])}"
        )
    queries = [(place[name], int(label)) for name, label in pairs]
    pictures = {label: [i for i, own in queries if own == label] for _, label in queries}
    rng = np.random.default_rng(seed)
    return [_with_supports(data, query, label, pictures[label], shots, rng) for query, label in queries]


def _with_supports(data, query: int, label: int, pictures: list[int], shots: int, rng) -> Episode:
    others = [i for i in pictures if i != query]
    if len(others) < shots:
        raise InputError(
            f"{data.title}: '{data.classes[label]}' is on {len(others)} pictures besides '{data.ids[query]}', {shots} "
            "needed as supports: use more data or fewer shots"
        )
    return Episode(query, label, tuple(rng.choice(others, shots, replace=False).tolist()))


def write(episodes: list[Episode], data: ClassMasks, path: Path):
    """Store episodes by the names of pictures and classes, as JSON."""
    named = [
        {"query": data.ids[e.query], "class": data.classes[e.label], "supports": [data.ids[i] for i in e.supports]}
        for e in episodes
    ]
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(named, indent=0), encoding="utf-8")


def read(path: Path, data: ClassMasks) -> list[Episode]:
    """What `write` stored. InputError where it names what the data do not have."""
    place, label = {name: i for i, name in enumerate(data.ids)}, {name: c for c, name in enumerate(data.classes)}
    try:
        return [
            Episode(place[e["query"]], label[e["class"]], tuple(place[name] for name in e["supports"]))
            for e in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"'{path}' holds no episodes ({error})") from None
    except KeyError as error:
        raise InputError(f"'{path}' names {error}, which {data.title} does not have: these are other data's") from None
