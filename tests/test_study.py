"""The study runs tiny notebooks in a project made for the test; results are checked as the files they become."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipseg_repro import study
from clipseg_repro.errors import InputError
from clipseg_repro.results import provenance, record, save_figure, save_table
from clipseg_repro.scales import SCALES, Scale, get_scale, project_root

REPOSITORY = Path(__file__).parents[1]
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
    copies = study.reproduce()
    assert copies == [project / "results/executed" / name for name in ("00_first.ipynb", "01_second.ipynb")]
    assert trace(project) == ["first mini", "second mini"]
    assert "hello" in (project / "results/logs/00_first.log").read_text()
    assert all(cell.execution_count for cell in nbformat.read(copies[0], as_version=4).cells)

    write_notebook(project / "notebooks" / "01_second.ipynb", TRACE.format("changed"))
    study.reproduce()
    assert trace(project)[2:] == ["changed mini"]
    study.reproduce(only=["00"], resume=False)
    assert trace(project)[3:] == ["first mini"]


def test_failure_names_notebook_cell_and_error_and_the_next_run_goes_on_there(project):
    second = project / "notebooks" / "01_second.ipynb"
    write_notebook(second, "x = 1", "# why\ny = x / 0")
    with pytest.raises(study.NotebookFailed, match=r"01_second.ipynb, cell 3 of 3 \(# why\): ZeroDivisionError") as e:
        study.reproduce()
    assert "01_second.partial.ipynb" in str(e.value)
    assert [path.name for path in (project / "results/executed").glob("*") if "partial" not in path.name] == [
        "00_first.ipynb"
    ]
    write_notebook(second, TRACE.format("mended"))
    study.reproduce()
    assert trace(project) == ["first mini", "mended mini"]
    assert not list((project / "results/executed").glob("*partial*"))


def test_ctrl_c_ends_cleanly_and_the_next_run_goes_on(project):
    slow = project / "notebooks" / "01_second.ipynb"
    write_notebook(slow, TRACE.format("slow"), "import time; time.sleep(600)")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # background jobs inherit it ignored
        "from clipseg_repro import cli, scales; scales.Scale.prepare = lambda self: None; "
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
    study.reproduce()
    assert trace(project) == ["first mini", "slow mini", "quick mini"]


@pytest.mark.parametrize("name", ["07", "second", "01_secnd"])
def test_unknown_notebook(project, name):
    with pytest.raises(InputError, match=rf"unknown notebook '{name}': choose from 00_first, 01_second"):
        study.reproduce(only=[name])


def test_no_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="inside a clone of the repository"):
        study.reproduce()


def test_results_that_cannot_be_written(project, monkeypatch):
    (project / "results").write_text("a file in the place of the folder")
    with pytest.raises(InputError, match=r"cannot write '.*results.*free disk space"):
        study.reproduce()
    (project / "results").unlink()

    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device", str(dir))

    monkeypatch.setattr(study.tempfile, "TemporaryFile", full)
    with pytest.raises(InputError, match=r"cannot write '.*executed' \(No space left on device\)"):
        study.reproduce()
    assert not (project / "trace").exists()


def test_scales(project, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(project / "notebooks")
    monkeypatch.delenv("CLIPSEG_REPRO_DATA", raising=False)
    monkeypatch.setenv("CLIPSEG_REPRO_RESULTS", "elsewhere")
    assert project_root() == project
    assert get_scale("mini").phrasecut == project / "data/mini/PhraseCut/VGPhraseCut_v0"
    assert get_scale("paper").results == project / "elsewhere/paper"
    assert len({get_scale(name).results for name in SCALES}) == len(SCALES), "one scale would overwrite the other's"
    with pytest.raises(InputError, match="unknown scale 'large': choose one of mini, paper"):
        get_scale("large")
    with pytest.raises(InputError, match=r"no PhraseCut data in .*data/README.md"):
        get_scale("paper").prepare()


@pytest.fixture
def scale(tmp_path, tiny_folder):
    root = tmp_path / "VGPhraseCut_v0"
    root.mkdir()
    (root / "refer_test.json").write_text("[]")
    return replace(SCALES["mini"], model=str(tiny_folder), phrasecut=root, results=tmp_path / "results")


def test_table(scale):
    frame = pd.DataFrame({"a|b": ["x", "y"], "miou": [0.43449, np.nan], "n": [3, 4]}).set_index("a|b")
    saved = save_table(frame, "table3", "PhraseCut.", scale)
    path = scale.results / "tables/table3.csv"
    assert path.read_bytes() == b"a|b,miou,n\nx,0.434,3\ny,,4\n"
    pd.testing.assert_frame_equal(pd.read_csv(path), saved)
    assert path.with_suffix(".md").read_text().splitlines() == [
        "PhraseCut.",
        "",
        r"| a\|b | miou | n |",
        "| :--- | ---: | ---: |",
        "| x | 0.434 | 3 |",
        "| y |  | 4 |",
    ]


def test_provenance_holds_for_every_file_and_stays_while_the_file_does(scale, tiny_folder):
    book = scale.results / "provenance.json"
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", scale)
    entry = json.loads(book.read_text())["tables/one.csv"]
    assert entry["sha256"] == hashlib.sha256((scale.results / "tables/one.csv").read_bytes()).hexdigest()
    assert entry["model"]["sha256"] == hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert entry["caption"] == "One."
    assert len(entry["data"]) == 64
    assert set(provenance(scale)) >= {"version", "commit", "dirty", "seed", "time", "python", "torch", "machine"}

    other = replace(scale, seed=7)
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", other)
    assert json.loads(book.read_text())["tables/one.csv"] == entry
    save_table(pd.DataFrame({"a": [2]}), "one", "One.", other)
    assert json.loads(book.read_text())["tables/one.csv"]["seed"] == 7
    curve = scale.results / "training" / "curve.csv"
    curve.parent.mkdir()
    curve.write_text("step\n")
    record(curve, scale)
    assert set(json.loads(book.read_text())) == {"tables/one.csv", "training/curve.csv"}


def test_figure_is_the_same_bytes_each_time(scale):
    written = []
    for _ in range(2):
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.plot([0, 1])
        save_figure(figure, "line", scale)
        plt.close(figure)
        written.append((scale.results / "figures/line.png").read_bytes())
    assert written[0] == written[1]
    assert "Software" not in Image.open(scale.results / "figures/line.png").info
    with pytest.raises(InputError, match=r"result name '\.\./x'"):
        save_figure(figure, "../x", scale)
