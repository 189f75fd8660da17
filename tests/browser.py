"""Notebook 13 in JupyterLab, driven in a real Chromium: what is typed, moved and drawn arrives in Python and changes
the picture. Asserts state, not pixels.

    make test-browser
"""

import ast
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client import BlockingKernelClient
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[1]
NOTEBOOK = "13_playground.ipynb"
SHOT = ROOT / ".cache" / "playground.png"  # to look at, and for the README
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ABSENT = (
    f"no Chromium: none of {', '.join(BROWSERS)} is installed. Debian: apt-get install chromium; macOS: brew install "
    "--cask chromium; elsewhere: .venv/bin/python -m playwright install chromium"
)
WAIT = 300  # seconds at most, on a busy machine: torch is imported, a model loaded


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def lab(tmp_path):
    """(address of a JupyterLab that shows a copy of the notebook, its folder of connection files)."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").symlink_to(ROOT / "data")  # beside the notebooks, as in a clone
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, tmp_path / "notebooks")
    runtime = tmp_path / "runtime"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"JUPYTER_RUNTIME_DIR": runtime, "JUPYTER_CONFIG_DIR": tmp_path / "config", "JUPYTER_DATA_DIR": tmp_path}
    known |= {"CLIPSEG_REPRO_DATA": tmp_path / "data", "CLIPSEG_REPRO_RESULTS": tmp_path / "results"}
    known["OMP_WAIT_POLICY"] = "passive"  # threads that wait give way to the browser
    options = [f"--ServerApp.root_dir={tmp_path / 'notebooks'}", f"--ServerApp.port={port}", "--allow-root"]
    options += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--no-browser"]
    settings = tmp_path / "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # no question about them, either
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | {key: str(value) for key, value in known.items()},
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + WAIT
            while not listens(port):
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "lab.log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", runtime
        finally:
            server.terminate()
            server.wait(WAIT)


@pytest.fixture
def page():
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), own if os.path.exists(own) else None)
        if not found:
            pytest.fail(ABSENT, pytrace=False)
        browser = playwright.chromium.launch(executable_path=found)
        page = browser.new_page(viewport={"width": 1280, "height": 1250})
        page.set_default_timeout(1000 * WAIT)
        yield page
        browser.close()


class Kernel:
    """The values of Python expressions in the notebook's kernel."""

    def __init__(self, runtime):
        (connection,) = runtime.glob("kernel-*.json")
        self.client = BlockingKernelClient(connection_file=str(connection))
        self.client.load_connection_file()
        self.client.start_channels()

    def value(self, expression):
        message = self.client.execute("", silent=True, user_expressions={"it": f"({expression})"})
        while True:
            reply = self.client.get_shell_msg(timeout=WAIT)
            if reply["parent_header"].get("msg_id") == message:
                assert reply["content"]["status"] == "ok", f"{expression}: {reply['content']}"
                return ast.literal_eval(reply["content"]["user_expressions"]["it"]["data"]["text/plain"])

    def becomes(self, expression, wanted):
        """Wait until an expression has a value; returns it."""
        deadline = time.monotonic() + WAIT
        while not wanted(value := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {value}"
            time.sleep(0.1)
        return value


def test_what_is_typed_moved_and_drawn_changes_state_and_picture(lab, page):
    address, runtime = lab
    page.goto(f"{address}/lab/tree/{NOTEBOOK}")
    expect(page.get_by_text("| Idle")).to_be_visible(timeout=1000 * WAIT)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    shown = page.locator(".jp-OutputArea-child img.widget-image")
    prompts = page.get_by_placeholder("a prompt")
    expect(prompts).to_have_count(5, timeout=1000 * WAIT)
    prompts.first.scroll_into_view_if_needed()
    kernel = Kernel(runtime)
    found = page.locator(".widget-html-content", has_text="highest probability")

    def picture_after(action):
        """Act, wait for another picture in the browser."""
        before = shown.get_attribute("src")
        action()
        expect(shown).not_to_have_attribute("src", before)

    first, second, third, *_ = kernel.value("play.words")
    expect(found).to_contain_text(third)
    picture_after(lambda: prompts.nth(2).fill(""))
    kernel.becomes("play.rows()", lambda rows: rows == [0, 1])
    picture_after(lambda: prompts.nth(2).press_sequentially(third))
    assert kernel.becomes("play.words[:3]", lambda words: words[2] == third) == [first, second, third]

    canvas = page.locator(".jp-OutputArea-child canvas")
    columns, rows = kernel.value("play.picture(play.support).shape[1::-1]")

    def draw(*places):
        """Press the mouse at the first place, in pixels of the support picture, and move it to the others."""
        canvas.scroll_into_view_if_needed()
        x, y, width, height = (canvas.bounding_box()[side] for side in ("x", "y", "width", "height"))
        places = [(x + a * width / columns, y + b * height / rows) for a, b in places]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=5)
        page.mouse.up()

    left, top, right, bottom = kernel.value("box_of(clear[lender][shared])")
    picture_after(lambda: draw((left, top), (right, bottom)))
    (box,) = kernel.becomes("play.drawn", bool)
    assert box["tool"] == "box"
    assert box["points"] == [pytest.approx(corner, abs=3) for corner in ((left, top), (right, bottom))]
    page.locator(".jp-OutputArea-output", has=page.locator("canvas")).screenshot(path=SHOT)

    page.get_by_role("button", name="brush").click()
    draw((0.6 * columns, 0.2 * rows), (0.8 * columns, 0.2 * rows), (0.8 * columns, 0.4 * rows))
    stroke = kernel.becomes("play.drawn", lambda drawn: len(drawn) == 2)[1]
    assert stroke["tool"] == "brush" and len(stroke["points"]) > 3
    expect(page.locator(".widget-html-content pre")).to_contain_text(str(stroke["points"][-1]))  # the Python call

    marked = kernel.value("(play.maps() > play.threshold).sum().item()")
    page.locator(".widget-slider", has_text="threshold").locator(".noUi-handle").focus()
    picture_after(lambda: [page.keyboard.press("ArrowRight") for _ in range(40)])
    kernel.becomes("play.threshold", lambda threshold: threshold > 0.85)
    kernel.becomes("(play.maps() > play.threshold).sum().item()", lambda pixels: pixels < marked)

    page.get_by_role("button", name="clear").click()
    kernel.becomes("play.drawn", lambda drawn: drawn == [])
    page.get_by_label("image").select_option(index=2)
    third_picture = kernel.value("list(play.pictures)[2]")
    kernel.becomes("play.image", lambda name: name == third_picture)
