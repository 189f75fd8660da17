"""Videos: read frame by frame, and written in pieces, from which a stopped run goes on. ffmpeg comes with
imageio-ffmpeg."""

import json
import logging
import shutil
import subprocess
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe, read_frames

from clipseg_repro.errors import InputError
from clipseg_repro.files import written_whole

SUFFIXES = frozenset(".mp4 .m4v .mov .3gp .mkv .webm .avi .wmv .flv .mpg .mpeg .mts .m2ts .ogv".split())
# Containers alone: of a playlist, ffmpeg would read whatever other files and addresses it names.
SAFE = ["-protocol_whitelist", "file", "-format_whitelist", "mov,matroska,avi,asf,flv,mpeg,mpegvideo,mpegts,ogg"]
# Colours as players take them to be for HD. No B-frames: the pieces' clocks then start at zero, and fit together.
TAGS = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
H264 = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,{TAGS}", "-pix_fmt", "yuv420p"]
H264 += ["-c:v", "libx264", "-crf", "18", "-bf", "0"]
PIECE = 50  # frames that are written at once: what a killed run loses at most
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of videos that are stored rotated


def is_video(path) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


class Video:
    """A video file. fps: frames a second, a Fraction; size: (width, height) in pixels, as shown; total: how many frames
    its header promises, 0 if it does not say.

    Raises InputError for a file that is missing, damaged, or without pictures."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"video '{path}' is no file: check the path")
        header = self._read([])
        try:
            meta = next(header)
            first = next(header, None)
        except Exception:  # of many kinds: the header is text that imageio-ffmpeg makes out
            first = None
        finally:
            header.close()
        if not first:
            raise InputError(
                f"video '{path}' has no frame that can be read: it is damaged, truncated, or has no pictures; play it "
                "to see, and convert it to MP4"
            )
        shown = round(meta["fps"])  # 29.97 stands for 30000/1001
        ntsc = abs(meta["fps"] - shown / 1.001) < 0.005
        self.fps = Fraction(shown * 1000, 1001) if ntsc else Fraction(meta["fps"]).limit_denominator(1000)
        self.fps = self.fps or Fraction(25)
        self.size, self.total = meta["size"], round(meta["duration"] * self.fps)

    def frames(self, start=0):
        """Yields the frames from number `start` (of 0, 1, ...) on, (H, W, 3) uint8 RGB each. Frame n is what is seen at
        n / fps seconds: of a video whose rate varies, frames are repeated or left out."""
        even = f"fps={self.fps},trim=start_frame={start}"
        frames = self._read(["-vf", even, "-fps_mode", "passthrough"])
        try:
            next(frames)
            for frame in frames:
                yield np.frombuffer(frame, np.uint8).reshape(self.size[1], self.size[0], 3)
        except (OSError, RuntimeError) as error:
            raise InputError(f"video '{self.path}' is damaged ({error}): convert it to MP4") from None
        finally:
            frames.close()

    def _read(self, filters):
        return read_frames(f"file:{self.path}", input_params=[*SAFE, "-an"], output_params=filters)


@contextmanager
def writing(path, size, fps):
    """Write an H.264 video, as MP4, to `path`: gives a function that takes the next frame, (H, W, 3) uint8 RGB. size:
    (width, height); of an odd one the last row or column is doubled, as H.264 wants even ones. Raises OSError."""
    width, height = size
    even = ((0, height % 2), (0, width % 2), (0, 0))
    shape = f"{width + width % 2}x{height + height % 2}"
    told = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", shape, "-r", str(fps), "-i", "-"]
    with _ffmpeg(*told, *H264, "-f", "mp4", "-movflags", "+faststart", f"file:{path}") as pipe:
        yield lambda frame: pipe.write(np.pad(frame, even, "edge").tobytes())


def rework(video, stem, made_with, work):
    """Write STEM.mp4, with work(frame)'s picture for every frame of `video`, and its sound; and STEM_frames.jsonl, with
    the dict that is the rest of what work(frame) gives. A generator of these dicts, headed by frame and time (seconds).

    Memory is that of a few frames. Every PIECE frames are kept in STEM_pieces, from which a call with the same
    `made_with` goes on; in the end they are put together as they are, so the result does not depend on stops.
    """
    folder = Path(f"{stem}_pieces")
    label = folder / "made_with.json"
    settings = json.dumps(made_with)
    if not label.exists() or label.read_text(encoding="utf-8") != settings:
        shutil.rmtree(folder, ignore_errors=True)
        with written_whole(label) as temporary:
            temporary.write_text(settings, encoding="utf-8")
    pieces = [folder / f"{number:06}" for number in range(len(list(folder.glob("*.jsonl"))))]
    for piece in pieces:
        yield from read_lines(f"{piece}.jsonl")
    frames = video.frames(len(pieces) * PIECE)
    for number in count(len(pieces)):
        first = next(frames, None)
        if first is None:
            break
        piece = folder / f"{number:06}"
        # the lines are written last, and tell that the piece is whole
        with (
            written_whole(f"{piece}.jsonl") as text,
            text.open("w", encoding="utf-8") as lines,
            written_whole(f"{piece}.mp4") as film,
            writing(film, video.size, video.fps) as write,
        ):
            for n, frame in enumerate(chain([first], islice(frames, PIECE - 1)), start=number * PIECE):
                picture, found = work(frame)
                write(picture)
                found = {"frame": n, "time": round(float(n / video.fps), 6)} | found
                lines.write(json.dumps(found) + "\n")
                yield found
        pieces.append(piece)
    with written_whole(f"{stem}_frames.jsonl") as temporary, temporary.open("wb") as lines:
        for piece in pieces:
            lines.write(Path(f"{piece}.jsonl").read_bytes())
    listing = folder / "pieces.txt"
    listing.write_text("".join(f"file '{piece.name}.mp4'\n" for piece in pieces), encoding="utf-8")
    exact = f"setts=ts=N/({video.fps}*TB):duration=1/({video.fps}*TB)"
    sound = [*SAFE, "-i", f"file:{video.path}", "-map", "0:v", "-map", "1:a?", "-c:a", "aac"]
    with written_whole(f"{stem}.mp4") as temporary:
        copied = ["-c:v", "copy", "-bsf:v", exact, "-f", "mp4", "-movflags", "+faststart", f"file:{temporary}"]
        with _ffmpeg("-f", "concat", "-i", f"file:{listing}", *sound, *copied):
            pass
    shutil.rmtree(folder, ignore_errors=True)


def read_lines(path):
    """Yields the dicts of a JSON lines file."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@contextmanager
def _ffmpeg(*arguments):
    """Run ffmpeg; gives its standard input. Raises OSError, with its last words, where it fails."""
    command = [get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    with TemporaryFile() as words:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=words)
        failed = None
        try:
            yield process.stdin
        except BrokenPipeError as error:  # it has ended: its words say why
            failed = error
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        if failed or process.returncode:
            words.seek(0)
            last = words.read().decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(f"ffmpeg: {last[0] if last else process.returncode}") from failed
