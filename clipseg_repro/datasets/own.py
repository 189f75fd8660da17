"""Data of one's own: a CSV beside the pictures, a row per picture and phrase.

    <folder>/segments.csv       image,mask,phrase[,split]: paths from this folder, the words, a split's name
    <folder>/...                pictures and masks, anywhere

Masks are read as `pictures.load_mask` says. Rows that share picture and phrase are one: their masks are joined.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from clipseg_repro.datasets.checks import Problems
from clipseg_repro.datasets.class_masks import ClassMasks
from clipseg_repro.errors import InputError
from clipseg_repro.pictures import load_image, load_mask

COLUMNS = ("image", "mask", "phrase")


class Own(ClassMasks):
    """The rows of a split, or all without one. file: the CSV. Raises one InputError for all faults of the table."""

    title = "your data"

    def __init__(self, file: str | Path, split: str | None = None):
        self.file = Path(file)
        table = read_table(self.file)
        if split is not None:
            table = table[table["split"] == split] if "split" in table else table[:0]
            if table.empty:
                raise InputError(f"'{self.file}' has no row of split '{split}': add a column `split`, or name another")
        self.ids = list(dict.fromkeys(table.image))
        self.classes = sorted(set(table.phrase))
        self._rows = {name: own.groupby("phrase").mask.agg(list).to_dict() for name, own in table.groupby("image")}

    def picture_path(self, i: int) -> Path:
        return self.file.parent / self.ids[i]

    def annotation_files(self) -> list[Path]:  # pictures too: one's own are replaced under the same name
        masks = sorted({name for own in self._rows.values() for names in own.values() for name in names})
        return [self.file, *(self.file.parent / name for name in [*self.ids, *masks])]

    def image(self, i: int) -> np.ndarray:
        return load_image(self.picture_path(i))

    def areas(self, i: int) -> dict[int, int]:
        return {
            c: int(self.mask(i, c).sum()) for c, phrase in enumerate(self.classes) if phrase in self._rows[self.ids[i]]
        }

    def mask(self, i: int, c: int) -> np.ndarray:
        mask = np.zeros(self.image(i).shape[:2], np.uint8)
        for name in self._rows[self.ids[i]].get(self.classes[c], []):
            mask |= load_mask(self.file.parent / name, mask.shape)
        return mask

    def check(self) -> Problems:
        problems = Problems()
        for i in range(len(self)):
            for c, phrase in enumerate(self.classes):
                try:
                    if phrase in self._rows[self.ids[i]] and self.mask(i, c).all():
                        problems.add("mask that fills the picture", f"{self.ids[i]} '{phrase}'")
                except InputError as error:
                    problems.add("picture or mask that cannot be used", str(error))
        return problems


def splits(file: Path) -> set[str]:
    """The names in the column `split`, if there is one."""
    return set(read_table(Path(file)).get("split", ()))


def read_table(file: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{file}' as a CSV ({error}): give columns {', '.join(COLUMNS)}") from None
    if lost := [column for column in COLUMNS if column not in table]:
        raise InputError(
            f"'{file}' has no column {', '.join(lost)}: its first line must be {','.join(COLUMNS)}[,split]"
        )
    table = table.map(str.strip)
    problems = Problems()
    for n, row in enumerate(table.to_dict("records"), start=2):
        problems.add("line with an empty cell", *[str(n)] * any(not row[column] for column in COLUMNS))
        lost = [row[key] for key in ("image", "mask") if row[key] and not (file.parent / row[key]).is_file()]
        problems.add("missing file", *(f"{name} (line {n})" for name in lost))
    if table.empty:
        problems.add("table without a row", file.name)
    problems.stop(f"'{file}'", "mend these lines")
    return table
