"""The command line: `clipseg-repro segment | data | train | evaluate | verify | bench | reproduce`."""

import json
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipseg_repro.errors import InputError
from clipseg_repro.study.scales import SCALES, data_root, get_scale

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Group(typer.core.TyperGroup):
    """Turns what users cause (bad input, Ctrl-C) into one line on stderr and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.secho("\nStopped. Run the same command again to go on from here.", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data = typer.Typer(no_args_is_help=True, help="The data sets.")
app.add_typer(data, name="data")

ScaleName = StrEnum("ScaleName", list(SCALES))
ScaleOption = Annotated[
    ScaleName,
    typer.Option("--scale", help="mini: generated data, offline, minutes. paper: the real data sets, a GPU."),
]


def _print_version(wanted: bool):
    if wanted:
        from clipseg_repro import __version__

        typer.echo(f"clipseg-repro {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
):
    """CLIPSeg, reproduced: segment an image by describing what you look for, or by showing an example of it."""


@app.command()
def segment(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURES... [WORDS]...",
            help='Pictures or folders of them, and what to look for, each in quotes: "a cat" "something to sit on".',
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="More words; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; made if missing.")] = Path("segmented"),
    support: Annotated[Path | None, typer.Option(help="An example picture: look for what --mask marks in it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask of --support: a picture, 0 except on the object.")] = None,
    model: Annotated[str, typer.Option(help="mini, a Hub id (owner/name), a folder or a .pth file.")] = "mini",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; the fastest there is if none.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="A mask is where the probability is higher; 0.5 if none."),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Also write one map of all prompts, ..._labels.png.")
    ] = False,
    background: Annotated[
        list[str] | None,
        typer.Option(
            help="Words for what is none of the prompts, in the label map; implies --labels; may be repeated."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per picture and prompt: area, box, mask ...")
    ] = False,
):
    """Segment pictures by text, by example, or by both. Goes on where it was stopped.

    For each picture and prompt, writes to --out: ..._probability.png (16 bit: 65535 is probability 1), ..._mask.png
    (white where the probability exceeds --threshold) and ..._overlay.png (the probability as colour over the picture);
    for each picture, ..._segments.json: the settings and, per prompt, what --json prints.
    """
    from tqdm import tqdm

    from clipseg_repro import batch

    if (support is None) != (mask is None):
        raise InputError("--support and --mask belong together: give the example picture and the mask of its object")
    pictures, words = batch.pictures_and_words(arguments, prompt or [], out)
    runs = batch.segment(
        pictures,
        words,
        out,
        support=support,
        mask=mask,
        background=background or [],
        model=model,
        device=device,
        threshold=threshold,
        labels=labels or bool(background),
    )
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    known, failures = 0, []
    for results, new in tqdm(runs, "segment", len(pictures), unit="picture", disable=len(pictures) == 1):
        known += not new
        if isinstance(results, InputError):
            failures.append(results)
        elif as_json:
            tqdm.write("\n".join(map(json.dumps, results)))
        elif new:
            for found in results:
                label = f", label {found['label']} ({found['colour']})" if "label" in found else ""
                tqdm.write(f"{found['prompt']}: {found['area']:.1%} of the picture -> {out / found['files']}{label}")
    if known:
        typer.echo(f"{known} of {len(pictures)} pictures were done before with these settings: skipped", err=True)
    if failures and len(pictures) == 1:
        raise failures[0]
    for failure in failures:
        typer.secho(f"Failed: {failure}", fg="red", err=True)
    if failures:
        raise typer.Exit(1)


@data.command("build")
def data_build(scale: ScaleOption = ScaleName.mini):
    """Generate the mini data sets, or repair them; at paper scale, see that PhraseCut is there. Goes on where it was
    stopped."""
    chosen = get_scale(scale)
    chosen.prepare("phrasecut")
    typer.echo(f"The data are in {chosen.data}")


@data.command("list")
def data_list(scale: ScaleOption = ScaleName.mini):
    """Show the data sets: which are there, and what they are good for."""
    from clipseg_repro.datasets.catalogue import CATALOGUE
    from clipseg_repro.evaluation.benchmarks import BENCHMARKS

    folder = get_scale(scale).data
    for name, source in CATALOGUE.items():
        used = ", ".join(key for key, benchmark in BENCHMARKS.items() if benchmark.data == name)
        missing = source.missing(folder)
        state = f"missing: {', '.join(missing)}" if missing else "there"
        typer.echo(
            f"{name}: {source.title}, for {used}\n    {folder / source.folder}: {state}\n    terms: {source.terms}"
        )


@data.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="A data set of `data list`.")], scale: ScaleOption = ScaleName.paper
):
    """Download a data set from its publisher, or say what to fetch by hand. Goes on where it was stopped."""
    folder, source = get_scale(scale).data, _data_set(name)
    if get_scale(scale).build:
        raise InputError("the mini data are generated: clipseg-repro data build; to fetch the real ones, --scale paper")
    typer.echo(f"{source.title}: {source.terms}. Read the publisher's terms before you use it.")
    source.fetch(folder)
    typer.echo(f"It is in {folder / source.folder}; clipseg-repro data check {name} --scale {scale} reads all of it")


@data.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="A data set of `data list`, or a CSV of your own (image,mask,phrase).")],
    scale: ScaleOption = ScaleName.mini,
):
    """Check a data set whole: its files, counts, annotations and every picture. Exit code 1 if anything is wrong."""
    from clipseg_repro.datasets.own import Own

    if name.endswith(".csv"):
        folder, own = Path(name), Own(name)
        lines, problems = [f"{len(own)} pictures, {len(own.classes)} phrases"], own.check()
    else:
        source = _data_set(name)
        folder = get_scale(scale).data / source.folder
        lines, problems = source.check(get_scale(scale).data)
    typer.echo("\n".join(lines))
    if problems:
        typer.echo("\n".join([f"{len(problems)} problems in {folder}:", *problems.lines()]))
        raise typer.Exit(1)
    typer.echo(f"Nothing is wrong in {folder}")


def _data_set(name: str):
    from clipseg_repro.datasets.catalogue import CATALOGUE

    if name not in CATALOGUE:
        raise InputError(f"unknown data set '{name}': choose one of {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


@data.command("weights")
def data_weights(
    out: Annotated[Path | None, typer.Option(help="Folder for the files; weights/ of the data folder if none.")] = None,
):
    """Fetch the authors' released weights (three .pth files). Goes on where it was stopped."""
    from clipseg_repro.models.released import fetch_weights

    for path in fetch_weights(out or data_root() / "weights"):
        typer.echo(path)


@app.command()
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


@app.command()
def study(
    runs: Annotated[list[str] | None, typer.Argument(help="Only these runs of experiments.yaml.")] = None,
    scale: ScaleOption = ScaleName.mini,
    status: Annotated[bool, typer.Option("--status", help="Show what is measured, trained and left.")] = False,
):
    """Train and measure all that the paper's tables need; goes on where it was stopped. Hours."""
    from clipseg_repro.study import queue

    chosen = get_scale(scale)
    if unknown := [run for run in runs or () if run not in {run for run, _ in queue.queue()}]:
        raise InputError(f"no table needs a run '{unknown[0]}': clipseg-repro study --status lists those that one does")
    if not status:
        queue.study(chosen, runs or ())
    found = queue.status(chosen)
    typer.echo(found.to_string(index=False))
    typer.echo(", ".join(f"{count} {state}" for state, count in found.state.value_counts().items()))


@app.command()
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
        save_table(sheet.round(1), f"evaluation-{name}", caption, chosen, model=model)


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


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="A Hub id, a folder or a .pth file of released weights.")],
    image: Annotated[Path | None, typer.Option(help="COCO val2017 000000039769.jpg; fetched if none.")] = None,
):
    """Check released weights against the known answer on one picture; exit code 1 if they do not give it.

    Of a .pth file it also says whether it is one of the authors' three.
    """
    from clipseg_repro.verify import verify as run_checks

    checks = run_checks(source, image)
    for check in checks:
        typer.echo(check)
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


@app.command()
def bench(
    scale: ScaleOption = ScaleName.mini,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each contestant; medians are reported.")] = 5,
):
    """Measure speed against the usual way of running the model; writes the tables that notebook 11 shows. Minutes."""
    from clipseg_repro.bench import bench as run_bench

    for table in run_bench(get_scale(scale), repeats):
        typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.4g}") + "\n")


@app.command()
def reproduce(
    only: Annotated[list[str] | None, typer.Option(help="Only this notebook, as 03; may be repeated.")] = None,
    scale: ScaleOption = ScaleName.mini,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Skip what is done, or run all again.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="A quick pass: so many images of what takes long.")] = None,
):
    """Run the notebooks in order; they write the tables and figures of the study to results/."""
    from clipseg_repro.study.runner import NotebookFailed
    from clipseg_repro.study.runner import reproduce as run_study

    try:
        copies = run_study(only or (), scale, resume, limit)
    except NotebookFailed as error:
        typer.secho(f"Failed: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{len(copies)} notebooks done; tables and figures are in {get_scale(scale).results}")


if __name__ == "__main__":
    app()
