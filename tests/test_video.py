"""Videos: what is read and written, frame by frame; stopped and gone on; and what is refused."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from clipseg_repro import load_segmenter
from clipseg_repro.batch import COLOURS, segment
from clipseg_repro.errors import InputError
from clipseg_repro.mini.scenes import SceneRules, compose
from clipseg_repro.plotting import overlay
from clipseg_repro.video import Video, rework, writing

FRAMES, FPS = 10, Fraction(30000, 1001)


def ffmpeg(*arguments):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], check=True)


def as_others_read(path):
    """A video's frames, RGB, as OpenCV decodes them."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return frames


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """clip.mp4 in the working folder: a window that moves over a mini scene; of 121 pixels, made even."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipseg_repro.video.PIECE", 4)
    scene = compose(np.random.default_rng(0), SceneRules(sizes=((96, 160),), objects=(3, 3))).image
    with writing("clip.mp4", (121, 96), FPS) as write:
        for n in range(FRAMES):
            write(scene[:, 3 * n : 3 * n + 121])
    return Path("clip.mp4")


def run(clip, folder, out="out", **options):
    [(lines, new)] = segment([clip], ["a cat", "a dog"], Path(out), model=folder, **options)
    return list(lines), new


def test_frames_are_segmented_as_pictures_are(clip, tiny_folder):
    frames = list(Video(clip).frames())
    for n, frame in enumerate(frames):
        Image.fromarray(frame).save(f"{n}.png")
    segmenter = load_segmenter(tiny_folder, dtype="float32")
    segmenter.set_image(frames[0])
    maps = segmenter.predict(["a cat", "a dog"])
    threshold = float(np.quantile(maps, 0.9))
    pictures = segment([Path(f"{n}.png") for n in range(FRAMES)], ["a cat", "a dog"], Path("p"), model=tiny_folder,
                       threshold=threshold)  # fmt: skip
    lines, new = run(clip, tiny_folder, threshold=threshold)
    assert new and len(lines) == FRAMES
    for n, (line, (results, _)) in enumerate(zip(lines, pictures)):
        assert (line["frame"], line["video"]) == (n, "clip.mp4")
        assert line["time"] == pytest.approx(n * 1001 / 30000, abs=1e-6)
        for found, colour, result in zip(line["prompts"], COLOURS[:2], results, strict=True):
            del result["picture"], result["files"]
            assert found == result | {"colour": colour}
    assert [json.loads(text) for text in Path("out/clip_frames.jsonl").read_text().splitlines()] == lines
    written = as_others_read("out/clip.mp4")
    assert len(written) == FRAMES
    for frame, picture in zip(frames, written):
        segmenter.set_image(frame)
        expected = frame
        for probability, colour in zip(segmenter.predict(["a cat", "a dog"]), COLOURS):
            expected = overlay(expected, probability, colour, outline=probability > threshold)
        off = np.abs(picture.astype(int) - expected).mean()
        assert off < 8 and np.abs(expected.astype(int) - frame).mean() > 30  # what the codec loses, and what is drawn
    again, new = run(clip, tiny_folder, threshold=threshold)
    assert again == lines and not new


KILLED = """
import os, signal, sys
from clipseg_repro import video
video.PIECE, seen = 4, []
def work(frame):
    seen.append(0)
    if len(seen) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return 255 - frame, {"mean": float(frame.mean())}
for line in video.rework(video.Video("clip.mp4"), "stopped", ["a"], work):
    pass
"""


@pytest.mark.parametrize("last", [7, 9])
def test_a_killed_run_goes_on(clip, last):
    calls = []

    def work(frame):
        calls.append(0)
        return 255 - frame, {"mean": float(frame.mean())}

    whole = list(rework(Video(clip), "whole", ["a"], work))
    assert subprocess.run([sys.executable, "-c", KILLED, str(last)]).returncode == -signal.SIGKILL
    assert not os.path.exists("stopped.mp4") and not os.path.exists("stopped_frames.jsonl")
    calls.clear()
    assert list(rework(Video(clip), "stopped", ["a"], work)) == whole
    assert len(calls) == FRAMES - (last - 1) // 4 * 4
    for end in (".mp4", "_frames.jsonl"):
        assert Path(f"stopped{end}").read_bytes() == Path(f"whole{end}").read_bytes()
    assert not list(Path().glob("*_pieces"))


def test_pieces_of_other_settings_are_not_used(clip):
    frames = rework(Video(clip), "x", ["a"], lambda frame: (frame, {"a": 1}))
    assert [next(frames)["a"] for _ in range(6)] == [1] * 6
    frames.close()
    assert all(line["a"] == 2 for line in rework(Video(clip), "x", ["b"], lambda frame: (frame, {"a": 2})))


def test_time_and_sound_are_kept(clip):
    """Of a video with a rate that varies, a rotation, and sound: what is seen when, the right way up."""
    ffmpeg("-i", clip, "-f", "lavfi", "-i", "sine=duration=0.4", "-vf", "select='not(eq(n,3))'", "-fps_mode", "vfr",
           "sound.mp4")  # fmt: skip
    ffmpeg("-display_rotation", 90, "-i", "sound.mp4", "-c", "copy", "turned.mp4")
    turned = Video("turned.mp4")
    frames, straight = list(turned.frames()), as_others_read(clip)
    assert turned.size == (96, 122) and len(frames) == FRAMES - 1
    for n, frame in enumerate(frames):
        off = [np.abs(np.rot90(other).astype(int) - frame).mean() for other in straight]
        assert min(off) < 4
        assert abs(np.argmin(off) / FPS - n / turned.fps) < 2 / FPS
    np.testing.assert_array_equal(list(turned.frames(5)), frames[5:])
    list(rework(turned, "out", [], lambda frame: (frame, {})))
    told = subprocess.run([get_ffmpeg_exe(), "-i", "out.mp4"], capture_output=True, text=True).stderr
    assert "Audio: aac" in told and "h264" in told and "96x122" in told


def test_what_is_no_video_is_refused(clip, tiny_folder):
    whole = clip.read_bytes()
    Path("cut.mp4").write_bytes(whole[:300])
    Path("empty.mov").touch()
    Path("noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.1", "sound.mp4")
    Path("list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")  # ffmpeg would follow it
    Path("list.mkv").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    for name in ("cut.mp4", "empty.mov", "noise.mkv", "sound.mp4", "list.mp4", "list.mkv"):
        [(error, _)] = segment([Path(name)], ["a cat"], Path("out"), model=tiny_folder)
        assert isinstance(error, InputError) and f"'{name}'" in str(error) and "convert it" in str(error)
    with pytest.raises(InputError, match=r"'clip.mp4' is a video.*leave --labels"):
        run(clip, tiny_folder, labels=True)
    with pytest.raises(InputError, match=r"--out '.' is the folder of 'clip.mp4'"):
        run(clip, tiny_folder, out=".")
    assert clip.read_bytes() == whole
