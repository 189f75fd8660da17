"""`clipseg-repro segment`: pictures and videos of one's own."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from clipseg_repro.errors import InputError


def segment(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURES... [WORDS]...",
            help="Pictures, videos or folders of them, and what to look for, each in quotes: "
            '"a cat" "something to sit on".',
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
        bool,
        typer.Option("--json", help="Print a line of JSON per picture and prompt, or frame of a video: area, box ..."),
    ] = False,
):
    """Segment pictures and videos by text, by example, or by both. Goes on where it was stopped.

    For each picture and prompt, writes to --out: ..._probability.png (16 bit: 65535 is probability 1), ..._mask.png
    (white where the probability exceeds --threshold) and ..._overlay.png (the probability as colour over the picture);
    for each picture, ..._segments.json: the settings and, per prompt, what --json prints. For a video, instead:
    its name with .mp4, every prompt's probability as a colour of its own, and ..._frames.jsonl, what --json prints.
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
            continue
        try:
            for found in results:
                if as_json:
                    tqdm.write(json.dumps(found))
                elif new and "prompt" in found:
                    label = f", label {found['label']} ({found['colour']})" if "label" in found else ""
                    area, files = f"{found['area']:.1%} of the picture", out / found["files"]
                    tqdm.write(f"{found['prompt']}: {area} -> {files}{label}")
        except InputError as error:  # a video that is damaged later on
            failures.append(error)
        else:
            if new and "frame" in found and not as_json:
                legend = ", ".join(f"{each['prompt']} in {each['colour']}" for each in found["prompts"])
                tqdm.write(f"{found['video']}: {found['frame'] + 1} frames -> {out / found['files']}, {legend}")
    if known:
        typer.echo(f"{known} of {len(pictures)} pictures were done before with these settings: skipped", err=True)
    if failures and len(pictures) == 1:
        raise failures[0]
    for failure in failures:
        typer.secho(f"Failed: {failure}", fg="red", err=True)
    if failures:
        raise typer.Exit(1)
