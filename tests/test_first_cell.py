"""The notebooks' first cell finds the package: in a clone, on Colab, and where it cannot it says what to set."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
OPENED = "https://github.com/somebody/clipseg-repro/blob/main/notebooks/00_quickstart.ipynb"
# Stands in for pip: writes down what it was asked for, and "installs" an empty package.
PIP = """
import json, pathlib, sys
site = pathlib.Path(__file__).parents[1]
(site / "asked.json").write_text(json.dumps(sys.argv[1:]))
(site / "clipseg_repro").mkdir()
(site / "clipseg_repro/__init__.py").touch()
"""


def first_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_it_is_the_same_in_all():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1


@pytest.fixture
def environment(tmp_path):
    """(run, site): `run` runs the cell in a notebooks folder with a fresh environment's Python, which has a torch, as
    Colab does, and no package of ours; `site` is that environment's folder of packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "pip").mkdir()
    (site / "pip/__main__.py").write_text(PIP)
    (site / "torch-2.9.1+cu126.dist-info").mkdir()
    (site / "torch-2.9.1+cu126.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1+cu126\n"
    )
    (tmp_path / "notebooks").mkdir()

    def run(**variables):
        code = first_cell(NOTEBOOKS[0]) + "\nimport clipseg_repro; print(clipseg_repro.__file__)"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COLAB", "KMP"))}
        command = [tmp_path / "venv/bin/python", "-c", code]
        where = {"cwd": tmp_path / "notebooks", "env": clean | variables}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **where)

    return run, site


@pytest.fixture
def colab():
    """A server that answers as Colab's does about the notebook that is open: (variables, answer to change)."""
    answer = [{"name": "00_quickstart.ipynb", "path": f"fileId={quote(OPENED, safe='')}"}]

    class Sessions(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/api/sessions" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Sessions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": str(server.server_port)}, answer
    server.shutdown()


def test_on_colab_it_installs_from_where_the_notebook_was_opened_and_keeps_torch(environment, colab):
    run, site = environment
    done = run(**colab[0])
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    asked = json.loads((site / "asked.json").read_text())
    address = "clipseg-repro @ git+https://github.com/somebody/clipseg-repro@main"
    assert asked == ["install", "-q", address, "torch==2.9.1+cu126"]


def test_in_a_clone_it_uses_the_clone(environment, tmp_path):
    run, site = environment
    (tmp_path / "clipseg_repro").mkdir()
    (tmp_path / "clipseg_repro/__init__.py").touch()
    done = run()
    assert done.returncode == 0, done.stderr
    assert not (site / "asked.json").exists()
    assert Path(done.stdout.strip()).resolve() == (tmp_path / "clipseg_repro/__init__.py").resolve()


@pytest.mark.parametrize("path", ["fileId=1aBcDrive", None])
def test_else_it_says_in_a_line_what_to_set(environment, colab, path):
    variables, answer = colab
    answer[0]["path"] = path
    run, site = environment
    done = run(**(variables if path else {}))
    assert done.returncode == 1
    assert done.stderr == "Set REPOSITORY in this cell to the address of clipseg-repro, and run it again.\n"
    assert not (site / "asked.json").exists()
