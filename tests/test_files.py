"""Leftovers of dead processes, and folders known by their checksums."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from clipseg_repro.files import CHECKSUMS, alone, changed_files, record_files, sweep, written_whole


def test_sweep_deletes_what_dead_writers_left(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from clipseg_repro.files import written_whole
with written_whole(Path({str(tmp_path)!r}) / "below" / "curve.csv") as temporary:
    temporary.write_text("half")
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    (left,) = (tmp_path / "below").iterdir()
    (tmp_path / ".mine.9.9.9.tmp.txt").touch()
    (tmp_path / ".other.tmp").touch()
    with written_whole(tmp_path / "now.csv") as temporary:
        temporary.write_text("being written")
        sweep(tmp_path)
        assert not left.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"below", "now.csv", ".mine.9.9.9.tmp.txt", ".other.tmp"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.json", "images/1.jpg", "images/2.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
        os.utime(path, (0, 0))
    record_files(tmp_path)
    return tmp_path


def test_the_list_is_sizes_and_checksums(folder):
    listed = json.loads((folder / CHECKSUMS).read_text())
    expected = {n: [len(n), hashlib.sha256(n.encode()).hexdigest()] for n in ("a.json", "images/1.jpg", "images/2.jpg")}
    assert listed == expected
    assert changed_files(folder) == changed_files(folder, every=True) == []
    (folder / "not listed").touch()
    assert changed_files(folder, every=True) == []


@pytest.mark.parametrize(
    ("damage", "changed"),
    [
        (lambda folder: (folder / "a.json").unlink(), ["a.json"]),
        (lambda folder: (folder / "a.json").write_bytes(b"a.jso"), ["a.json"]),
        (lambda folder: (folder / "images/2.jpg").write_bytes(b"images/2.jpG"), ["images/2.jpg"]),  # of the same size
        (lambda folder: (folder / "images/2.jpg").write_bytes(b"images/2.jpg"), []),  # written, and right
        (lambda folder: (folder / CHECKSUMS).write_bytes(b'{"a.json": [6, '), [CHECKSUMS]),
        (lambda folder: (folder / CHECKSUMS).write_bytes(b"5"), [CHECKSUMS]),
        (lambda folder: (folder / CHECKSUMS).write_bytes(b'{"a.json": 5}'), ["a.json"]),
        (lambda folder: (folder / CHECKSUMS).unlink(), [CHECKSUMS]),
    ],
)
def test_changed_files(folder, damage, changed):
    damage(folder)
    assert changed_files(folder) == changed_files(folder, every=True) == changed


def test_unchanged_files_are_read_once(folder, monkeypatch):
    """After that the list is the newest file, as it stays until something is written."""
    os.utime(folder / CHECKSUMS, (1, 1))
    assert changed_files(folder) == []
    os.utime(folder / CHECKSUMS, (2**33, 2**33))  # the clock of this machine may be coarse
    monkeypatch.setattr("clipseg_repro.files.sha256", lambda path: pytest.fail(f"read {path}"))
    assert changed_files(folder) == []


def test_one_process_at_a_time(tmp_path, capfd):
    """The second one says what it waits for; the lock of a killed process is free."""
    lock = tmp_path / ".lock"
    code = f"""
import sys
from pathlib import Path
from clipseg_repro.files import alone
with alone(Path({str(lock)!r}), "building"):
    print("in", flush=True)
    sys.stdin.read()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(start, env=environment, **pipes)
    assert first.stdout.readline() == "in\n"
    second = subprocess.Popen(start, env=environment, **pipes)
    assert second.stderr.readline() == "Another process is building: waiting until it is through.\n"
    first.kill()
    first.communicate()
    assert second.stdout.readline() == "in\n"
    assert second.communicate()[1] == ""
    with alone(lock, "building"):
        assert capfd.readouterr().err == ""
