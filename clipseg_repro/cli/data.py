"""`clipseg-repro data`: the data sets and the released weights."""

from pathlib import Path
from typing import Annotated

import typer

from clipseg_repro.cli.options import ScaleName, ScaleOption
from clipseg_repro.errors import InputError
from clipseg_repro.study.scales import data_root, get_scale

data = typer.Typer(no_args_is_help=True, help="The data sets.")


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
