"""Controls for the playground, and small ones for a single image. They need someone who looks: see `attended`."""

import asyncio
import base64
import sys
import time
from html import escape
from pathlib import Path

import anywidget
import cv2
import ipywidgets as ui
import traitlets
from IPython import get_ipython
from IPython.display import display

from clipseg_repro.errors import InputError
from clipseg_repro.pictures import load_image
from clipseg_repro.playground.state import COLOURS, VIEWS
from clipseg_repro.plotting import overlay
from clipseg_repro.prompts import RECIPES, interpolate
from clipseg_repro.segmenter import Segmenter

PAUSE = 0.15  # seconds without a key or a move after which the pictures are made
LONGEST = 640  # pixels of a picture's longer side as it is shown
_WIDE, _NARROW = {"width": "330px"}, {"width": "300px"}


def attended():
    """Whether someone sits before this notebook, in JupyterLab or Colab. papermill, nbconvert and nbval execute cells,
    too, but let them ask for no input."""
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    return "google.colab" in sys.modules or bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


def show(playground):
    """Display the controls of a `Playground`, which they change. Does nothing unless `attended`."""
    if attended():
        display(Controls(playground))  # by `display`: the way on which Colab adds how to load the canvas


def explore(segmenter, image, prompt, example=None):
    """Display an image with what a phrase finds in it, the words and the threshold to play with; with an `example`
    (VisualPrompt), also a, its share of the prompt. Does nothing unless `attended`.

    The segmenter's query image is left alone. image: whatever `load_image` takes."""
    if attended():
        display(_explorer(segmenter, image, prompt, example))


def _explorer(segmenter, image, prompt, example):
    image, segmenter = load_image(image), Segmenter(segmenter.model, segmenter.processor)
    segmenter.set_image(image)
    condition = None if example is None else segmenter.conditions(example)[0]
    words = ui.Text(prompt, description="prompt", layout=_WIDE)
    threshold, mix = _share("threshold", 0.5), _share("a", 0.5)
    picture, message = ui.Image(layout={"max_width": "480px"}), ui.HTML()  # small enough to see with its controls

    def update():
        asked = words.value if condition is None else interpolate(words.value, condition, mix.value)
        (probability,) = segmenter.predict(asked)
        picture.value = _png(overlay(image, probability, outline=probability > threshold.value))
        message.value = f"highest probability {probability.max():.2f}"

    controls = [words, threshold] + [mix] * (example is not None)
    update = _Soon(update, message)
    for control in controls:
        control.observe(update, "value")
    update.now()
    return ui.VBox([*controls, picture, message])


class Canvas(anywidget.AnyWidget):
    """A picture to draw on, boxes or brush strokes.

    picture: its address, "data:..."; size: (width, height) of the whole picture, in whose pixels `drawn` is, as for
    `drawn_mask`. tool: "box" or "brush"."""

    _esm = Path(__file__).with_name("canvas.js")
    picture = traitlets.Unicode().tag(sync=True)
    size = traitlets.List().tag(sync=True)
    tool = traitlets.Unicode("box").tag(sync=True)
    drawn = traitlets.List().tag(sync=True)


class Controls(ui.VBox):
    """The controls of a `Playground`, and its picture."""

    def __init__(self, playground):
        self.playground = play = playground
        names = list(play.pictures)
        self.image = ui.Dropdown(options=names, value=play.image, description="image", layout=_WIDE)
        self.upload = ui.FileUpload(accept="image/*", description="upload", layout={"margin": "0 0 0 92px"})
        filled = [*play.words, *[""] * len(COLOURS)]
        self.words = [ui.Text(filled[row], placeholder="a prompt", layout=_NARROW) for row in range(len(COLOURS))]
        self.background = ui.Text(play.background, placeholder="none", description="background", layout=_WIDE)
        self.threshold = _share("threshold", play.threshold)
        self.support = ui.Dropdown(options=names, value=play.support, description="example in", layout=_WIDE)
        self.tool = ui.ToggleButtons(options=["box", "brush"], style={"button_width": "70px"})
        self.clear = ui.Button(description="clear", layout={"width": "70px"})
        self.canvas = Canvas(drawn=play.drawn)
        self.mix = _share("a", play.mix)
        self.recipe = ui.Dropdown(options=list(RECIPES), value=play.recipe, description="recipe", layout=_WIDE)
        self.view = ui.ToggleButtons(options=VIEWS, value=play.view, style={"button_width": "110px"})
        self.picture, self.message, self.found = ui.Image(layout={"max_width": "100%"}), ui.HTML(), ui.HTML()
        self.file = ui.Text("playground.png", layout={"width": "180px"})
        self.save = ui.Button(description="save the picture")
        self.call = ui.HTML()

        traitlets.link((self.tool, "value"), (self.canvas, "tool"))
        self.soon = _Soon(self._update, self.message)
        for control in [self.image, *self.words, self.background, self.threshold, self.mix, self.recipe, self.view]:
            control.observe(self.soon, "value")
        self.canvas.observe(self.soon, "drawn")
        self.support.observe(self._change_support, "value")
        self.upload.observe(self._take, "value")
        self.clear.on_click(lambda _: self.canvas.set_trait("drawn", []))
        self.save.on_click(self._save)
        self._show_support()
        self.soon.now()

        swatch = "<span style='color: {}; font-size: 22px'>&#9632;</span>"
        rows = [ui.HBox([ui.HTML(swatch.format(colour)), text]) for colour, text in zip(COLOURS, self.words)]
        asked = [self.image, self.upload, *rows, self.background, self.threshold]
        example = [self.support, ui.HBox([self.tool, self.clear]), self.canvas, self.mix, self.recipe]
        result = [self.view, self.picture, self.found, self.message, ui.HBox([self.file, self.save])]
        columns = [ui.VBox(asked + example, layout={"width": "360px"}), ui.VBox(result, layout={"flex": "1 1 0"})]
        super().__init__([ui.HBox(columns), ui.HTML("<b>The same in Python</b>"), self.call])

    def _update(self):
        play = self.playground
        play.image, play.support, play.drawn = self.image.value, self.support.value, list(self.canvas.drawn)
        play.words, play.background = [text.value for text in self.words], self.background.value
        play.threshold, play.mix, play.recipe = self.threshold.value, self.mix.value, self.recipe.value
        play.view = self.view.value
        self.picture.value = _png(play.shown())
        self.found.value = "<br>".join(
            f"<span style='color: {COLOURS[row]}'>&#9632;</span> {escape(play.words[row]) or 'the example'}: highest "
            f"probability {highest:.2f}, {share:.0%} of the picture"
            for row, (highest, share) in zip(play.rows(), play.found())
        )
        self.call.value = f"<pre style='white-space: pre-wrap'>{escape(play.call())}</pre>"

    def _show_support(self):
        picture = self.playground.picture(self.support.value)
        self.canvas.size = [picture.shape[1], picture.shape[0]]
        self.canvas.picture = f"data:image/png;base64,{base64.b64encode(_png(picture, 300)).decode()}"

    def _change_support(self, _):
        self.canvas.drawn = []  # it was drawn on another picture
        self._show_support()
        self.soon()

    def _take(self, _):
        for file in self.upload.value:
            try:
                self.playground.add(file["name"], bytes(file["content"]))
            except InputError as error:
                self.message.value = _told(error)
                continue
            support, uploaded = self.support.value, self.playground.image
            self.support.unobserve(self._change_support, "value")  # new options choose the first for a moment
            self.image.options = self.support.options = list(self.playground.pictures)
            self.image.value, self.support.value = uploaded, support
            self.support.observe(self._change_support, "value")
            self._show_support()  # the new one may have an old one's name
            self.soon()

    def _save(self, _):
        try:
            self.playground.save(self.file.value)
            self.message.value = f"written: {escape(self.file.value)}"
        except InputError as error:
            self.message.value = _told(error)


class _Soon:
    """Calls `update` once nothing has changed for PAUSE seconds; at once where no event loop runs. Says in `message`
    how long it took, or what was wrong."""

    def __init__(self, update, message):
        self.update, self.message, self.waiting = update, message, None

    def __call__(self, _=None):
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.now()
            return
        if self.waiting:
            self.waiting.cancel()
        self.waiting = loop.call_later(PAUSE, self.now)

    def now(self):
        started = time.perf_counter()
        try:
            self.update()
            self.message.value = f"made in {time.perf_counter() - started:.2f} s"
        except InputError as error:
            self.message.value = _told(error)


def _share(name, value):
    """A slider from 0 to 1."""
    return ui.FloatSlider(value, min=0, max=1, step=0.01, description=name, layout=_WIDE)


def _told(error):
    return f"<span style='color: {COLOURS[3]}'>{escape(str(error))}</span>"


def _png(image, longest=LONGEST):
    """A picture as the bytes of a PNG file, its longer side at most `longest` pixels."""
    scale = min(1, longest / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
