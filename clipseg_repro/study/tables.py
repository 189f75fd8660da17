"""The paper's Tables 3 to 9 from what is stored of the study's models, and the verdicts on its claims."""

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from clipseg_repro.datasets.held_out import held_out
from clipseg_repro.datasets.voc import CLASSES
from clipseg_repro.evaluation.metrics import KEYS, THRESHOLDS, SegmentationMetrics, resampled
from clipseg_repro.evaluation.semantic import RELEASED_UNSEEN, SemanticResult
from clipseg_repro.study.measured import TABLES, measured, stored
from clipseg_repro.study.scales import Scale
from clipseg_repro.training import experiments

RESAMPLES = 1000
SEEDS = range(3)  # at most, of every run
METRICS = {3: ("miou", "iou_fg", "ap"), 4: ("miou_seen", "miou_unseen"), 8: ("miou", "ap"), 9: ("miou", "ap")}
METRICS |= dict.fromkeys((5, 6, 7), ("miou", "iou_bin", "ap"))
SETTINGS = {3: ("text",), 8: ("affordances", "attributes", "meronymy"), 9: ("text", "visual")}  # of every run
VERDICTS = ("holds", "does not hold", "cannot be told here")


@lru_cache
def reported() -> pd.DataFrame:
    """Every number of the paper's Tables 2 to 9: table, dataset, task, method, setting, threshold, metric, value."""
    frame = pd.read_csv(files(__package__) / "reported_results.csv")
    frame["table"] = frame.table.str[1:].astype(int)
    frame.loc[(frame.table == 3) & (frame.setting != "cited"), "setting"] = "text"
    frame.loc[(frame.table == 8) & (frame.method == "CLIP-Deconv"), "method"] = "CLIP-Deconv (PC+)"
    return frame.fillna({"setting": ""})


def paper(table: int, metric: str, method: str | list[str] | None = None, setting: str = "") -> float:
    """The paper's number; of several methods, or of all of a setting, the best; nan where it has none."""
    theirs = reported()
    fits = (theirs.table == table) & (theirs.metric == metric) & ((theirs.setting == setting) | (table == 2))
    if method:
        fits &= theirs.method.isin([method] if isinstance(method, str) else method)
    return float(theirs[fits].value.max())


@dataclass(frozen=True)
class Row:
    """A row of a table: the runs that make it, one for each fold, and how it is measured. threshold None: the best, or
    none at all (Table 4). convention: of `evaluation.metrics`. also: a second part whose samples count, too."""

    table: int
    method: str
    setting: str
    runs: tuple[str, ...]
    threshold: float | None
    convention: str = "released"
    also: str | None = None

    @property
    def part(self) -> str:
        return f"phrasecut-{self.setting}" if self.table in (3, 9) else TABLES[self.table][0]


@dataclass(frozen=True)
class Measured:
    """A figure. values: of each seed. draws: (seeds, RESAMPLES), of the same images in every run and seed."""

    values: np.ndarray
    draws: np.ndarray

    @property
    def value(self) -> float:
        return float(self.values.mean())

    def resampled(self) -> np.ndarray:
        """(RESAMPLES,), the seeds drawn with replacement, too: a hierarchical bootstrap."""
        seeds = np.random.default_rng(0).integers(len(self.draws), size=(RESAMPLES, len(self.draws)))
        return self.draws[seeds, np.arange(RESAMPLES)[:, None]].mean(1)

    def over(self, other: "Measured") -> tuple[float, float, float]:
        """What this has more than another: the difference and its 95% interval, of the same images on both sides."""
        low, high = np.percentile(self.resampled() - other.resampled(), (2.5, 97.5))
        return self.value - other.value, low, high


def rows(table: int) -> list[Row]:
    """The rows of a table that runs of experiments.yaml make, in the paper's order; what it lacks comes last."""
    found: dict[tuple[str, str], list[str]] = {}
    for run, settings in experiments().items():
        if table in settings["tables"]:
            for setting in (settings["held_out"],) if table == 4 else SETTINGS.get(table, ("",)):
                found.setdefault((settings["method"], setting), []).append(run)
    theirs = reported()[reported().table == table]
    order = {key: n for n, key in enumerate(dict.fromkeys(zip(theirs.method, theirs.setting)))}
    limits = dict(zip(theirs.method, theirs.threshold))
    made = []
    for (method, setting), runs in sorted(found.items(), key=lambda item: order.get(item[0], len(order))):
        threshold = None if table in (4, 8, 9) else float(limits.get(method, 0.3))
        made.append(Row(table, method, setting, tuple(runs), threshold))
    return made


def figures(row: Row, scale: Scale) -> dict[str, Measured]:
    """By metric (KEYS; of Table 4 those of `_zero_shot`), in percent, over the seeds of which all runs are measured; {}
    where there is none."""
    key = row, scale.results
    if key not in _FIGURES:
        _FIGURES[key] = _measured_figures(row, scale)
    return _FIGURES[key]


_FIGURES: dict[tuple[Row, Path], dict[str, Measured]] = {}  # what is stored does not change while tables are made


def _measured_figures(row: Row, scale: Scale) -> dict[str, Measured]:
    parts = [row.part, *([row.also] if row.also else [])]
    seeds = [seed for seed in SEEDS if all(set(parts) <= set(measured(run, seed, scale)) for run in row.runs)]

    def read(run, seed):
        samples, counts = zip(*(stored(run, seed, part, scale) for part in parts))
        return pd.concat(samples, ignore_index=True), np.concatenate(counts)

    by_seed = [_of_seed(row, [read(run, seed) for run in row.runs]) for seed in seeds]
    return {
        metric: Measured(np.array([own[metric][0] for own in by_seed]), np.array([own[metric][1] for own in by_seed]))
        for metric in (by_seed[0] if by_seed else ())
    }


def _of_seed(row: Row, runs: list[tuple[pd.DataFrame, np.ndarray]]) -> dict[str, tuple[float, np.ndarray]]:
    """{metric: (figure, its draws)} of a row's runs with one seed."""
    if row.table == 4:
        return _zero_shot(runs[0][1], row.setting)
    if row.table == 8:
        samples, counts = runs[0]
        own = (samples.fold == row.setting).to_numpy()
        runs = [(samples[own], counts[own])]
    folds = [_grouped(samples, counts) for samples, counts in runs]
    threshold = row.threshold
    metrics = [SegmentationMetrics.from_counts(counts, groups, row.convention) for counts, _, groups in folds]
    if threshold is None:
        threshold = float(THRESHOLDS[int(sum(fold.compute()["miou"] for fold in metrics).argmax())])
    points = [fold.at(threshold) for fold in metrics]
    draws = [resampled(*fold[:2], threshold, RESAMPLES, n, fold[2], row.convention) for n, fold in enumerate(folds)]
    return {
        metric: (100 * np.mean([point[metric] for point in points]), 100 * np.mean([d[metric] for d in draws], 0))
        for metric in KEYS
    }


def _grouped(samples: pd.DataFrame, counts: np.ndarray):
    """(counts, images, classes); on PhraseCut every phrase is a class of its own."""
    if "class" in samples:
        return counts, samples["picture"].to_numpy(), pd.factorize(samples["class"])[0]
    return counts, samples.image_id.to_numpy(), None


def _zero_shot(areas: np.ndarray, held: str) -> dict[str, tuple[float, np.ndarray]]:
    """Over the seen and the unseen classes; the seen ones without background; the classes that score.py calls so."""
    result, every = SemanticResult(tuple(CLASSES), areas), range(len(CLASSES))
    unseen = [CLASSES.index(name) for name in held_out(held)]
    seen = [c for c in every if c not in unseen]
    chosen = {"miou_seen": seen, "miou_unseen": unseen, "seen_things": seen[1:]}
    if called_seen := RELEASED_UNSEEN.get(len(unseen)):
        chosen |= {"released_seen": called_seen, "released_unseen": [c for c in every if c not in called_seen]}
    drawn = np.random.default_rng(0).integers(len(areas), size=(RESAMPLES, len(areas)))
    return {
        metric: (100 * result.miou(own), np.array([100 * result.miou(own, pictures) for pictures in drawn]))
        for metric, own in chosen.items()
    }


def study_table(table: int, scale: Scale) -> pd.DataFrame:
    """A table of the paper beside the study: method, setting, metric, paper; of this scale the mean over seeds, its 95%
    interval (low, high), seeds. What was not measured is nan, seeds 0. Percent."""
    made, theirs = [], reported()[reported().table == table]
    keys = {}
    for row in rows(table):
        measured_here = figures(row, scale)
        for metric in METRICS[table]:
            keys[row.method, row.setting, metric] = measured_here.get(metric)
    cited = zip(theirs.method, theirs.setting, theirs.metric)
    for method, setting, metric in dict.fromkeys([*keys, *cited]):
        found = keys.get((method, setting, metric))
        low, high = np.percentile(found.resampled(), (2.5, 97.5)) if found else (np.nan, np.nan)
        made.append(
            {"method": method, "setting": setting, "metric": metric, "paper": paper(table, metric, method, setting)}
            | {scale.column: found.value if found else np.nan, "low": low, "high": high}
            | {"seeds": len(found.values) if found else 0}
        )
    return pd.DataFrame(made)


@lru_cache
def claims() -> dict[str, dict]:
    """claims.yaml by the claim's number; each side complete: table, metric, setting."""
    table = yaml.safe_load((files(__package__) / "claims.yaml").read_text(encoding="utf-8"))
    for claim in table.values():
        for side in ("larger", "smaller"):
            claim[side] = {"setting": claim.get("setting", ""), "method": None} | claim[side]
        claim["carries"] = table.get(claim["carries"][3:-1], claim)["carries"]  # "As C4.": what is said there
    return table


def ledger(scale: Scale, recipes: pd.DataFrame | None = None, table: int | None = None) -> pd.DataFrame:
    """The verdict on every claim by the rule of claims.yaml: claim, statement, table, paper's two sides, this scale's
    two sides, the difference with its interval (low, high), seeds of either side, verdict, carries.

    recipes: a row per picture, a column per recipe, of Table 2's gains at this scale; without it, its claims cannot be
    told. table: the claims of one table only."""
    made = []
    for number, claim in claims().items():
        if table not in (None, claim["table"]):
            continue
        both = [{"table": claim["table"], "metric": claim["metric"]} | claim[name] for name in ("larger", "smaller")]
        theirs, sides = [paper(**own) for own in both], [side(own, scale, recipes) for own in both]
        row = {"claim": number, "statement": claim["statement"], "table": claim["table"], "metric": claim["metric"]}
        row |= {"paper_larger": theirs[0], "paper_smaller": theirs[1]}
        row |= dict.fromkeys(("larger", "smaller", "difference", "low", "high"), np.nan) | {"seeds": ""}
        if all(sides):
            row |= {"larger": sides[0].value, "smaller": sides[1].value}
            row |= dict(zip(("difference", "low", "high"), sides[0].over(sides[1])))
            row["seeds"] = "/".join(str(len(own.values)) for own in sides)
        made.append(row | {"verdict": verdict(row["low"], row["high"]), "carries": claim["carries"]})
    return pd.DataFrame(made)


def verdict(low: float, high: float) -> str:
    """By the 95% interval of a difference; nan where it was not measured."""
    return VERDICTS[0] if low > 0 else VERDICTS[1] if high < 0 else VERDICTS[2]


def side(asked: dict, scale: Scale, recipes: pd.DataFrame | None = None) -> Measured | None:
    """One side of a claim or of an audit's effect, None if it is not measured. asked: table, metric, method, setting,
    and threshold, convention and also where they are not the row's own. recipes: as of `ledger`."""
    if asked["table"] == 2:
        return _recipe(asked["method"], recipes)
    same = [row for row in rows(asked["table"]) if (row.method, row.setting) == (asked["method"], asked["setting"])]
    own = {name: asked[name] for name in ("threshold", "convention", "also") if name in asked}
    return figures(replace(same[0], **own), scale).get(asked["metric"]) if same else None


def _recipe(method: str | list[str], recipes: pd.DataFrame | None) -> Measured | None:
    """Mean gain of a recipe, or of the best of several in each draw."""
    names = [method] if isinstance(method, str) else method
    if recipes is None or not set(names) <= set(recipes):
        return None
    gains = 100 * recipes[names].to_numpy()
    drawn = np.random.default_rng(0).integers(len(gains), size=(RESAMPLES, len(gains)))
    return Measured(gains.mean(0).max(keepdims=True), gains[drawn].mean(1).max(1)[None])


def effects(table: int, metric: str, baseline: str, scale: Scale) -> pd.DataFrame:
    """What every other row of a table has over the row `baseline` of the same setting, in points: method, setting,
    paper (nan where it has none); of this scale the difference and its 95% interval (low, high), seeds drawn on both
    sides and images together. Rows that are not measured are left out."""
    made = []
    for row in rows(table):
        base = next(r for r in rows(table) if (r.method, r.setting) == (baseline, row.setting))
        mine, theirs = (figures(r, scale).get(metric) for r in (row, base))
        if row != base and mine and theirs:
            change, low, high = mine.over(theirs)
            printed = [paper(table, metric, method, row.setting) for method in (row.method, baseline)]
            made.append(
                {"method": row.method, "setting": row.setting, "paper": printed[0] - printed[1]}
                | {scale.column: change, "low": low, "high": high}
            )
    return pd.DataFrame(made, columns=["method", "setting", "paper", scale.column, "low", "high"])


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """A `study_table` to look at: a row per method and setting; per metric the paper's figure and this scale's, with
    its interval, in words."""
    here = table.columns[4]
    missing = np.where(table.setting.str.startswith("cited"), "", "not measured")
    told = [f"{v:.1f} ({lo:.1f} to {hi:.1f})" for v, lo, hi in zip(table[here], table.low, table.high)]
    told = np.where(table.seeds > 0, told, missing)
    theirs = [f"{value:.1f}" if value == value else "" for value in table.paper]
    wide = table.assign(**{here: told, "paper": theirs}).set_index(["method", "setting", "metric"])[["paper", here]]
    order = dict.fromkeys(zip(table.method, table.setting))
    wide = wide.unstack("metric").swaplevel(axis=1).reindex(columns=list(dict.fromkeys(table.metric)), level=0)
    return wide.reindex(pd.MultiIndex.from_tuples(order, names=["method", "setting"])).fillna("")
