"""The protocols on PhraseCut."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from clipseg_repro.datasets.phrasecut import PhraseCut
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.metrics import threshold_counts
from clipseg_repro.evaluation.referring import absent_phrases, phrasecut
from clipseg_repro.segmenter import Segmenter, load_segmenter


def test_evaluation_counts_every_phrase_once(tiny_folder, data):
    segmenter, dataset = load_segmenter(str(tiny_folder), dtype="float32"), PhraseCut(data, "test")
    threads = torch.get_num_threads()
    result = phrasecut(segmenter, dataset)
    assert torch.get_num_threads() == threads
    assert result.samples["index"].tolist() == list(range(len(dataset)))
    for i, counts in enumerate(result.counts):  # as when one image waits for the other
        segmenter.set_image(dataset[i].image)
        (probability,) = segmenter.predict(dataset.phrases[i])
        alone = threshold_counts(probability, dataset[i].mask).numpy()
        assert np.abs(counts - alone).max() <= 2  # other sums in float32, so a pixel may pass a threshold
    table = result.table()
    groups = table[table.phrases.str.endswith(" phrases")].samples.sum()
    assert groups == table[table.phrases == "all"].samples.item() == len(dataset)
    assert (table.miou_low <= table.miou).all() and (table.miou <= table.miou_high).all()


@pytest.mark.parametrize("prompts", ["text", "visual"])
def test_a_stopped_evaluation_goes_on_and_counts_the_same(tiny_folder, data, tmp_path, monkeypatch, prompts):
    segmenter, dataset = load_segmenter(str(tiny_folder), device="cpu", dtype="float32"), PhraseCut(data, "train")
    given = {"prompts": prompts, "limit": 12, "keep": tmp_path}
    encode, encoded = Segmenter.set_image, []

    def spy(self, image):
        encode(self, image)
        encoded.append(image)

    monkeypatch.setattr(Segmenter, "set_image", spy)
    whole, images = phrasecut(segmenter, dataset, **given), len(encoded)
    assert not list(tmp_path.iterdir())

    def killed(self, image):
        if len(encoded) >= images + images // 2:
            raise KeyboardInterrupt
        spy(self, image)

    monkeypatch.setattr(Segmenter, "set_image", killed)
    with pytest.raises(KeyboardInterrupt):
        phrasecut(segmenter, dataset, **given)
    monkeypatch.setattr(Segmenter, "set_image", spy)
    phrasecut(segmenter, dataset, **given | {"seed": 1})  # another measurement, which leaves this one's file alone
    del encoded[-images:]
    assert len(list(tmp_path.iterdir())) == 1
    resumed = phrasecut(segmenter, dataset, **given)
    assert len(encoded) == 2 * images
    assert resumed.samples.equals(whole.samples)
    for name, state in whole.exact.metric_state.items():
        assert torch.equal(resumed.exact.metric_state[name], state)
    assert resumed.best("exact") == whole.best("exact")
    assert not list(tmp_path.iterdir())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = [  # of an image, what is said of it, and whether the others are counted first
    (lambda path: path.unlink(), "missing picture (2)", False),
    (lambda path: path.write_text("<html>"), "web page in place of a picture (2)", False),
    (lambda path: Image.new("RGB", (20, 30)).save(path), "picture of another size (2)", False),
    (cut, "2 of 4 images could not be measured", True),
]


@pytest.mark.parametrize(("damage", "said", "counted"), DAMAGES)
def test_bad_images_are_named_together_and_cost_nothing(tiny_folder, data, tmp_path, damage, said, counted):
    shutil.copytree(data, tmp_path / "data")
    segmenter, dataset = load_segmenter(str(tiny_folder), dtype="float32"), PhraseCut(tmp_path / "data", "test")
    bad = [dataset.folder / "images" / f"{image_id}.jpg" for image_id in list(dataset.by_image)[:2]]
    good = [path.read_bytes() for path in bad]
    for path in bad:
        damage(path)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        phrasecut(segmenter, dataset, keep=tmp_path / "kept")
    assert all(path.name in str(error.value) for path in bad)
    assert (tmp_path / "kept").exists() == counted
    for path, content in zip(bad, good, strict=True):
        path.write_bytes(content)
    resumed, whole = phrasecut(segmenter, dataset, keep=tmp_path / "kept"), phrasecut(segmenter, dataset)
    assert resumed.samples.equals(whole.samples)
    np.testing.assert_array_equal(resumed.counts, whole.counts)


def test_absent_phrases_are_absent(tiny_folder, data):
    dataset = PhraseCut(data, "test")
    rows = absent_phrases(load_segmenter(str(tiny_folder)), dataset)
    assert len(rows) == 3 * len(dataset.by_image)
    assert not any(dataset.may_show(row.image_id, row.phrase) for row in rows.itertuples())
