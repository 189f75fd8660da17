"""Files from the web: whole or not at all, and resumed where they were stopped. And what else may be in their place."""

import codecs
import os
import re
import zipfile
from pathlib import Path

import requests
from tqdm import tqdm

from clipseg_repro.errors import InputError

CHUNK = 1 << 13  # bytes; what is cut off within a chunk is fetched again
TIMEOUT = 30  # seconds without an answer

# How files begin that circulate in place of weights and archives, and what they are.
FOREIGN = {
    rb"$": "empty",
    rb"version https://git-lfs": "a Git LFS pointer; `git lfs pull` in its repository gets the file itself",
    rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype|html|head|\?xml)": "a web page, as sent for errors or log-ins",
}


def foreign_content(path):
    """What stands in place of a file of weights, archive or JSON, as "a web page", by its content; None if nothing."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    for beginning, name in FOREIGN.items():
        if re.match(beginning, start, re.IGNORECASE | re.DOTALL):
            return name
    if path.suffix not in (".json", ".safetensors"):  # which are text, at least in the beginning
        try:
            codecs.getincrementaldecoder("utf-8")().decode(start)
            return "text, or was converted as if it were, which cannot be undone"
        except UnicodeDecodeError:
            pass
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"a zip archive cut off after {path.stat().st_size} bytes"
    return None


def download(url, path, otherwise):
    """Fetch `url` to the file `path`, whose folder is made if missing.

    What has arrived is kept beside it as `<name>.part`; the next call asks the server for the rest. Raises InputError
    if the server cannot be reached, refuses, or sends less than it announced; `otherwise` advises what to do without
    the file.
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
        if isinstance(error, requests.HTTPError):
            status = 404 if error.response is None else error.response.status_code
            busy = status == 429 or status >= 500
            remedy = "try again later, or" if busy else "this address is dead or closed to you:"
            remedy += f" {otherwise}"
        else:
            cause = "network" if isinstance(error, requests.RequestException) else "disk"
            remedy = f"check the {cause}, then run the same command again, or {otherwise}"
        raise InputError(f"cannot fetch {url} to '{path}' ({reason}): {remedy}; {kept} bytes are kept") from None


def _append_rest(url, file, name):
    file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}  # sizes and positions are those of the file itself
    if file.tell():
        headers["Range"] = f"bytes={file.tell()}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        begins = response.headers.get("Content-Range", "").startswith(f"bytes {file.tell()}-")
        if file.tell() and response.status_code == 416:  # what we have is not a part of its file
            file.truncate(0)
            return _append_rest(url, file, name)
        if not response.ok:
            raise requests.HTTPError(f"{response.status_code} {response.reason}", response=response)
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise requests.HTTPError("a web page was sent in its place")
        if not (response.status_code == 206 and begins):
            file.truncate(0)  # this server does not resume
            file.seek(0)
        length = response.headers.get("Content-Length")
        total = file.tell() + int(length) if length else None
        with tqdm(total=total, initial=file.tell(), desc=name, unit="B", unit_scale=True, leave=False) as bar:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total and file.tell() != total:
            raise requests.ConnectionError(f"{file.tell()} bytes arrived, of {total}")
