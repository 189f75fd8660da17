"""Every benchmark of the study by name, as rows of one results sheet: `clipseg-repro evaluate MODEL --all`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import pandas as pd

from clipseg_repro.datasets import episodes
from clipseg_repro.datasets.catalogue import CATALOGUE
from clipseg_repro.datasets.class_phrases import ClassPhrases
from clipseg_repro.datasets.own import Own, splits
from clipseg_repro.datasets.voc import VOC
from clipseg_repro.evaluation.generalized import PROMPTS, generalized
from clipseg_repro.evaluation.one_shot import one_shot
from clipseg_repro.evaluation.referring import phrasecut
from clipseg_repro.evaluation.semantic import generalized_zero_shot, semantic
from clipseg_repro.evaluation.visual_prompting import visual_prompt_gain
from clipseg_repro.prompts import DEFAULT_RECIPE, TEST_TEMPLATE

LVIS_PICTURES = 1600  # of Table 2
COLUMNS = ["benchmark", "table", "protocol", "metric", "value", "low", "high", "n", "seconds"]


@dataclass(frozen=True)
class Budget:
    """limit: pictures, or episodes per fold, at most. episodes: drawn per fold of COCO-20i. images: of PhraseCut at
    most; all if none. keep: as in `per_image.measure`."""

    limit: int | None = None
    episodes: int = 1000
    images: int | None = None
    seed: int = 0
    keep: Path | None = None

    @property
    def measured(self) -> dict:
        return {"limit": self.limit, "keep": self.keep}


@dataclass(frozen=True)
class Benchmark:
    """table: of the paper, "" for none. data: its name in the catalogue. run(segmenter, opened data, budget): yields
    rows (protocol, metric, value, low, high, n), in percent."""

    table: str
    data: str
    run: Callable[..., Iterator[tuple]]


def evaluate(segmenter, name: str, data: Path, budget: Budget = Budget()) -> pd.DataFrame:
    """The rows of one benchmark; `data`: the folder of all data sets. name: a key of BENCHMARKS, or a CSV of one's own,
    whose rows of split test, else val, are measured; all, where it has no splits. Raises InputError where the data are
    not there."""
    started = monotonic()
    if name.endswith(".csv"):
        measured = next((split for split in ("test", "val") if split in splits(name)), None)
        benchmark, opened = Benchmark("", "", _referring), ClassPhrases(Own(name, measured))
    else:
        benchmark = BENCHMARKS[name]
        source = CATALOGUE[benchmark.data]
        opened = source.open(Path(data) / source.folder, source.splits[0])
    rows = pd.DataFrame(benchmark.run(segmenter, opened, budget), columns=COLUMNS[2:-1])
    rows.insert(0, "benchmark", name)
    rows.insert(1, "table", benchmark.table)
    return rows.assign(seconds=monotonic() - started)


def _figures(protocol: str, figures: dict, n: int, keys=("miou", "iou_bin", "ap")) -> Iterator[tuple]:
    protocol = f"{protocol}, t = {figures['threshold']:.2f}"
    for key in keys:
        yield protocol, key, *(100 * figures[f"{key}{end}"] for end in ("", "_low", "_high")), n


def _referring(segmenter, data, budget):
    for prompts in ("text", "visual") if data.supported else ("text",):
        limit = budget.limit or budget.images
        result = phrasecut(segmenter, data, prompts, limit=limit, seed=budget.seed, keep=budget.keep)
        for threshold in (0.3, None):
            figures = result.table(threshold).iloc[0].to_dict()
            yield from _figures(prompts, figures, figures["samples"], ("miou", "iou_fg", "ap"))


def _voc_zero_shot(segmenter, data, budget):
    result = semantic(segmenter, data, **budget.measured)
    for unseen in (2, 4, 6, 8, 10):
        for row in generalized_zero_shot(result, unseen).to_dict("records"):
            protocol = f"unseen-{unseen}, {row['reading']}"
            for metric in ("miou_seen", "miou_unseen", "harmonic"):
                yield protocol, metric, *(row[f"{metric}{end}"] for end in ("", "_low", "_high")), len(result.areas)


def _pascal(prompts):
    def run(segmenter, data, budget):
        folds = {
            fold: episodes.episode_per_picture(data, episodes.pascal_fold(fold), seed=budget.seed)
            for fold in range(episodes.FOLDS)
        }
        result = one_shot(segmenter, data, folds, prompts, **budget.measured)
        yield from _figures(f"{prompts}, 1 episode per picture", result.at(0.3), len(result.samples))

    return run


def _coco(prompts):
    def run(segmenter, data, budget):
        folds = {
            fold: episodes.random_episodes(data, episodes.coco_fold(fold), budget.episodes, seed=budget.seed)
            for fold in range(episodes.FOLDS)
        }
        result = one_shot(segmenter, data, folds, prompts, **budget.measured)
        yield from _figures(f"{prompts}, random episodes", result.at(0.1), len(result.samples))

    return run


def _fss(segmenter, data, budget):
    drawn = episodes.episode_per_picture(data, range(len(data.classes)), least=1, seed=budget.seed)
    result = one_shot(segmenter, data, {0: drawn}, **budget.measured)
    yield from _figures("visual, 1 episode per picture", result.at(), len(result.samples))


def _properties(segmenter, data, budget):
    result = generalized(segmenter, data, **budget.measured)
    for family in PROMPTS:
        own = result.of(family)
        if len(own.samples):
            yield from _figures(family, own.at(), len(own.samples), ("miou", "ap"))


def _visual_prompts(segmenter, data, budget):
    limit = min(LVIS_PICTURES, budget.limit or LVIS_PICTURES)
    gains = visual_prompt_gain(segmenter, ClassPhrases(data), (DEFAULT_RECIPE,), limit, budget.seed, budget.keep)
    change = 100 * (gains[DEFAULT_RECIPE] - gains.original).to_numpy()
    drawn = change[np.random.default_rng(budget.seed).integers(len(change), size=(1000, len(change)))].mean(1)
    yield DEFAULT_RECIPE, "delta_p_object", change.mean(), *np.percentile(drawn, (2.5, 97.5)), len(change)


def _semantic(background: bool = True):
    def run(segmenter, data, budget):
        data = data if background else VOC(data.folder, data.split, background=False)
        result = semantic(segmenter, data, TEST_TEMPLATE, **budget.measured)
        interval = (100 * value for value in result.interval(lambda drawn: result.miou(pictures=drawn)))
        yield (
            f"text, argmax over {len(data.classes)} classes",
            "miou",
            100 * result.miou(),
            *interval,
            len(result.areas),
        )

    return run


BENCHMARKS = {
    "phrasecut": Benchmark("3, 9", "phrasecut", _referring),
    "lvis-visual-prompts": Benchmark("2", "lvis", _visual_prompts),
    "voc-zero-shot": Benchmark("4", "voc", _voc_zero_shot),
    "pascal-5i": Benchmark("5", "voc", _pascal("visual")),
    "coco-20i": Benchmark("6", "coco", _coco("visual")),
    "coco-20i-text": Benchmark("6", "coco", _coco("text")),
    "pascal-5i-text": Benchmark("7", "voc", _pascal("text")),
    "lvis-properties": Benchmark("8", "lvis", _properties),
    "fss-1000": Benchmark("", "fss-1000", _fss),
    "voc-20": Benchmark("", "voc", _semantic(background=False)),
    "pascal-context": Benchmark("", "pascal-context", _semantic()),
    "coco-stuff": Benchmark("", "coco-stuff", _semantic()),
}
