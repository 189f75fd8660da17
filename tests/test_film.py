"""The demo film: what is shipped is what its script says, and it is written whole or not at all."""

import importlib.util
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from imageio_ffmpeg import read_frames
from PIL import Image

from clipseg_repro.errors import InputError

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("film", ROOT / "presentation" / "video.py")
film = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(film)
CUE = re.compile(r"(\d+)\n(\d\d):(\d\d):(\d\d\.\d{3}) --> (\d\d):(\d\d):(\d\d\.\d{3})\n(.+)\n")


def cues(text):
    """(start, end, text) of each cue, in seconds, of a WebVTT file that has nothing else."""
    head, *blocks = text.split("\n\n")
    assert head == "WEBVTT"
    matches = [CUE.fullmatch(block.rstrip("\n") + "\n") for block in blocks]
    assert all(matches) and [int(match[1]) for match in matches] == list(range(1, len(matches) + 1))
    seconds = [[3600 * int(m[i]) + 60 * int(m[i + 1]) + float(m[i + 2]) for i in (2, 5)] for m in matches]
    return [(*times, match[8]) for times, match in zip(seconds, matches)]


def test_the_shipped_film_is_small_and_plays_everywhere():
    path = ROOT / "results" / "demo.mp4"
    assert path.stat().st_size <= 8_000_000
    meta = next(read_frames(path))
    assert (meta["codec"], meta["size"], meta["fps"]) == ("h264", (1280, 720), film.FPS)
    assert meta["pix_fmt"].startswith("yuv420p") and meta["duration"] <= 90
    poster = np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")).astype(int)
    capture, off = cv2.VideoCapture(str(path)), []
    while capture.grab():
        off.append(np.abs(capture.retrieve()[1][::8, ::8, ::-1] - poster[::8, ::8]).mean())
    assert min(off) < 5 < np.median(off)  # the poster is one of its frames


def test_the_captions_are_those_of_the_scenes_and_cover_the_film():
    found = cues((ROOT / "results" / "demo.vtt").read_text(encoding="utf-8"))
    capture = cv2.VideoCapture(str(ROOT / "results" / "demo.mp4"))
    ends = [0.0, *(end for _, end, _ in found)]
    assert [start for start, _, _ in found] == ends[:-1] == sorted(ends[:-1])
    assert ends[-1] == pytest.approx(capture.get(cv2.CAP_PROP_FRAME_COUNT) / film.FPS, abs=1e-3)
    assert [scene.__name__ for scene in film.SCENES] == list(film.CAPTIONS)
    said = [caption for captions in film.CAPTIONS.values() for caption in captions]
    for (start, end, text), caption in zip(found, said, strict=True):
        pieces = re.split(r"\{.*?\}", caption)
        assert re.fullmatch(".+?".join(map(re.escape, pieces)), text), (text, caption)
        assert len(text) / (end - start) < 24, f"too fast to be read: {text}"


def test_it_is_written_whole_or_not_at_all(tmp_path):
    def broken(_):
        yield from film.closing(None)
        raise InputError("no")

    with pytest.raises(InputError):
        film.film(tmp_path, None, [broken])
    assert not list(tmp_path.iterdir())
    film.film(tmp_path, None, [film.closing], poster="closing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.mp4", "demo.png", "demo.vtt"]
    [(start, end, text)] = cues((tmp_path / "demo.vtt").read_text(encoding="utf-8"))
    assert (start, text) == (0, film.CAPTIONS["closing"][0])
    assert cv2.VideoCapture(str(tmp_path / "demo.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == end * film.FPS


def test_what_does_not_fit_on_a_frame_is_refused():
    with pytest.raises(InputError, match="does not fit"):
        film.Card("a heading that is " + "very " * 20 + "long")
    with pytest.raises(InputError, match="more than two lines"):
        film.Card().captioned("word " * 40)


def test_where_nothing_fails_no_failure_is_shown():
    """A model that marks a dog, and nothing where there is none."""

    class Perfect(film.World):
        def predict(self, prompts):
            truth = self.mask(self.meadow, "dog").astype(np.float32)
            return np.stack([truth if prompt == "a dog" else 0 * truth for prompt in prompts])

        def set_image(self, image):
            pass

    world = Perfect()
    world.segmenter = world
    with pytest.raises(InputError, match="show other failures"):
        next(film.limits(world))
