"""The study's training runs and measurements, one after the other, in an order that can stop and go on."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from clipseg_repro.datasets.catalogue import CATALOGUE
from clipseg_repro.errors import InputError
from clipseg_repro.study.crate import write_crate
from clipseg_repro.study.measured import decoder_file, keep_decoder, key, load_run, measure, measured, parts, store
from clipseg_repro.study.scales import Scale, data_root
from clipseg_repro.study.tables import SEEDS, claims, rows
from clipseg_repro.training import experiments, train


def queue() -> list[tuple[str, int]]:
    """(run, seed) of all that the tables need: every run once, then the further seeds of those that claims rest on."""
    first = [(run, 0) for run, settings in experiments().items() if settings["tables"]]
    again = []
    for claim in claims().values():
        methods = [claim[side]["method"] for side in ("larger", "smaller")]
        sides = [[run for row in rows(claim["table"]) if row.method == name for run in row.runs] for name in methods]
        if all(sides):  # else one is somebody else's, and no seed of ours decides
            again += sides[0] + sides[1]
    return first + [(run, seed) for seed in SEEDS[1:] for run in dict.fromkeys(again)]


def of_table(table: int, entry: str = "") -> list[str]:
    """The runs that a table needs; of an `entry` of experiments.yaml, with all that it holds out, only its own. Raises
    InputError where there is none."""
    found = [run for row in rows(table) for run in row.runs if run == entry or run.startswith(f"{entry}-") or not entry]
    if not found:
        own = f" of '{entry}'" if entry else ""
        raise InputError(f"Table {table} has no run{own}: choose one of the tables 3 to 9, and a run that it has")
    return list(dict.fromkeys(found))


def state(run: str, seed: int, scale: Scale) -> str:
    if set(parts(run)) <= set(measured(run, seed, scale)):
        return "measured"
    with _claimed(run, seed, scale) as free:
        if not free:
            return "running"
    return "trained" if decoder_file(run, seed, scale).exists() else "left"


@contextmanager
def _claimed(run: str, seed: int, scale: Scale) -> Iterator[bool]:
    """Whether no other process is at a run; then none can be until the block is left. A dead process holds nothing."""
    lock = FileLock(scale.unfinished / f"{key(run, seed)}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def status(scale: Scale) -> pd.DataFrame:
    """A row for every run of the queue: run, seed, state (measured, running, trained, left)."""
    found = [(run, seed, state(run, seed, scale)) for run, seed in queue()]
    return pd.DataFrame(found, columns=["run", "seed", "state"])


def study(scale: Scale, only: Iterable[str] = ()):
    """Train and measure what is missing of the queue, or of `only` some of its runs. Goes on where it was stopped, and
    leaves to other processes what they are at."""
    for run, seed in queue():
        if only and run not in only:
            continue
        with _claimed(run, seed, scale) as free:
            if not free or state(run, seed, scale) == "measured":
                continue
            if not decoder_file(run, seed, scale).exists():
                train_run(run, scale, seed)
            measure_run(run, seed, scale)
    write_crate(scale)


def measure_run(run: str, seed: int, scale: Scale):
    """Measure and store the parts of a trained run that are missing."""
    missing = [part for part in parts(run) if part not in measured(run, seed, scale)]
    segmenter = load_run(run, seed, scale) if missing else None
    for part in missing:
        store(run, seed, part, *measure(segmenter, run, part, scale), scale)


def train_run(
    run: str,
    scale: Scale,
    seed: int = 0,
    steps: int | None = None,
    source: str | None = None,
    own: Path | None = None,
    start: str | None = None,
    tensorboard: bool = False,
):
    """Train a run of experiments.yaml in `Scale.run_folder`, and keep its decoder for the study (`measured`).

    steps, source: instead of the scale's. start: a model whose decoder is trained on. own: a CSV to train on, for
    fine-tune. tensorboard, and InputError: as `training.train`.
    """
    settings, folder = experiments()[run], scale.run_folder(run, seed)
    source = start or source or scale.source(settings["model"])  # before the data are built
    if not own:
        scale.prepare(settings["dataset"])
    budget = ({"iterations": steps} if steps else {}) if own else scale.budget(settings, steps)
    budget |= {"start": "source"} if start else {}
    root = own or scale.data / CATALOGUE[settings["dataset"]].folder
    keep = data_root() / "activations"
    more = {"keep": keep, "words": scale.words(), "tensorboard": tensorboard}
    train(run, root, folder, source=source, seed=seed, **more, **budget)
    if not (own or steps or start):
        keep_decoder(run, seed, scale, load_file(folder / "model" / "model.safetensors"))
