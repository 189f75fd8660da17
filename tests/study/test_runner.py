"""The study runs tiny notebooks in a project made for the test."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client.kernelspec import KernelSpecManager

from clipseg_repro.errors import InputError
from clipseg_repro.study import runner
from clipseg_repro.study.results import recorded
from clipseg_repro.study.scales import Scale, get_scale

REPOSITORY = Path(__file__).parents[2]
TRACE = "open('../trace', 'a').write('{} ' + SCALE + '\\n')"  # says who ran, and with which parameter


def write_notebook(path, *cells):
    parameters = nbformat.v4.new_code_cell("SCALE = 'unset'", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two notebooks, as the working folder; its data need no preparation."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "clipseg-repro"\n')
    write_notebook(tmp_path / "notebooks" / "00_first.ipynb", TRACE.format("first"), "print('hello')")
    write_notebook(tmp_path / "notebooks" / "01_second.ipynb", TRACE.format("second"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPSEG_REPRO_RESULTS", raising=False)
    monkeypatch.delenv("CLIPSEG_REPRO_DATA", raising=False)
    monkeypatch.setattr(Scale, "prepare", lambda self: None)
    return tmp_path


def trace(project):
    return (project / "trace").read_text().splitlines()


def test_runs_in_order_once_and_again_after_a_change(project):
    copies = runner.reproduce()
    assert copies == [project / "results/executed" / name for name in ("00_first.ipynb", "01_second.ipynb")]
    assert trace(project) == ["first mini", "second mini"]
    assert "hello" in (project / "results/logs/00_first.log").read_text()
    assert all(cell.execution_count for cell in nbformat.read(copies[0], as_version=4).cells)

    write_notebook(project / "notebooks" / "01_second.ipynb", TRACE.format("changed"))
    runner.reproduce()
    assert trace(project)[2:] == ["changed mini"]
    runner.reproduce(only=["00"], resume=False)
    assert trace(project)[3:] == ["first mini"]


def test_runs_again_after_more_was_measured(project):
    (project / "notebooks" / "01_second.ipynb").unlink()
    runner.reproduce()
    measured = project / "results" / "measured" / "clipseg-pc+-seed1.npz"
    measured.parent.mkdir()
    for part in ("phrasecut-text", "phrasecut-visual"):  # as the queue measures, one after the other
        np.savez(measured, **dict(np.load(measured)) if measured.exists() else {}, **{part: np.zeros(1, np.uint8)})
        runner.reproduce()
        runner.reproduce()
    np.savez(measured, **dict(np.load(measured)), **{"of a notebook's own": np.zeros(1, np.uint8)})
    runner.reproduce()
    assert trace(project) == ["first mini"] * 3


def test_failure_names_notebook_cell_and_error_and_the_next_run_goes_on_there(project):
    second = project / "notebooks" / "01_second.ipynb"
    write_notebook(second, "x = 1", "# why\ny = x / 0")
    with pytest.raises(runner.NotebookFailed, match=r"01_second.ipynb, cell 3 of 3 \(# why\): ZeroDivisionError") as e:
        runner.reproduce()
    assert "01_second.partial.ipynb" in str(e.value)
    assert [path.name for path in (project / "results/executed").glob("*") if "partial" not in path.name] == [
        "00_first.ipynb"
    ]
    write_notebook(second, TRACE.format("mended"))
    runner.reproduce()
    assert trace(project) == ["first mini", "mended mini"]
    assert not list((project / "results/executed").glob("*partial*"))


RESULTS = """
import hashlib, json, pathlib  # as study.results does, without torch
results = pathlib.Path("../results")
made = {"tables/one.csv": b"a", "tables/one.md": b"| a |", "figures/line.png": b"b"}
for name, content in made.items():
    (results / name).parent.mkdir(exist_ok=True)
    (results / name).write_bytes(content)
entries = {n: {"sha256": hashlib.sha256(c).hexdigest()} for n, c in made.items() if not n.endswith(".md")}
(results / "provenance.json").write_text(json.dumps(entries))
"""


def test_a_notebook_is_done_while_its_results_are_there_as_it_wrote_them(project):
    write_notebook(project / "notebooks" / "00_first.ipynb", RESULTS, TRACE.format("first"))
    runner.reproduce()
    results = project / "results"
    made = ["figures/line.png", "provenance.json", "tables/one.csv", "tables/one.md"]
    written = {name: (results / name).read_bytes() for name in made}
    runner.reproduce()
    assert trace(project) == ["first mini", "second mini"]

    (copy,) = (results / "executed").glob("00*")
    scale = get_scale("mini")
    runs = runner._runs(scale, recorded(scale))
    key = runner._key(project / "notebooks" / "00_first.ipynb", {"SCALE": scale.name}, runs)
    assert runner._finished(copy, key, scale, recorded(scale))
    for name in made:
        for damage in (Path.unlink, lambda path: path.write_bytes(b"{}")):
            damage(results / name)
            assert not runner._finished(copy, key, scale, recorded(scale)), name
            (results / name).write_bytes(written[name])

    (results / made[0]).unlink()
    (results / made[2]).write_text("edited")
    (results / made[3]).unlink()
    leftover = results / "tables" / ".one.csv.999999999.tmp"  # no system has so many processes
    leftover.touch()
    runner.reproduce()
    assert not leftover.exists()
    assert trace(project)[2:] == ["first mini"]
    assert {name: (results / name).read_bytes() for name in made} == written


def test_damaged_provenance_stops_before_the_first_notebook(project):
    (project / "results").mkdir()
    (project / "results/provenance.json").write_text("{")
    with pytest.raises(InputError, match=r"provenance.json' is damaged"):
        runner.reproduce(resume=False)
    assert not (project / "trace").exists()


def test_the_kernel_is_this_interpreters(project, monkeypatch):
    foreign = project / "foreign"
    (foreign / "kernels/python3").mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "Another environment's", "language": "python"}
    (foreign / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(foreign))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(foreign))
    assert KernelSpecManager().get_kernel_spec("python3").argv == spec["argv"]
    write_notebook(project / "notebooks" / "00_first.ipynb", "import sys; print(sys.executable)")
    runner.reproduce(only=["00"])
    assert (project / "results/logs/00_first.log").read_text().splitlines()[-1] == sys.executable


def test_ctrl_c_ends_cleanly_and_the_next_run_goes_on(project):
    slow = project / "notebooks" / "01_second.ipynb"
    write_notebook(slow, TRACE.format("slow"), "import time; time.sleep(600)")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job's is ignored
        "from clipseg_repro import cli; from clipseg_repro.study import scales; "
        "scales.Scale.prepare = lambda self: None; "
        "cli.app(['reproduce'], prog_name='clipseg-repro')"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            if (project / "trace").exists() and "slow mini" in trace(project):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            message = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert message.rstrip().endswith("Stopped. Run the same command again to go on from here.")
    assert "Traceback" not in message

    write_notebook(slow, TRACE.format("quick"))
    runner.reproduce()
    assert trace(project) == ["first mini", "slow mini", "quick mini"]


@pytest.mark.parametrize("name", ["07", "second", "01_secnd"])
def test_unknown_notebook(project, name):
    with pytest.raises(InputError, match=rf"unknown notebook '{name}': choose from 00_first, 01_second"):
        runner.reproduce(only=[name])


def test_no_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="inside a clone of the repository"):
        runner.reproduce()


def test_results_that_cannot_be_written(project, monkeypatch):
    (project / "results").write_text("a file in the place of the folder")
    with pytest.raises(InputError, match=r"cannot write '.*results.*free disk space"):
        runner.reproduce()
    (project / "results").unlink()

    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device", str(dir))

    monkeypatch.setattr(runner.tempfile, "TemporaryFile", full)
    with pytest.raises(InputError, match=r"cannot write '.*executed' \(No space left on device\)"):
        runner.reproduce()
    assert not (project / "trace").exists()
