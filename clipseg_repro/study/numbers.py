"""Results in prose: texts name a number of results/tables, and it is put in when they are built. None is typed."""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pandas as pd

from clipseg_repro.errors import InputError

NAMED = re.compile(r"\{\{\s*(.+?)\s*\}\}")


def cell(results: Path, name: str):
    """The cell that a name means: "table3; CLIPSeg (PC+); miou; mini" is of tables/table3.csv, in the one row that has
    all of the values between, the column that comes last; nan if it was not measured. Raises InputError, with the name,
    where it is not one cell."""
    table, *keys, column = (part.strip() for part in name.split(";"))
    frame = _table(Path(results), table, name)
    chosen = [all((frame.iloc[n].astype(str) == key).any() for key in keys) for n in range(len(frame))]
    if column not in frame or sum(chosen) != 1:
        raise InputError(
            f"'{name}' is no number of results/tables: column '{column}' of {sum(chosen)} rows of {table}.csv; name "
            "values that one row has, and one of its columns"
        )
    return frame.loc[chosen, column].item()


def number(results: Path, name: str):
    """A `cell` that was measured. Raises InputError, with the name, where it was not."""
    value = cell(results, name)
    if pd.isna(value):
        raise InputError(f"'{name}' has not been measured: clipseg-repro study and clipseg-repro reproduce measure it")
    return value


def filled(text: str, results: Path, blocks: dict[str, Callable[[Path], str]] | None = None) -> str:
    """The text with every {{name}} replaced by its `number`, and {{#block}} by what its function makes of the results.

    A format may follow the name after "@", as in {{table9; d16; miou; mini @ .1f}}; numbers are otherwise as stored."""

    def replaced(match):
        name, _, style = match[1].partition("@")
        if name.startswith("#"):
            if name[1:].strip() not in (blocks or {}):
                raise InputError(f"unknown block '{name}': choose one of {', '.join(blocks or {})}")
            return blocks[name[1:].strip()](results)
        value = number(results, name.strip())
        return format(value, style.strip()) if style else f"{value:g}" if isinstance(value, float) else str(value)

    return NAMED.sub(replaced, text)


@lru_cache
def _table(results, table, name):
    path = results / "tables" / f"{table}.csv"
    if not path.exists():
        raise InputError(f"'{name}' needs '{path}', which is not there: clipseg-repro reproduce makes it")
    return pd.read_csv(path)
