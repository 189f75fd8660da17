"""The command line: `clipseg-repro segment | train | study | evaluate | verify | bench | reproduce | data`."""

from typing import Annotated

import typer

from clipseg_repro.cli.checking import bench, reproduce, verify
from clipseg_repro.cli.data import data
from clipseg_repro.cli.experiments import evaluate, study, train
from clipseg_repro.cli.segmenting import segment
from clipseg_repro.errors import InputError

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
app.add_typer(data, name="data")
for command in (segment, train, study, evaluate, verify, bench, reproduce):
    app.command()(command)


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
