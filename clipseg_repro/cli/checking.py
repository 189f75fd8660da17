"""`clipseg-repro verify | bench | reproduce`: known answers, speed, and the notebooks."""

from pathlib import Path
from typing import Annotated

import typer

from clipseg_repro.cli.options import ScaleName, ScaleOption
from clipseg_repro.study.scales import get_scale


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


def bench(
    scale: ScaleOption = ScaleName.mini,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each contestant; medians are reported.")] = 5,
):
    """Measure speed against the usual way of running the model; writes the tables that notebook 11 shows. Minutes."""
    from clipseg_repro.bench import bench as run_bench

    for table in run_bench(get_scale(scale), repeats):
        typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.4g}") + "\n")


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
