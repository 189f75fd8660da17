"""Files are written whole or not at all; folders of generated files are known by their checksums."""

import hashlib
import json
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

CHECKSUMS = "build/checksums.json"  # below the folder whose files it lists


@contextmanager
def written_whole(path: Path):
    """Give a temporary path beside `path`; on success it replaces `path`, on failure nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, pattern: str = "**/.*.tmp"):
    """Delete what `written_whole` left in `folder` when its process was killed; `pattern` limits it to some files."""
    for path in Path(folder).glob(pattern):
        writer = path.name.split(".")[-2]
        if re.fullmatch(r"[0-9]{1,9}", writer) and not psutil.pid_exists(int(writer)):
            with suppress(OSError):
                path.unlink()


@contextmanager
def alone(path: Path, doing: str):
    """Hold the lock file `path`; while another process holds it, say so and wait. A dead process holds none."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"Another process is {doing}: waiting until it is through.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def checksum(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def sha256(path: Path) -> str:
    return checksum(path, "sha256")


def record_files(folder: Path):
    """List size and SHA-256 of every file below `folder` in its CHECKSUMS."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {p.relative_to(folder).as_posix(): [p.stat().st_size, sha256(p)] for p in paths}
    found.pop(CHECKSUMS, None)
    with written_whole(folder / CHECKSUMS) as temporary:
        temporary.write_text(json.dumps(found, indent=0), encoding="utf-8")


def changed_files(folder: Path, every: bool = False) -> list[str]:
    """The files that are missing or not as CHECKSUMS lists them; CHECKSUMS itself if it cannot be read.

    Sizes are always compared; contents where a file is newer than the list, or of `every` file. Files that are found
    right make the list the newest again. Files that are not listed are left alone.
    """
    listing = folder / CHECKSUMS
    try:
        since = listing.stat().st_mtime_ns
        known = dict(json.loads(listing.read_bytes()))
    except (OSError, ValueError, TypeError):
        return [CHECKSUMS]
    changed, read = [], 0
    for name, recorded in known.items():
        path = f"{folder}/{name}"
        try:
            stat = os.stat(path)
            size, checksum = recorded
            right = stat.st_size == size
            if right and (every or max(stat.st_mtime_ns, stat.st_ctime_ns) >= since):
                read += 1
                right = sha256(path) == checksum
        except (OSError, ValueError, TypeError):
            right = False
        if not right:
            changed.append(name)
    if read and not changed:
        with suppress(OSError):  # a read-only folder is read again each time
            os.utime(listing)
    return changed


def fingerprint(folder: Path) -> str | None:
    """SHA-256 over the annotation files of a data set (its images follow from them); None if there are none.

    The manifest of a build is none: it names the code that drew the data, and changes where the data do not.
    """
    files = sorted(path for path in Path(folder).glob("*.json") if path.name != "manifest.json")
    together = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    return hashlib.sha256(together.encode()).hexdigest() if files else None
