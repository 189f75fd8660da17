"""What every reader asks of files that it did not write: JSON of a known form, pictures of the stated size.

The first fault stops nothing: `Problems` collects them, and one InputError names them all.
"""

import gc
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from clipseg_repro.errors import InputError
from clipseg_repro.pictures import MAX_PIXELS

NAMED = 5  # things with the same fault, in a message
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # what a picture of a benchmark may be, whatever its suffix says


class Problems:
    """The faults of a data set: what is wrong -> the things that have it, in the order found. `len` counts things."""

    def __init__(self):
        self.found: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def add(self, wrong: str, *things: str):
        if things:
            self.found.setdefault(wrong, []).extend(things)

    def lines(self) -> list[str]:
        """One line per kind of fault: "wrong (count): the first few"."""
        lines = []
        for wrong, things in self.found.items():
            count, more = ("", "") if len(things) == 1 else (f" ({len(things)})", ", ..."[: 5 * (len(things) > NAMED)])
            lines.append(f"{wrong}{count}: {', '.join(things[:NAMED])}{more}")
        return lines

    def stop(self, what: str, remedy: str):
        """Raise one InputError that names the faults, if there are any."""
        if self.found:
            raise InputError(f"{what} cannot be used: {'; '.join(self.lines())}. Remedy: {remedy}")


@contextmanager
def _no_collection():
    """Make many objects without a search for garbage among them, which takes three quarters of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def read_json(path: Path, kind: type, problems: Problems):
    """The content of a JSON file that holds a `kind` (list or dict); an empty one, and a problem, if it does not."""
    try:
        with _no_collection():
            content = json.loads(path.read_bytes())
        if isinstance(content, kind):
            return content
        wrong = f"file that holds no {kind.__name__}"
    except FileNotFoundError:
        wrong = "missing file"
    except OSError as error:
        wrong = f"file that cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        wrong = f"file that is not valid JSON ({error})"
    problems.add(wrong, path.name)
    return kind()


def sift(entries: list, rules: Mapping[str, Callable], problems: Problems, file: str, key: str) -> list:
    """The entries that keep all rules: {what is wrong: whether an entry is right}. A rule may rely on earlier ones.

    A problem names an entry by its `key`, or by itself where it has none. That two have the same key is a problem too.
    """
    for wrong, is_right in rules.items():
        bad = [entry for entry in entries if not is_right(entry)]
        if bad:
            names = [entry.get(key, entry) if isinstance(entry, dict) else entry for entry in bad]
            problems.add(f"{file}: {wrong}", *map(reprlib.repr, names))
            entries = [entry for entry in entries if is_right(entry)]
    times = Counter(entry[key] for entry in entries)
    problems.add(f"{file}: {key} that occurs twice", *(reprlib.repr(k) for k, n in times.items() if n > 1))
    return entries


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_number(value) -> bool:
    """A whole number, as ids are; True and False are none."""
    return type(value) is int


def is_size(width, height) -> bool:
    """Whether a picture can have so many pixels."""
    return is_number(width) and is_number(height) and width > 0 < height and width * height <= MAX_PIXELS


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture of the (H, W) `size` as (H, W, 3) uint8 RGB. Raises InputError without a remedy."""
    try:
        with Image.open(path, formats=FORMATS) as picture:  # EXIF rotation is not applied
            if picture.size == size[::-1]:
                return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception:  # of any type: what is wrong is asked below
        pass
    wrong, detail = picture_fault(path, size) or ("unreadable picture", "")
    raise InputError(f"{wrong} '{path}'{f' ({detail})' * bool(detail)}")


def picture_fault(path: Path, size: tuple[int, int], decode: bool = True) -> tuple[str, str] | None:
    """(what is wrong with a picture, more about it), or None. `size` is (H, W); without `decode` only the file's header
    is read."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.size != size[::-1]:
                width, height = picture.size
                return "picture of another size", f"{width} x {height} pixels, annotated as {size[1]} x {size[0]}"
            if decode:
                picture.load()
    except FileNotFoundError:
        return "missing picture", ""
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            start = file.read(512).lstrip()
        if start.startswith(b"<"):
            return "web page in place of a picture", "an error message of the server that it was fetched from"
        return "file that is no picture", "empty" if not start else ""
    except Exception as error:  # Pillow raises errors of many types on damaged files
        return "unreadable picture", str(error) or type(error).__name__
    return None


def check_pictures(sizes: Mapping[Path, tuple[int, int]], problems: Problems, decode: bool = True):
    """Report every picture that is missing, damaged or not of its (H, W) size. See `picture_fault`."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow decodes without holding Python's lock
    try:
        faults = pool.map(partial(picture_fault, decode=decode), sizes, sizes.values())
        for fault, path in zip(tqdm(faults, "pictures", len(sizes), unit="picture", mininterval=0.5), sizes):
            if fault:
                wrong, detail = fault
                problems.add(wrong, f"{path.name}{f' ({detail})' * bool(detail)}")
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C too


def read_names(path: Path, title: str) -> list[str]:
    """The names in a list, one per line (of a line with several words, the first). Raises InputError for a list that is
    missing, empty or names something twice."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise InputError(f"{title} has no list '{path}' (splits that are there: {there})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list '{path}' of {title} cannot be read ({error}): fetch it anew") from None
    names = [line.split()[0] for line in lines if line.strip()]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice or not names:
        wrong = f"names {', '.join(twice[:NAMED])} twice" if twice else "is empty"
        raise InputError(f"the list '{path}' of {title} {wrong}: fetch it anew")
    return names
