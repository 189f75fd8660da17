"""Files are written whole or not at all, and known by their checksums."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path


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


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> str | None:
    """SHA-256 over the annotation files of a data set (its images follow from them); None if there are none."""
    files = sorted(Path(folder).glob("*.json"))
    together = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    return hashlib.sha256(together.encode()).hexdigest() if files else None
