"""The playground without a browser: what it shows, its Python call, and its controls set from Python."""

from dataclasses import replace
from datetime import datetime
from io import BytesIO
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from clipseg_repro import VisualPrompt, interpolate
from clipseg_repro.errors import InputError
from clipseg_repro.models.forward import embed_images
from clipseg_repro.playground import widgets
from clipseg_repro.playground.state import COLOURS, STRENGTH, VIEWS, Playground, drawn_mask
from clipseg_repro.plotting import overlay

BOX = {"tool": "box", "points": [[40, 30], [80, 70]]}
STROKE = {"tool": "brush", "points": [[45, 45], [70, 55]], "width": 9}


@pytest.fixture
def play(segmenter, tiny_folder, picture, tmp_path):
    """A playground of two pictures, one of them a path; nothing is asked yet."""
    Image.fromarray(picture).save(tmp_path / "disc.png")
    Image.fromarray(picture[::-1, 20:].copy()).save(tmp_path / "other.png")
    pictures = {name: tmp_path / f"{name}.png" for name in ("disc", "other")}
    return Playground(segmenter, pictures, source=str(tiny_folder), support="other")


def test_boxes_and_strokes_make_one_mask():
    box = np.zeros((6, 9), bool)
    box[1:4, 2:6] = True  # both corners are inside
    for points in ([[2, 1], [5, 3]], [[5, 3], [2, 1]]):
        assert np.array_equal(drawn_mask((6, 9), [{"tool": "box", "points": points}]), box)
    line = {"tool": "brush", "points": [[0, 5], [8, 5]], "width": 1}
    dot = {"tool": "brush", "points": [[7.4, 0.2]], "width": 1}
    box[5], box[0, 7] = True, True
    assert np.array_equal(drawn_mask((6, 9), [{"tool": "box", "points": [[2, 1], [5, 3]]}, line, dot]), box)
    assert not drawn_mask((6, 9), []).any()


@pytest.mark.parametrize(
    "wrong",
    ["box", {}, *(BOX | wrong for wrong in ({"tool": "lasso"}, {"tool": "brush"}, {"points": []}, {"points": [[0]]}))],
)
def test_other_marks_are_refused(wrong):
    with pytest.raises(InputError, match="give tool"):
        drawn_mask((6, 9), [wrong])


def test_maps_are_those_of_the_prompts(play, segmenter, picture):
    play.words = ["a cat", "", " red car "]
    assert play.rows() == [0, 2]
    segmenter.set_image(picture)
    by_words = segmenter.predict(["a cat", "red car"])
    np.testing.assert_allclose(play.maps(), by_words, atol=1e-5)
    example = VisualPrompt(play.picture("other"), drawn_mask((90, 120), [BOX, STROKE]), "crop")
    drawn = replace(play, drawn=[BOX, STROKE], recipe="crop", mix=0.25)
    mixed = segmenter.predict([interpolate("a cat", example, 0.25), "red car"])
    np.testing.assert_allclose(drawn.maps(), mixed, atol=1e-5)
    assert np.abs(mixed[0] - by_words[0]).max() > 1e-3  # so the example matters
    drawn.mix = 0
    np.testing.assert_allclose(drawn.maps(), by_words, atol=1e-5)
    drawn.words = []
    np.testing.assert_allclose(drawn.maps(), segmenter.predict(example), atol=1e-5)


def test_the_encoders_run_only_for_what_changed(play, segmenter, monkeypatch):
    play.words, play.drawn = ["a cat"], [BOX]
    spies = [Mock(wraps=play.segmenter.set_image), Mock(wraps=play.segmenter.predict), Mock(wraps=embed_images)]
    monkeypatch.setattr(play.segmenter, "set_image", spies[0])
    monkeypatch.setattr(play.segmenter, "predict", spies[1])
    monkeypatch.setattr("clipseg_repro.segmenter.embed_images", spies[2])
    for changed, calls in [
        ({}, [1, 1, 1]),
        ({"threshold": 0.3, "view": "probabilities"}, [1, 1, 1]),
        ({"words": ["a dog"], "mix": 0.2}, [1, 2, 1]),
        ({"words": ["a dog", "a tree"]}, [1, 3, 1]),
        ({"recipe": "crop"}, [1, 4, 2]),
        ({"image": "other"}, [2, 6, 2]),
    ]:
        for name, value in changed.items():
            setattr(play, name, value)
        play.shown()
        assert [spy.call_count for spy in spies] == calls, changed
    with pytest.raises(InputError, match="no query image"):  # of the segmenter that was given
        segmenter.predict("a cat")


@pytest.mark.parametrize(
    "state",
    [
        {"words": ['it\'s "a" cat'], "threshold": 0.4},
        {"words": ["", "a cat", "a dog"], "background": "tree", "threshold": 0.2},
        {"drawn": [BOX], "recipe": "BG blur"},
        {"words": ["a cat", "a dog"], "drawn": [BOX, STROKE], "mix": 0.75},
    ],
)
def test_the_python_call_gives_the_same(play, state):
    play = replace(play, **state)
    code, given = play.call(), {}
    exec(code, given)
    np.testing.assert_allclose(given["maps"], play.maps(), atol=1e-3)
    assert (given["masks"] == (play.maps() > play.threshold)).mean() > 0.999
    assert (given["labels"] == play.labels()).mean() > 0.999
    assert [highest for highest, _ in play.found()] == pytest.approx(list(given["maps"].max((1, 2))), abs=1e-3)


def test_pictures_show_masks_labels_or_maps(play, picture, tmp_path):
    for view in VIEWS:  # nothing is asked
        assert np.array_equal(replace(play, view=view).shown(), picture)
    assert "type a prompt" in play.call()
    play.words, play.threshold = ["a cat", "", "a dog"], float(np.median(replace(play, words=["a cat"]).maps()))
    cat, dog = play.maps() > play.threshold
    expected = overlay(overlay(picture, cat, COLOURS[0], STRENGTH), dog, COLOURS[2], STRENGTH)
    assert np.array_equal(play.shown(), expected)
    play.save(tmp_path / "shown.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "shown.png")), expected)
    play.view = "label map"
    assert not np.array_equal(play.shown(), picture) and set(np.unique(play.labels())) <= {0, 1, 2}
    play.view = "probabilities"
    assert play.shown().shape == (94, 288, 3)  # two maps beside each other, in frames of 2 px


def test_wrong_input_is_one_sentence(play, tmp_path):
    play.words = ["a cat"]
    for wrong, message in [
        ({"image": "none"}, "no picture 'none'"),
        ({"view": "film"}, "unknown view"),
        ({"threshold": 2}, "threshold 2"),
        ({"drawn": [BOX], "recipe": "no"}, "unknown recipe"),
        ({"drawn": [BOX], "mix": -1}, "weight -1"),
        ({"words": ["cat"] * 6}, "6 rows of words"),
        ({"drawn": [BOX | {"points": [[500, 500], [600, 600]]}]}, "mask array is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            replace(play, **wrong).shown()
    with pytest.raises(InputError, match=r"let it end in .png"):
        play.save(tmp_path / "shown.jpg")
    with pytest.raises(InputError, match="cannot write"):
        (tmp_path / "file").touch()
        play.save(tmp_path / "file" / "shown.png")


def uploaded(array):
    content = BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


def test_an_uploaded_picture_becomes_the_image(play, picture):
    play.words = ["a cat"]
    play.shown()
    play.add("/some/where/disc", uploaded(picture[:40]))  # in place of one that was encoded
    assert play.image == "disc" and play.maps().shape == (1, 40, 140)
    with pytest.raises(InputError, match=r"image 'photo.jpg' is not an image"):
        play.add("photo.jpg", b"no picture")
    assert play.image == "disc" and "photo.jpg" not in play.pictures


def test_controls_change_state_and_picture(play, picture, tmp_path):
    controls = widgets.Controls(play)
    seen = {controls.picture.value}

    def changed():
        seen.add(controls.picture.value)
        return len(seen)

    controls.words[1].value = "a <b>cat</b>"
    assert play.words[1] == "a <b>cat</b>" and "a &lt;b&gt;cat" in controls.found.value
    controls.threshold.value = round(float(np.median(play.maps())), 2)
    assert changed() == 2 and f"maps &gt; {play.threshold}" in controls.call.value
    controls.tool.value = "brush"
    assert controls.canvas.tool == "brush"
    controls.canvas.drawn = [BOX]
    assert play.drawn == [BOX] and changed() == 3 and "the example" in controls.found.value
    controls.recipe.value, controls.mix.value = "crop", 0.3
    assert (play.recipe, play.mix) == ("crop", 0.3)
    controls.view.value = "label map"
    assert play.view == "label map"
    file = {"name": "new.png", "type": "image/png", "size": 1, "last_modified": datetime(2022, 6, 19)}
    controls.upload.value = [file | {"content": uploaded(picture[::-1])}]
    assert (controls.image.value, play.image, play.drawn) == ("new.png", "new.png", [BOX])
    assert controls.support.value == "other" and changed() == 4
    controls.support.value = "new.png"  # another picture: what was drawn is gone
    assert (play.drawn, controls.canvas.size) == ([], [140, 90])
    controls.file.value = str(tmp_path / "saved.png")
    controls.save.click()
    assert np.array_equal(np.array(Image.open(tmp_path / "saved.png")), play.shown())
    controls.file.value = "saved.gif"
    controls.save.click()
    assert "let it end in .png" in controls.message.value
    controls.canvas.drawn = [BOX | {"tool": "lasso"}]
    assert "unknown tool" in controls.message.value
    controls.clear.click()
    assert play.drawn == [] and "made in" in controls.message.value


def test_a_single_image_to_explore(segmenter, picture, picture_mask):
    words, threshold, mix, shown, message = widgets._explorer(
        segmenter, picture, "a cat", VisualPrompt(picture, picture_mask)
    ).children
    before = [shown.value]
    for control, value in ((words, "a dog"), (mix, 0.9), (threshold, 0.05)):
        control.value = value
        before.append(shown.value)
    assert len(set(before)) == 4 and "highest probability" not in message.value


def test_nothing_is_displayed_where_nobody_looks(play, capsys):
    assert not widgets.attended()
    widgets.show(play)
    widgets.explore(play.segmenter, play.picture(), "a cat")
    assert capsys.readouterr().out == ""
