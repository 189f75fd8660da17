"""Results as files: tables, figures, and provenance.json, which says where each came from."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from IPython import get_ipython
from IPython.display import Markdown, display

import clipseg_repro
from clipseg_repro.devices import device_name
from clipseg_repro.errors import InputError
from clipseg_repro.files import fingerprint, sha256, written_whole
from clipseg_repro.models.hub import REVISIONS
from clipseg_repro.models.loading import MINI
from clipseg_repro.study.scales import SCALES, Scale

DIGITS = 3  # decimals kept: results must come out the same on another machine
BOOK = "provenance.json"
# Of an entry: with another value it is another result, even if the file comes out the same.
MADE_FROM = ("scale", "seed", "model", "data")
PACKAGE = Path(clipseg_repro.__file__).parent
_fingerprint = lru_cache(fingerprint)  # of hundreds of megabytes at the paper's scale


def save_table(frame: pd.DataFrame, name: str, caption: str, scale: Scale, **origin) -> pd.DataFrame:
    """Write tables/<name>.csv and .md of the scale's results folder and record their provenance (`origin`: as in
    `record`).

    Decimals are rounded to DIGITS; a named index becomes a column. Returns the table as written, for display.
    """
    if any(frame.index.names):
        frame = frame.reset_index()
    frame = frame.round(DIGITS)
    path = _path(scale, "tables", name, ".csv")
    with written_whole(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    with written_whole(path.with_suffix(".md")) as temporary:
        temporary.write_text(_markdown(frame, caption), encoding="utf-8", newline="\n")
    record(path, scale, caption=caption, **origin)
    return frame


def show_figure(figure, name: str, scale: Scale, **origin):
    """Write figures/<name>.png of the scale's results folder: the same bytes from the same figure. In a notebook, show
    it, with a link to the file and its provenance. `origin`: as in `record`."""
    path = _path(scale, "figures", name, ".png")
    with written_whole(path) as temporary:  # metadata: without it, matplotlib's version would be in the file
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    record(path, scale, **origin)
    if get_ipython():
        folder = (Path("../results") / SCALES[scale.name].results).as_posix()  # as seen from notebooks/
        display(figure, Markdown(f"[{name}.png]({folder}/figures/{name}.png), [how it came about]({folder}/{BOOK})"))


def record(
    path: Path, scale: Scale, model: str | None = None, data: str | None = None, command: str | None = None, **more
):
    """Enter a file of the results folder in provenance.json, by its path there; entries whose file is gone leave it.

    model: what was measured, if not the scale's own. data: the fingerprint of what it was measured on, if that is not
    the scale's PhraseCut. command: what makes it; if none, the run of the notebook that names it.
    A file that comes out byte for byte as recorded, from the same model and data, keeps its record: the run named there
    did produce it.
    """
    key = Path(path).relative_to(scale.results).as_posix()
    entry = {"sha256": sha256(path), "command": command or _command(path.stem, scale)}
    entry |= more | provenance(scale, model, data)
    with FileLock(scale.unfinished / f"{BOOK}.lock"):  # several processes may be at the study
        entries = recorded(scale)
        known = entries.get(key, {})
        if all(known.get(name) == entry[name] for name in ("sha256", *more, *MADE_FROM)):
            return
        entries = {name: old for name, old in entries.items() if (scale.results / name).exists()} | {key: entry}
        with written_whole(scale.results / BOOK) as temporary:
            text = json.dumps(entries, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", newline="\n")


def recorded(scale: Scale) -> dict[str, dict]:
    """The entries of provenance.json by the file's path in the results folder. Raises InputError if it is damaged."""
    book = scale.results / BOOK
    try:
        entries = json.loads(book.read_bytes()) if book.exists() else {}
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("an entry is no object")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"'{book}' is damaged ({error}): restore it, or remove it and run clipseg-repro reproduce to write it anew"
        ) from None
    return entries


def provenance(scale: Scale, model: str | None = None, data: str | None = None) -> dict:
    """Where a result made now comes from: code, model, data, seed, time, versions and machine."""
    model = model or scale.model
    return {
        "version": clipseg_repro.__version__,
        "scale": scale.name,
        "seed": scale.seed,
        "model": {"source": model, "sha256": _weights_checksum(model)},
        "data": data or _fingerprint(scale.phrasecut),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": device_name(),
        **_commit(),
    }


def _command(name, scale):
    """What makes the result that a notebook's code names; None where no notebook does."""
    for path in sorted((PACKAGE.parent / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        code = ("".join(c["source"]) for c in json.loads(path.read_bytes())["cells"] if c["cell_type"] == "code")
        if any(f'"{name}"' in cell for cell in code):
            option = "" if scale.name == "mini" else f" --scale {scale.name}"
            return f"clipseg-repro reproduce --only {path.stem[:2]}{option}"
    return None


def _path(scale, folder, name, suffix):
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise InputError(f"result name '{name}': use lower-case letters, digits, '-' and '_'")
    return scale.results / folder / f"{name}{suffix}"


def _markdown(frame, caption):
    def cell(value):
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return ""
        return f"{value:.12g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    numeric = [pd.api.types.is_numeric_dtype(frame[column]) for column in frame]
    rows = [frame.columns, ["---:" if right else ":---" for right in numeric], *frame.itertuples(index=False)]
    lines = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join([caption, "", *lines]) + "\n"


@lru_cache
def _weights_checksum(source):
    """SHA-256 of the model's weights file; None while a Hub model has not been fetched."""
    if source == "mini" or Path(source).is_dir():
        path = (MINI if source == "mini" else Path(source)) / "model.safetensors"
    else:
        path = try_to_load_from_cache(source, "model.safetensors", revision=REVISIONS.get(source))
    return sha256(path) if isinstance(path, (str, Path)) and os.path.exists(path) else None


@lru_cache
def _commit():
    """The commit of the clone that the package runs from, and whether its files (results aside) differ from it."""

    def git(*command):
        return subprocess.run(["git", *command], cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout

    if not (PACKAGE.parent / "pyproject.toml").exists():  # installed: a repository around it is somebody else's
        return {"commit": None, "dirty": None}
    try:
        changes = git("status", "--porcelain", "--", ".", ":(exclude)results")
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
