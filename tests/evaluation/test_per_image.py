"""Measuring image by image, with work that only adds."""

from types import SimpleNamespace

import pytest
from torchmetrics import SumMetric

from clipseg_repro.errors import InputError
from clipseg_repro.evaluation import per_image

IMAGES = ["a", "b", "c", 4, 5, 6]  # data sets name them by words or numbers


@pytest.fixture
def measure(segmenter, tmp_path):
    """Measure IMAGES, of which some cannot be read and some not worked on: the rows, the sum and what was read."""
    dataset = SimpleNamespace(fingerprint=lambda: "", phrases=[], check_pictures=lambda: None)

    def call(unreadable=(), unfit=()):
        read_now, total = [], SumMetric()

        def read(image):
            read_now.append(image)
            if image in unreadable:
                raise InputError(f"no {image}")
            return (image,)

        def work(own, image):
            assert own is not segmenter
            if image in unfit:
                raise InputError(f"bad {image}")
            return [{"image": image, "twice": 2 * image}], (10 if image == 4 else 1,)

        try:
            rows = per_image.measure(segmenter, dataset, IMAGES, read, work, "adding", total, tmp_path / "kept")
        except InputError as error:
            return str(error), read_now
        return rows, total.compute().item(), read_now

    return call


def test_rows_come_in_order_and_only_what_failed_is_done_again(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(per_image, "KEEP_EVERY", 0)
    message, read = measure(unreadable=["b"], unfit=["c", 5, 6])
    assert message.startswith("4 of 6 images could not be measured; what was counted of the others is kept")
    assert all(said in message for said in ("no b; ", "; and 1 more"))
    assert read == IMAGES
    rows, total, read = measure()
    assert rows == [{"image": image, "twice": 2 * image} for image in IMAGES]
    assert (total, read) == (15, ["b", "c", 5, 6])
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("content", [b"", b"no safetensors file at all", None])
def test_a_damaged_file_of_what_was_counted(measure, tmp_path, content):
    measure(unfit=["a"])
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:-3] if content is None else content)
    message, read = measure()
    assert message.startswith(f"'{kept}', what an earlier run has counted, is damaged (")
    assert message.endswith("): remove it")
    assert not read


def test_what_was_counted_cannot_be_written(measure, tmp_path):
    (tmp_path / "kept").write_text("a file in the place of the folder")
    message, _ = measure(unfit=["a"])
    assert message.startswith(f"cannot write '{tmp_path / 'kept'}")
