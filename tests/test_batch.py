"""Batches: what is written for pictures and prompts, what is not written twice, and how the files are called."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from pycocotools import mask as coco

from clipseg_repro import load_segmenter
from clipseg_repro.batch import file_names, segment
from clipseg_repro.errors import InputError


@pytest.fixture
def call(tmp_path, tiny_folder, picture, monkeypatch):
    """segment(photo.png, "a cat", "a dog") in an empty folder, as a list; keywords change the call."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture).save("photo.png")

    def call(pictures=("photo.png",), **options):
        options = {"words": ["a cat", "a dog"], "out": Path("out"), "model": tiny_folder} | options
        return list(segment([Path(path) for path in pictures], **options))

    return call


def test_results_describe_the_masks(call, tiny_folder):
    segmenter = load_segmenter(tiny_folder, dtype="float32")
    segmenter.set_image("photo.png")
    maps = segmenter.predict(["a cat", "a dog"])
    threshold = float(np.quantile(maps[0], 0.99))
    [(results, new)] = call(threshold=threshold, labels=True)
    assert new
    assert [result["prompt"] for result in results] == ["a cat", "a dog"]
    for result, probability in zip(results, maps):
        mask = probability > threshold
        np.testing.assert_array_equal(coco.decode(result["mask"]), mask)
        np.testing.assert_array_equal(np.asarray(Image.open(f"out/{result['files']}".replace("*", "mask"))) > 0, mask)
        assert result["area"] == mask.mean()
        assert result["highest_probability"] == pytest.approx(probability.max(), abs=1e-6)
    y, x = np.nonzero(maps[0] > threshold)
    assert results[0]["box"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
    labels = Image.open("out/photo_labels.png")
    np.testing.assert_array_equal(np.asarray(labels), segmenter.label_map(["a cat", "a dog"], threshold=threshold))
    palette = np.reshape(labels.getpalette(), (-1, 3))
    colours = ["#000000", *(result["colour"] for result in results)]
    np.testing.assert_array_equal(palette[:3], [ImageColor.getrgb(colour) for colour in colours])
    assert [result["label"] for result in results] == [1, 2]


def test_an_empty_mask_has_no_box(call):
    [(results, _)] = call(threshold=1.0)
    assert [(result["area"], result["box"]) for result in results] == [(0, None)] * 2
    assert not any(coco.area(result["mask"]) for result in results)


def test_background_is_that_of_label_map(call, tiny_folder):
    call(labels=True, background=["a tree"])
    segmenter = load_segmenter(tiny_folder, dtype="float32")
    segmenter.set_image("photo.png")
    expected = segmenter.label_map(["a cat", "a dog"], background=["a tree"])
    np.testing.assert_array_equal(np.asarray(Image.open("out/photo_labels.png")), expected)


CHANGES = {
    "nothing": (lambda: None, {}, False),
    "another threshold": (lambda: None, {"threshold": 0.4}, True),
    "another prompt": (lambda: None, {"words": ["a cat", "a bird"]}, True),
    "a label map": (lambda: None, {"labels": True}, True),
    "a file is missing": (lambda: os.remove("out/photo_2_a-dog_mask.png"), {}, True),
    "the picture is a new one": (lambda: os.utime("photo.png", (0, 0)), {}, True),
    "the record is damaged": (lambda: Path("out/photo_segments.json").write_text("[1]"), {}, True),
    "the record is cut short": (lambda: Path("out/photo_segments.json").write_text('{"made_'), {}, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_is_not_done_again(call, change):
    before = call()
    act, options, new = CHANGES[change]
    act()
    after = call(**options)
    assert after[0][1] == new
    if not options:
        assert json.dumps(after[0][0]) == json.dumps(before[0][0])


def test_stopped_half_way_is_not_done(call, monkeypatch):
    call()
    monkeypatch.setattr("clipseg_repro.batch.overlay", lambda *_: os.close(-1))  # an OSError, as of a full disk
    with pytest.raises(InputError, match="cannot write to 'out'"):
        call(threshold=0.4)
    monkeypatch.undo()
    monkeypatch.chdir(Path("out").absolute().parent)
    assert call()[0][1]


def test_a_bad_picture_does_not_stop_the_rest(call):
    Path("bad.png").write_bytes(b"no picture")
    (error, _), (results, _) = call(["bad.png", "photo.png"])
    assert isinstance(error, InputError)
    assert "bad.png" in str(error)
    assert len(results) == 2


@pytest.mark.parametrize(
    ("pictures", "names"),
    [
        (["a.png", "b/c.jpg"], ["a", "c"]),
        (["a/x.png", "b/x.png", "b/x.jpg", "c/y.png"], ["a-x-png", "b-x-png", "b-x-jpg", "y"]),
        (["a/X.png", "b/x.png"], ["a-X-png", "b-x-png"]),  # one file, where case does not count
        (["a/b/x.png", "c/b/x.png"], ["????????-x"] * 2),
        (["é" * 120 + ".png"], ["é" * 65 + "-????????"]),
    ],
)
def test_names_keep_apart(pictures, names):
    found = list(file_names([Path(path) for path in pictures], Path("none")).values())
    assert len(set(found)) == len(pictures)
    assert all(Path(name).match(pattern) for name, pattern in zip(found, names, strict=True)), found


def test_an_equal_name_from_another_folder_takes_nothing_over(call, picture):
    Path("b").mkdir()
    Image.fromarray(picture[::-1].copy()).save("b/photo.png")
    call()
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    call(["b/photo.png"])
    assert {name: (Path("out") / name).read_bytes() for name in before} == before
    assert Path("out/b-photo-png_1_a-cat_mask.png").exists()
    assert [new for _, new in call()] == [new for _, new in call(["b/photo.png"])] == [False]


def test_of_leftovers_only_its_own_go(call):
    foreign, own = Path("out/sub/.notes.999999999.tmp"), Path("out/.x_1_a-cat_mask.png.999999999.tmp")
    foreign.parent.mkdir(parents=True)
    for path in (foreign, own):
        path.touch()
    call()
    assert foreign.exists() and not own.exists()


def test_nothing_to_look_for(call):
    with pytest.raises(InputError, match="nothing to look for"):
        call(words=[])


def test_names_of_the_longest_file_can_be_written(call):
    picture = "l" * 240 + ".png"
    Path("photo.png").rename(picture)
    call([picture], words=["象" * 14], labels=True)
    assert len(list(Path("out").iterdir())) == 3 + 2
