"""Files from the web: whole or not at all, and resumed where they were stopped."""

import os
from pathlib import Path

import requests
from tqdm import tqdm

from clipseg_repro.errors import InputError

CHUNK = 1 << 13  # bytes; what is cut off within a chunk is fetched again
TIMEOUT = 30  # seconds without an answer


def download(url, path):
    """Fetch `url` to the file `path`, whose folder is made if missing.

    What has arrived is kept beside it as `<name>.part`; the next call asks the server for the rest. Raises InputError if
    the server cannot be reached, refuses, or sends less than it announced.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            _append_rest(url, file, path.name)
        os.replace(part, path)
    except OSError as error:  # those of requests too
        kept = part.stat().st_size if part.is_file() else 0
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot fetch {url} to '{path}' ({reason}): check the network and the disk, then run the same command "
            f"again; {kept} bytes are kept"
        ) from None


def _append_rest(url, file, name):
    file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}  # sizes and positions are those of the file itself
    if file.tell():
        headers["Range"] = f"bytes={file.tell()}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        begins = response.headers.get("Content-Range", "").startswith(f"bytes {file.tell()}-")
        if file.tell() and not (response.status_code == 206 and begins):
            file.seek(0)
            file.truncate()  # this server does not resume, or what we have is not a part of its file
            if response.status_code == 416:
                return _append_rest(url, file, name)
        response.raise_for_status()
        length = response.headers.get("Content-Length")
        total = file.tell() + int(length) if length else None
        with tqdm(total=total, initial=file.tell(), desc=name, unit="B", unit_scale=True, leave=False) as bar:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total and file.tell() != total:
            raise OSError(f"{file.tell()} bytes arrived, of {total}")
