"""Plotting: overlays against hand-worked values, figures against what they must contain."""

import io

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from clipseg_repro.errors import InputError
from clipseg_repro.plotting import PALETTE, bars, contour, curves, heat, overlay, panels, prompt_grid


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@pytest.fixture
def probability(picture):
    return np.linspace(0, 1, picture.shape[0] * picture.shape[1], dtype=np.float32).reshape(picture.shape[:2])


def test_overlay_mixes_image_and_colour():
    image = np.full((2, 2, 3), 100, np.uint8)
    out = overlay(image, np.array([[0.0, 0.5], [0.25, 0.0]]), colour=(1, 0, 0), strength=0.8)
    assert out.dtype == np.uint8
    assert out[0, 0].tolist() == [100, 100, 100]
    assert out[0, 1].tolist() == [162, 60, 60]  # 0.6 * 100 + 0.4 * (255, 0, 0)
    assert out[1, 0].tolist() == [131, 80, 80]


def test_overlay_is_the_rounded_mix_at_every_pixel(picture):
    weight = np.random.default_rng(1).random(picture.shape[:2], dtype=np.float32) / 2  # no outline
    share = 0.65 * weight.astype(np.float64)[..., None]
    expected = np.round((1 - share) * picture.astype(np.float64) + share * (255 * np.array(to_rgb("#D55E00"))))
    np.testing.assert_array_equal(overlay(picture, weight), expected)


def test_overlay_outlines_masks_and_leaves_the_rest(picture, picture_mask):
    out = overlay(picture, picture_mask)
    assert (out[~picture_mask] == picture[~picture_mask]).all()
    inside = cv2.erode(picture_mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) > 0
    assert (out[picture_mask & ~inside] == 255).all()
    assert (out[inside] != picture[inside]).any(axis=1).all()


def test_heat_is_viridis_at_full_strength():
    out = heat(np.zeros((2, 2, 3), np.uint8), np.array([[0.0, 1.0], [0.0, 1.0]]), strength=1.0)
    expected = np.round(255 * np.array([plt.get_cmap("viridis")(v)[:3] for v in (0.0, 1.0)]))
    assert (out[0] == expected).all()


def test_contour_draws_the_edge_and_keeps_the_colours():
    image, mask = np.full((40, 60, 3), 77, np.uint8), np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    edge = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
    out = contour(image, mask, "#D55E00")
    assert (out[edge] == [213, 94, 0]).all()
    assert (out[9, 20:50] == 0).all()  # the black on either side
    assert (out[11, 21:49] == 0).all()
    assert (out[14:26, 24:46] == 77).all()
    assert (out[:6] == 77).all()


def test_heat_shows_the_true_outline(picture, probability, picture_mask):
    plain, outlined = heat(picture, probability), heat(picture, probability, outline=picture_mask)
    np.testing.assert_array_equal(outlined, contour(plain, picture_mask))
    assert (outlined != plain).any()


@pytest.mark.parametrize("draw", [overlay, heat, contour])
def test_maps_that_do_not_fit_are_refused(draw, picture, probability):
    with pytest.raises(InputError, match="same size"):
        draw(picture, probability[:-1])
    for bad in (probability * 2, probability - 1, probability * np.nan):
        with pytest.raises(InputError, match="probabilities"):
            draw(picture, bad)


def test_grid_has_a_cell_per_prompt(picture, probability):
    maps = np.stack([probability] * 3)
    figure = prompt_grid([picture, picture], ["a cat", "a dog", "a bird"], [maps, maps])
    cells = [axis for axis in figure.axes if axis.images]
    assert len(cells) == 8
    assert [axis.get_title() for axis in cells[:4]] == ["query image", "a cat", "a dog", "a bird"]
    assert not any(axis.get_title() for axis in cells[4:])
    assert (cells[0].images[0].get_array() == picture).all()


def test_grid_labels_every_map_where_prompts_differ(picture, probability):
    figure = prompt_grid([picture, picture], [["cat"], ["dog"]], [probability[None]] * 2, titles=["one", "two"])
    assert [axis.get_title() for axis in figure.axes[:4]] == ["one", "cat", "two", "dog"]


def test_grid_outlines_the_truth_where_it_is_known(picture, probability, picture_mask):
    maps, truth = [probability[None].repeat(2, 0)], [[picture_mask, None]]
    _, known, unknown = (
        axis.images[0].get_array() for axis in prompt_grid([picture], ["cat", "dog"], maps, outlines=truth).axes[:3]
    )
    assert (known == heat(picture, probability, outline=picture_mask)).all()
    assert (unknown == heat(picture, probability)).all()
    with pytest.raises(InputError, match="outlines"):
        prompt_grid([picture], ["cat", "dog"], maps, outlines=[[picture_mask]])


def test_grid_refuses_missing_maps(picture, probability):
    for prompts, maps in ((["cat", "dog"], [probability[None]]), (["cat"], []), ([["cat"]] * 2, [probability[None]])):
        with pytest.raises(InputError, match="prompt_grid"):
            prompt_grid([picture], prompts, maps)


def test_panels_show_images_masks_and_maps(picture, picture_mask, probability):
    figure = panels([picture, picture_mask, probability], ["image", "mask", "map"], columns=2)
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 0]
    assert [axis.images[0].cmap.name for axis in figure.axes[1:3]] == ["gray", "viridis"]
    with pytest.raises(InputError, match="one title per image"):
        panels([picture], [])


def test_curves_draw_lines_bands_and_marks():
    frame = pd.DataFrame({"t": [0.1, 0.2], "iou": [0.3, 0.4], "iou_low": [0.2, 0.3], "iou_high": [0.4, 0.5]})
    (axis,) = curves(frame, "t", {"iou": "IoU"}, marks={"paper": 0.5}).axes
    assert [line.get_label() for line in axis.lines] == ["IoU", "paper"]
    assert axis.lines[0].get_color() == PALETTE[0]
    assert len(axis.collections) == 1
    with pytest.raises(InputError, match="'ap'"):
        curves(frame, "t", ["ap"])


def test_bars_are_as_long_as_their_values():
    frame = pd.DataFrame({"recipe": ["crop", "blur"], "ours": [1.0, -2.0], "paper": [3.0, 4.0]})
    (axis,) = bars(frame, "recipe", ["ours", "paper"]).axes
    assert [patch.get_width() for patch in axis.patches] == [1, -2, 3, 4]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["crop", "blur"]
    with pytest.raises(InputError, match="'other'"):
        bars(frame, "recipe", ["other"])


def test_figures_are_deterministic_and_closed(picture, probability):
    once, again = (png(prompt_grid([picture], ["cat"], [probability[None]])) for _ in range(2))
    assert once == again
    assert not plt.get_fignums()
