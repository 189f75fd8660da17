"""`data fetch` from a publisher that is a folder on this machine; `data list` and `data check` of what came."""

import http.server
import io
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from hashlib import md5

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipseg_repro.cli import app
from clipseg_repro.datasets import catalogue
from clipseg_repro.datasets.catalogue import CATALOGUE, Archive
from clipseg_repro.errors import InputError

DEVKIT = "VOCdevkit/VOC2012"


def png(array, mode=None):
    stored = io.BytesIO()
    Image.fromarray(array, mode).save(stored, "PNG")
    return stored.getvalue()


MEMBERS = {
    f"{DEVKIT}/ImageSets/Segmentation/val.txt": b"2007_000033\n",
    f"{DEVKIT}/JPEGImages/2007_000033.jpg": png(np.zeros((4, 6, 3), np.uint8)),
    f"{DEVKIT}/SegmentationClass/2007_000033.png": png(np.full((4, 6), 12, np.uint8)),
}


def tar(members):
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stored.getvalue()


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """(folder, address) of a site that serves that folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPSEG_REPRO_DATA", str(tmp_path / "data"))
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in ("data", *arguments, "--scale", "paper")])


def test_a_data_set_is_fetched_listed_and_checked(publisher, run, monkeypatch):
    folder, site = publisher
    archive = tar(MEMBERS)
    (folder / "voc.tar").write_bytes(archive)
    source = replace(CATALOGUE["voc"], archives=(Archive(f"{site}/voc.tar", "..", md5(archive).hexdigest()),))
    monkeypatch.setitem(catalogue.CATALOGUE, "voc", source)
    assert "missing: VOC2012/JPEGImages" in run("list").stdout
    fetched = run("fetch", "voc")
    assert fetched.exit_code == 0 and source.terms in fetched.stdout
    assert "val: 1 pictures, 1 classes" in run("check", "voc").stdout
    (folder / "voc.tar").unlink()  # done is done: nobody is asked again
    assert run("fetch", "voc").exit_code == 0
    assert "VOCdevkit: there" in run("list").stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("voc.tar", b"<html>Please log in", "a web page"),
        ("voc.tar", tar(MEMBERS)[:-9000] + b"\xff", "not the file with MD5"),
        ("voc.tar", tar({"../../out.png": b"\x89PNG"}), "outside"),
        ("voc.tar", None, "dead or closed"),
    ],
)
def test_what_is_not_the_publishers_is_refused_and_removed(publisher, tmp_path, name, content, message):
    folder, site = publisher
    if content is not None:
        (folder / name).write_bytes(content)
    checksum = md5(tar(MEMBERS)).hexdigest() if "MD5" in message else None
    source = replace(CATALOGUE["voc"], archives=(Archive(f"{site}/{name}", "..", checksum),))
    with pytest.raises(InputError, match=message):
        source.fetch(tmp_path / "data")
    assert not any(path.is_file() and path.stat().st_size for path in (tmp_path / "data").rglob("*"))
    assert not list(tmp_path.glob("out.png"))


def test_zip_members_stay_in_their_folder(publisher, tmp_path):
    folder, site = publisher
    with zipfile.ZipFile(folder / "lvis.zip", "w") as archive:
        archive.writestr("../../out.json", "{}")
    source = replace(CATALOGUE["lvis"], archives=(Archive(f"{site}/lvis.zip"),))
    with pytest.raises(InputError, match="outside its folder"):
        source.fetch(tmp_path / "data")
    assert not (tmp_path / "out.json").exists()


def test_evaluation_of_all_without_data_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPSEG_REPRO_DATA", str(tmp_path / "none"))
    refused = CliRunner().invoke(app, ["evaluate", "mini", "--all", "--scale", "paper"])
    assert refused.exit_code == 2 and "data list --scale paper" in refused.output


def test_what_no_program_can_fetch_names_the_steps_and_the_place(run, tmp_path):
    refused = run("fetch", "fss-1000")
    assert refused.exit_code == 2
    for word in ("HKUSTCV/FSS-1000", "splits/test.txt", str(tmp_path / "data" / "FSS-1000")):
        assert word in " ".join(refused.output.split()), refused.output
