"""PNG files written in strips: what Pillow, OpenCV and zlib read in them."""

import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from clipseg_repro.strips import in_strips, write_png


def random(*shape, dtype):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("size", [(1, 1), (2, 301), (64, 3), (200, 70)])
@pytest.mark.parametrize(("channels", "dtype"), [((), np.uint8), ((), np.uint16), ((3,), np.uint8)])
def test_readers_see_the_array(tmp_path, size, channels, dtype):
    array = random(*size, *channels, dtype=dtype)
    write_png(tmp_path / "a.png", array)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), array)
    read = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read[..., ::-1] if channels else read, array)


def test_the_strips_are_one_zlib_stream(tmp_path):
    """zlib compares its checksum of the whole, which Pillow does not look at."""
    array = random(300, 500, dtype=np.uint8)
    write_png(tmp_path / "a.png", array)
    content, stream, at = (tmp_path / "a.png").read_bytes(), b"", 8
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            stream += content[at + 8 : at + 8 + size]
        at += size + 12
    assert len(zlib.decompress(stream)) == array.size + len(array)


def test_palettes_and_converted_rows(tmp_path):
    array = random(130, 20, dtype=np.uint8) % 3
    write_png(tmp_path / "a.png", array > 1, lambda rows: rows.astype(np.uint8), palette=[(0, 0, 0), (1, 2, 3)])
    read = Image.open(tmp_path / "a.png")
    assert read.mode == "P"
    np.testing.assert_array_equal(np.asarray(read), array > 1)
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), (array > 1)[..., None] * np.array([1, 2, 3]))


def test_a_failure_leaves_nothing(tmp_path):
    def fail(rows):
        return rows if len(rows) == 1 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        write_png(tmp_path / "a.png", random(100, 5, dtype=np.uint8), fail)
    assert not list(tmp_path.iterdir())


def test_strips_come_in_order():
    array = np.arange(1000)
    assert np.concatenate(list(in_strips(np.add, array, array))).tolist() == (2 * array).tolist()
