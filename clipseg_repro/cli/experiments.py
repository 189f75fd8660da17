"""`clipseg-repro train | study | evaluate`: the paper's models and tables."""

import re
from pathlib import Path
from typing import Annotated

import typer

from clipseg_repro.cli.options import ScaleName, ScaleOption
from clipseg_repro.errors import InputError
from clipseg_repro.study.scales import get_scale


def train(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run of experiments.yaml (clipseg-pc+, clip-deconv, vitseg-pc+ ...), or pre-training: mini-clip, "
            "mini-resnet-clip (for clipseg-rn50x4-pc+), mini-vit (for vitseg-...)."
        ),
    ] = None,
    scale: ScaleOption = ScaleName.mini,
    table: Annotated[int | None, typer.Option(help="In place of RUN: all runs of this table of the paper.")] = None,
    source: Annotated[str | None, typer.Option(help="Whose backbone the decoder reads; the scale's if none.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="A model whose decoder is trained on.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimisation steps, instead of the run's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Another seed gives another model.")] = 0,
    own: Annotated[
        Path | None,
        typer.Option("--data", help="A CSV of your own (image,mask,phrase[,split]) to train on; for fine-tune."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the curve for TensorBoard too, to RUN/logs.")
    ] = False,
):
    """Train a model, saved in results/training/RUN (RUN-seed1 ...) with its curve and checkpoint; goes on where it was
    stopped. `accelerate launch -m clipseg_repro.cli train ...` shares the work among processes or GPUs."""
    from clipseg_repro.mini.pretrain_backbones import PRETRAINING
    from clipseg_repro.study.queue import of_table, train_run
    from clipseg_repro.training import experiments

    chosen = get_scale(scale)
    if (run is None) == (table is None):
        raise InputError("name a run, as clipseg-pc+, or give --table with a table's number: one of the two")
    if run in PRETRAINING:
        if steps or start or tensorboard or (source and run != "mini-clip"):
            raise InputError(
                f"{run} has its own curriculum, from nothing (mini-clip also from a --source at 112 px): leave out "
                "--steps, --from, --tensorboard and --source"
            )
        PRETRAINING[run](chosen.run_folder(run, seed), seed=seed, **({"source": source} if source else {}))
    elif run and run not in experiments():  # before the data are built
        raise InputError(f"unknown run '{run}': choose one of {', '.join([*PRETRAINING, *experiments()])}")
    elif run and (experiments()[run]["start"] == "source") != (own is not None):
        raise InputError("fine-tune and --data FILE.csv belong together: name the run fine-tune, and your table")
    else:
        for each in [run] if run else of_table(table):
            train_run(each, chosen, seed, steps, source, own, start, tensorboard)
            typer.echo(f"The model is in {chosen.run_folder(each, seed) / 'model'}")
        return
    typer.echo(f"The model is in {chosen.run_folder(run, seed) / 'model'}")


def study(
    runs: Annotated[list[str] | None, typer.Argument(help="Only these runs of experiments.yaml.")] = None,
    scale: ScaleOption = ScaleName.mini,
    status: Annotated[bool, typer.Option("--status", help="Show what is measured, running and left.")] = False,
):
    """Train and measure all that the paper's tables need; goes on where it was stopped, and shares the runs with others
    that are at it. Hours."""
    from clipseg_repro.study import queue

    chosen = get_scale(scale)
    if unknown := [run for run in runs or () if run not in {run for run, _ in queue.queue()}]:
        raise InputError(f"no table needs a run '{unknown[0]}': clipseg-repro study --status lists those that one does")
    if not status:
        queue.study(chosen, runs or ())
    found = queue.status(chosen)
    typer.echo(found.to_string(index=False))
    typer.echo(", ".join(f"{count} {state}" for state, count in found.state.value_counts().items()))


def evaluate(
    source: Annotated[
        str | None, typer.Argument(help="mini, a Hub id, a folder or a .pth file; the scale's if none.")
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="phrasecut (if none), another one, or a CSV of your own; may be repeated."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every benchmark whose data are there.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, or episodes of a fold, at most.")] = None,
    table: Annotated[
        int | None, typer.Option(help="A run's rows of this table of the paper, in place of a model.")
    ] = None,
    scale: ScaleOption = ScaleName.mini,
):
    """Measure a model on benchmarks; writes the table evaluation-MODEL to results/. Goes on where it was stopped.

    With --table, SOURCE is a trained run of experiments.yaml: measures it, and shows it beside the paper.

    `accelerate launch -m clipseg_repro.cli evaluate ...` shares the work among processes.
    """
    import pandas as pd
    from accelerate import PartialState

    from clipseg_repro import load_segmenter
    from clipseg_repro.datasets.catalogue import CATALOGUE
    from clipseg_repro.evaluation import benchmarks
    from clipseg_repro.study.results import save_table

    chosen, state = get_scale(scale), PartialState()
    if table:
        return _evaluate_run(source or "", table, chosen)
    names = list(benchmark or ([] if every else ["phrasecut"]))
    known = benchmarks.BENCHMARKS
    if unknown := [name for name in names if name not in known and not name.endswith(".csv")]:
        raise InputError(f"unknown benchmark '{unknown[0]}': choose from {', '.join(known)}, or give a .csv file")
    if not all(name.endswith(".csv") for name in names) or every:
        with state.main_process_first():
            chosen.prepare()
    if every:
        names += [name for name, each in known.items() if not CATALOGUE[each.data].missing(chosen.data)]
    if not names:
        advice = f"clipseg-repro data list --scale {scale} shows what is missing"
        raise InputError(f"no data set in '{chosen.data}': {advice}")
    segmenter = load_segmenter(source or chosen.model, dtype="float32")
    budget = benchmarks.Budget(limit, chosen.episodes, chosen.images, chosen.seed, chosen.unfinished)
    sheet = pd.concat([benchmarks.evaluate(segmenter, name, chosen.data, budget) for name in names])
    if state.is_main_process:
        typer.echo(sheet.round(1).to_string(index=False))
        model = source or chosen.model
        caption = f"{model} on benchmarks, percent, 95% intervals; seconds include reading the data"
        name = re.sub("[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")
        save_table(
            sheet.round(1),
            f"evaluation-{name}",
            caption,
            chosen,
            model=model,
            command=f"clipseg-repro evaluate {model}",
        )


def _evaluate_run(run: str, table: int, scale):
    from clipseg_repro.study import queue
    from clipseg_repro.study.tables import rows, side_by_side, study_table

    runs = queue.of_table(table, run)
    for each in runs:
        queue.measure_run(each, 0, scale)
    found = study_table(table, scale)
    own = {(row.method, row.setting) for row in rows(table) if set(row.runs) & set(runs)}
    chosen = [key in own for key in zip(found.method, found.setting)]
    typer.echo(side_by_side(found[chosen]).to_string())
