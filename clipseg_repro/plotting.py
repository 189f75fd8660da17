"""Figures: overlays, grids of query x prompt, panels, curves and bars.

Every function that draws returns a matplotlib Figure which pyplot has forgotten: leave it as a cell's last expression
to show it, give it to `results.show_figure` to keep it too. Colours are safe for colour-blind readers: viridis for
probabilities (always 0 to 1), the palette of Okabe and Ito (2008) for everything that has a name.
"""

import textwrap

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from clipseg_repro.errors import InputError
from clipseg_repro.pictures import load_image
from clipseg_repro.strips import in_strips

OKABE_ITO = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "sky blue": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}
PALETTE = tuple(OKABE_ITO.values())
HEAT = "viridis"
WIDTH = 9.0  # inches, the text column of a notebook
_DASHES = ("-", "--", "-.", ":")  # so that curves differ in print, too
_STYLE = {
    "figure.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def overlay(image, probability, colour=OKABE_ITO["vermillion"], strength=0.65, outline=None):
    """The image tinted where the map is high, with a white outline at 0.5, or of the mask `outline`: (H, W, 3) uint8.

    `image` is whatever `load_image` takes; `probability` (H, W) is a mask (bool) or a map in [0, 1], as of
    `Segmenter.predict`; `colour` any of matplotlib's; `strength` in [0, 1] the tint's share where the map is 1. Call
    again to lay one tint over another.
    """
    image, weight = _image_and_map(image, probability)
    out = np.empty_like(image)

    def tint(out, image, weight):
        share = strength * weight.astype(np.float64)
        for channel, value in enumerate(to_rgb(colour)):
            out[..., channel] = np.round((1 - share) * image[..., channel] + share * (255 * value))

    list(in_strips(tint, out, image, weight))
    # without the outline, a tint of the image's own colours would not be seen
    outlined = _image_and_map(image, weight > 0.5 if outline is None else outline)[1].astype(np.uint8)
    outlines, _ = cv2.findContours(outlined, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(out, outlines, -1, (255, 255, 255), max(1, round(min(out.shape[:2]) / 200)))


def heat(image, probability, strength=0.7, outline=None):
    """The map as viridis colours over the grey image, with the outline of the mask `outline` (H, W) if there is one:
    (H, W, 3) uint8. Arguments as for `overlay`."""
    image, values = _image_and_map(image, probability)
    grey = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    colours = 255 * plt.get_cmap(HEAT)(values.astype(np.float64))[..., :3]
    out = np.round((1 - strength) * grey[..., None] + strength * colours).astype(np.uint8)
    return out if outline is None else contour(out, outline)


def contour(image, mask, colour="white"):
    """The image with the outline of a mask (H, W), edged in black so that it shows on every ground: (H, W, 3) uint8.

    The picture keeps its colours, which a tint would hide. Call again to draw one outline over another.
    """
    image, mask = _image_and_map(image, mask)
    outlines, _ = cv2.findContours((mask > 0.5).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    thick = max(1, round(min(image.shape[:2]) / 160))
    out = cv2.drawContours(image.copy(), outlines, -1, (0, 0, 0), thick + 2)
    return cv2.drawContours(out, outlines, -1, [round(255 * value) for value in to_rgb(colour)], thick)


def prompt_grid(images, prompts, maps, titles=None, outlines=None):
    """A grid like Figure 4: one row per query image, first the image itself, then one heat map per prompt.

    images: N images. prompts: K labels that head the columns, or N lists of K labels, which then head every map. maps:
    N arrays (K, H, W) of probabilities, each at its image's size. titles: N labels of the images, none by default.
    outlines: the truth, N lists of K masks (H, W), or None where there is none.
    """
    images = [load_image(image) for image in images]
    shared = bool(prompts) and all(isinstance(prompt, str) for prompt in prompts)
    labels = [list(prompts)] * len(images) if shared else [list(row) for row in prompts]
    if not images or len(maps) != len(images) or [len(row) for row in labels] != [len(row) for row in maps]:
        raise InputError(
            f"prompt_grid: {len(images)} images with {[len(row) for row in labels]} labels and "
            f"{[len(row) for row in maps]} maps: give one array of maps per image and one label per map"
        )
    outlines = [[None] * len(row) for row in labels] if outlines is None else outlines
    if [len(row) for row in outlines] != [len(row) for row in labels]:
        raise InputError(f"prompt_grid: {[len(row) for row in outlines]} outlines: give a mask or None for every map")
    columns = 1 + max(len(row) for row in labels)
    side = min(2.0, 1.1 * WIDTH / columns)
    with plt.rc_context(_STYLE):
        heights = [side * min(1.5, image.shape[0] / image.shape[1]) for image in images]  # so that all are as wide
        size = (columns * side, 0.6 + sum(heights) + (0.2 if shared else 0.35) * len(images))
        figure, axes = plt.subplots(len(images), columns, figsize=size, squeeze=False, height_ratios=heights)
        for axis in axes.flat:
            axis.axis("off")
        for i, (row, image) in enumerate(zip(axes, images, strict=True)):
            row[0].imshow(image)
            row[0].set_title(_wrap(titles[i], side) if titles else "query image" if i == 0 else "")
            for axis, label, probability, truth in zip(row[1:], labels[i], maps[i], outlines[i], strict=False):
                axis.imshow(heat(image, probability, outline=truth))
                if i == 0 or not shared:
                    axis.set_title(_wrap(label, side))
        scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), HEAT)
        figure.colorbar(scale, ax=axes, label="probability", location="bottom", fraction=0.03, aspect=40, shrink=0.5)
        return _closed(figure)


def outlined(image, marked, truth):
    """The image with the outlines of the truth (white) and, above it, of what is found (vermillion), (H, W, 3) uint8;
    and the IoU of the two in [0, 1] (0 where both are empty). marked, truth: (H, W) bool."""
    iou = (marked & truth).sum() / max(1, (marked | truth).sum())
    return contour(contour(image, truth), marked, OKABE_ITO["vermillion"]), float(iou)


def panels(images, titles, columns=None):
    """Pictures side by side under their titles.

    images: RGB (H, W, 3) uint8, masks (H, W) bool (shown black and white), or maps (H, W) float in [0, 1] (shown in
    viridis). columns: pictures per row; all in one row, up to six, by default.
    """
    images, titles = list(images), list(titles)
    if not images or len(images) != len(titles):
        raise InputError(f"panels: {len(images)} images and {len(titles)} titles: give one title per image")
    columns = min(columns or 6, len(images))
    rows = -(-len(images) // columns)
    side = min(2.4, WIDTH / columns)
    lines = max(_wrap(title, side).count("\n") + 1 for title in titles)
    images = [np.asarray(image) if np.ndim(image) == 2 else load_image(image) for image in images]
    tall = max(image.shape[0] / image.shape[1] for image in images)
    with plt.rc_context(_STYLE):
        size = (columns * side, rows * (min(tall, 1.5) * side + 0.16 * lines))
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, image, title in zip(axes.flat, images, titles, strict=False):
            if image.ndim == 2 and image.dtype == bool:
                axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            elif image.ndim == 2 and image.dtype.kind == "f":
                axis.imshow(image, cmap=HEAT, vmin=0, vmax=1)
            else:
                axis.imshow(image)
            axis.set_title(_wrap(title, side))
        return _closed(figure)


def curves(frame, x, ys, xlabel=None, ylabel=None, marks=None, log=False):
    """Columns `ys` of a table against its column `x`.

    ys: column names, or {column: label}. A band is drawn where the table also has `<column>_low` and `<column>_high`.
    marks: {label: value} of horizontal lines to compare with, such as the paper's figures. log: logarithmic x, ticks at
    its values.
    """
    labels = ys if isinstance(ys, dict) else {y: y for y in ys}
    _check_columns(frame, [x, *labels], "curves")
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(0.7 * WIDTH, 3.0))
        for n, (y, label) in enumerate(labels.items()):
            colour, dash = PALETTE[n % len(PALETTE)], _DASHES[n % len(_DASHES)]
            axis.plot(frame[x], frame[y], dash, color=colour, label=label, linewidth=1.8)
            if f"{y}_low" in frame and f"{y}_high" in frame:
                axis.fill_between(frame[x], frame[f"{y}_low"], frame[f"{y}_high"], color=colour, alpha=0.2, linewidth=0)
        for n, (label, value) in enumerate((marks or {}).items(), start=len(labels)):
            axis.axhline(value, color=PALETTE[n % len(PALETTE)], linewidth=1, linestyle=":", label=label)
        axis.set(xlabel=x if xlabel is None else xlabel, ylabel=ylabel or "", xscale="log" if log else "linear")
        if log:  # the values asked for, not powers of ten
            axis.set_xticks(frame[x].unique(), labels=frame[x].unique(), minor=False)
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        _legend(axis, len(labels) + len(marks or {}))
        return _closed(figure)


def bars(frame, label, ys, xlabel=None):
    """Horizontal bars: one group per row of a table, named by its column `label`, one bar per column of `ys`.

    ys: column names, or {column: label}. `<column>_low` and `<column>_high`, where the table has them, are drawn as
    whiskers.
    """
    labels = ys if isinstance(ys, dict) else {y: y for y in ys}
    _check_columns(frame, [label, *labels], "bars")
    names = [textwrap.fill(str(text), 46) for text in frame[label]]
    with plt.rc_context(_STYLE):
        row = 0.06 + 0.17 * max([len(labels), *(name.count("\n") + 1 for name in names)])
        figure, axis = plt.subplots(figsize=(0.85 * WIDTH, 0.6 + len(frame) * row))
        where, thick = np.arange(len(frame)), 0.8 / len(labels)
        for n, (y, name) in enumerate(labels.items()):
            place, values = where + (n - (len(labels) - 1) / 2) * thick, frame[y].to_numpy(float)
            axis.barh(place, values, thick * 0.9, color=PALETTE[n % len(PALETTE)], label=name)
            if f"{y}_low" in frame and f"{y}_high" in frame:
                whiskers = np.abs(np.stack([values - frame[f"{y}_low"], frame[f"{y}_high"] - values]))
                axis.errorbar(values, place, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        axis.set_yticks(where, names)
        axis.set_ylim(len(frame) - 0.5, -0.5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(xlabel or "")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        _legend(axis, len(labels))
        return _closed(figure)


def forest(frame, label, y, other=None, xlabel=None):
    """A forest plot: one row per row of a table, the value `y` with its interval (columns low and high) as a point with
    whiskers, about zero; the column `other`, where given, as hollow diamonds. Intervals that hold zero are grey."""
    _check_columns(frame, [label, y, "low", "high", *([other] if other else [])], "forest")
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.1 + 0.25 * len(frame)))
        where = np.arange(len(frame))
        told = (frame.low > 0) | (frame.high < 0)
        for chosen, colour, name in ((told, OKABE_ITO["blue"], y), (~told, "0.55", f"{y}, zero in the interval")):
            own, place = frame[chosen], where[chosen]
            whiskers = np.stack([own[y] - own.low, own.high - own[y]]).clip(0)
            if len(own):
                axis.errorbar(own[y], place, xerr=whiskers, fmt="o", color=colour, capsize=3, markersize=5, label=name)
        if other:
            marks = {"marker": "D", "facecolors": "none", "edgecolors": OKABE_ITO["vermillion"], "label": other}
            axis.scatter(frame[other], where, **marks, zorder=3)
        axis.set_yticks(where, [textwrap.fill(str(text), 75) for text in frame[label]])
        axis.set_ylim(len(frame) - 0.5, -0.5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(xlabel or "")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
        return _closed(figure)


def _image_and_map(image, probability):
    """The image as (H, W, 3) uint8 and the map as (H, W) array in [0, 1]."""
    image, values = load_image(image), np.asarray(probability)
    if values.shape != image.shape[:2]:
        raise InputError(f"map of shape {values.shape} on an image of {image.shape[:2]}: give both the same size")
    if not (values.min() >= 0 and values.max() <= 1):  # also catches NaN
        raise InputError(
            f"map with values in [{values.min():.3g}, {values.max():.3g}]: give probabilities or a bool mask"
        )
    return image, values


def _check_columns(frame, columns, name):
    missing = [column for column in columns if column not in frame]
    if missing:
        raise InputError(f"{name}: no column {', '.join(map(repr, missing))}: the table has {list(frame.columns)}")


def _wrap(text, side):
    """Break a label so that it fits `side` inches at the font size in use."""
    return textwrap.fill(str(text), max(8, int(side * 13)))


def _legend(axis, entries):
    if entries > 1:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _closed(figure):
    plt.close(figure)  # else the notebook would show it a second time
    return figure
