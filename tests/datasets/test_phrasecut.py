"""PhraseCut's reader on a hand-made official layout, and the distribution of PhraseCut+."""

import json
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest, chi2_contingency, chisquare, kruskal, ks_2samp, kstest
from skimage.draw import polygon2mask

from clipseg_repro.datasets.phrasecut import (
    PhraseCut,
    PhraseCutPlus,
    crop_window,
    mentions_property,
    rasterise,
)
from clipseg_repro.datasets.phrasecut_files import BAD_IMAGES
from clipseg_repro.errors import InputError
from clipseg_repro.prompts import TRAIN_TEMPLATES

# (image id, split, width, height)
IMAGES = [(20, "test", 8, 6), (7, "test", 5, 5), (61530, "test", 4, 4), (9, "val", 5, 5)]
SQUARE = [[1, 1], [3, 1], [3, 3], [1, 3]]
TASKS = [
    # two instances, the second of two polygons: a 3 x 3 square, a triangle with float corners, one point
    (20, "black dog", [[SQUARE], [[[4.5, 0.5], [7.5, 0.5], [7.5, 3.4]], [[0, 5]]]]),
    (20, "dog left of the wheel", [[SQUARE]]),
    (7, "dog", [[SQUARE]]),
    (7, "black dog", [[[[0, 0], [4, 0], [4, 0], [0, 0]]]]),
    (61530, "black dog", [[SQUARE]]),
    (9, "dog", [[SQUARE]]),
]


def write_layout(folder, images=IMAGES, tasks=TASKS):
    """An official VGPhraseCut_v0 with the given tasks, all of them in refer_test.json."""
    folder = folder / "VGPhraseCut_v0"
    (folder / "images").mkdir(parents=True)
    table = [{"image_id": i, "split": s, "width": w, "height": h, "coco_id": None} for i, s, w, h in images]
    (folder / "image_data_split3000.json").write_text(json.dumps(table))
    for i, _, w, h in images:
        mode = "L" if i == 7 else "RGB"
        Image.new(mode, (w, h), 100 if mode == "L" else (200, 50, 20)).save(folder / "images" / f"{i}.jpg", quality=95)
    entries = []
    for n, (image_id, phrase, polygons) in enumerate(tasks):
        structure = {"name": phrase.split()[-1], "attributes": [], "relation_ids": [], "relation_descriptions": []}
        entries.append(
            {"task_id": f"{image_id}__{n}", "image_id": image_id, "ann_ids": [n], "instance_boxes": [[0, 0, 1, 1]]}
            | {"Polygons": polygons, "phrase": phrase, "phrase_structure": structure | {"type": "name"}}
        )
    (folder / "refer_test.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def official(tmp_path):
    return write_layout(tmp_path)


def test_samples_of_the_official_layout(official):
    dataset = PhraseCut(official.parent, "test")
    # by image id, then as in the file; without the bad image and the image of another split
    assert dataset.phrases == ["dog", "black dog", "black dog", "dog left of the wheel"]
    assert [dataset[i].image_id for i in range(len(dataset))] == [7, 7, 20, 20]
    assert PhraseCut(official, "test").phrases == dataset.phrases
    sample = dataset[2]
    # the square, the point, and the triangle (4.5, 0.5), (7.5, 0.5), (7.5, 3.4): in row y it holds the pixels x with
    # 4.5 + (y - 0.5) * 3 / 2.9 <= x <= 7.5, from 5.02 in row 1, 6.05 in row 2, 7.09 in row 3
    by_hand = ["00000000", "01110011", "01110001", "01110000", "00000000", "10000000"]
    by_hand = np.array([[int(c) for c in row] for row in by_hand])
    assert sample.mask.tolist() == by_hand.tolist()
    assert sample.image.shape == (6, 8, 3)
    assert np.abs(sample.image.astype(int) - (200, 50, 20)).max() <= 3
    assert sample.mask.dtype == sample.image.dtype == np.uint8
    assert sample.info["task_id"] == "20__0"
    assert sample.info["phrase_structure"]["type"] == "name"
    assert sample.support is None


def test_grey_images_become_rgb(official):
    image = PhraseCut(official, "test")[0].image
    assert image.shape == (5, 5, 3)
    assert (image == image[..., :1]).all()


def test_bad_images_are_the_seventeen():
    assert len(BAD_IMAGES) == 17


def test_rasterise_is_polygon2mask():
    """On any polygon, and on outlines along the pixel grid, which take the fast way."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        polygon = rng.uniform(-3, 33, (rng.integers(3, 9), 2))
        for corners in (polygon, polygon.round()):
            expected = polygon2mask((30, 25), corners[:, ::-1])
            assert np.array_equal(rasterise([corners], (30, 25)), expected)
        x, y = rng.integers(0, 20, 2)
        w, h, cut = rng.integers(5, 10, 2).tolist() + [int(rng.integers(1, 4))]
        octagon = [(x + cut, y), (x + w, y), (x + w + cut, y + cut), (x + w + cut, y + h), (x, y + h), (x, y + cut)]
        octagon = np.array(octagon, float)
        assert np.array_equal(rasterise([octagon], (30, 25)), polygon2mask((30, 25), octagon[:, ::-1]))


def test_words_of_table_8_are_removed(official):
    assert mentions_property("wheel of a car")
    assert not mentions_property("wheelchair")
    dataset = PhraseCut(official, "test", remove=mentions_property)
    assert dataset.phrases == ["dog", "black dog", "black dog"]
    with pytest.raises(InputError, match="no phrase of split 'test' is left"):
        PhraseCut(official, "test", remove=lambda phrase: True)


def test_visual_support_is_another_sample_of_the_phrase(official):
    dataset = PhraseCut(official, "test")
    assert dataset.supported == [1, 2]
    rng = np.random.default_rng(0)
    assert dataset.visual_support(0, rng) is None
    for _ in range(5):
        assert dataset.visual_support(1, rng).info["task_id"] == "20__0"
        assert dataset.visual_support(2, rng).info["task_id"] == "7__3"


def test_what_an_image_may_show(official):
    dataset = PhraseCut(official, "test")
    assert dataset.may_show(20, "dog")
    assert not dataset.may_show(7, "wheel")
    (official / "names.json").write_text(json.dumps({"7": ["race car", "wheel"], "20": []}))
    dataset = PhraseCut(official, "test")
    assert dataset.may_show(7, "car")
    assert dataset.may_show(7, "wheel")
    assert not dataset.may_show(7, "race")
    assert not dataset.may_show(20, "dog")


# Bad input


def test_missing_data_is_named_with_the_remedy(tmp_path, official):
    with pytest.raises(InputError, match=r"nowhere.*clipseg-repro data build.*official"):
        PhraseCut(tmp_path / "nowhere", "test")
    with pytest.raises(InputError, match=r"refer_train.json' is missing"):
        PhraseCut(official, "train")
    with pytest.raises(InputError, match="unknown PhraseCut split 'dev': choose one of train, val, test, miniv"):
        PhraseCut(official, "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"task_id": "1__0", "ima', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"tasks": []}', "holds no list"),
        (b'[{"task_id": "1__0"}]', "entry 0 has no 'image_id'"),
        (b"[]", "no phrase"),
    ],
)
def test_damaged_annotations(official, content, message):
    (official / "refer_test.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        PhraseCut(official, "test")


def test_damaged_images(official):
    dataset = PhraseCut(official, "test")
    path = official / "images" / "20.jpg"
    Image.new("RGB", (9, 6)).save(path)
    with pytest.raises(InputError, match=r"9 x 6 pixels, image_data_split3000.json says 8 x 6"):
        dataset[2]
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(InputError, match=r"20.jpg' cannot be read"):
        dataset[2]
    path.unlink()
    with pytest.raises(InputError, match=r"20.jpg' is missing"):
        dataset[2]


# PhraseCut+


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Ten images of 40 x 30 pixels: 6 of "cat", 3 of "dog", one "owl"; image n has a 12 px square from x = 2 n + 1."""
    phrases = ["cat"] * 6 + ["dog"] * 3 + ["owl"]
    square = [[[2 * n + 1, 9], [2 * n + 12, 9], [2 * n + 12, 20], [2 * n + 1, 20]] for n in range(10)]
    images = [(n + 1, "test", 40, 30) for n in range(10)]
    tasks = [(n + 1, phrase, [[square[n]]]) for n, phrase in enumerate(phrases)]
    return PhraseCut(write_layout(tmp_path_factory.mktemp("many"), images, tasks), "test")


@pytest.fixture(scope="module")
def draws(many):
    plus = PhraseCutPlus(many, text_weight=(0.0, 0.5), seed=1)
    return [(plus.key(n)[1], draw(plus, n)) for n in range(1500)]


def draw(plus, n):
    """The n-th draw of a view with one phrase per image."""
    (sample,) = plus[plus.key(n)]
    return sample


def is_plausible(p):
    """Tests are seeded; a p-value of 0.001 is 3.3 standard errors of a rate."""
    return p > 1e-3


def test_negatives(many, draws):
    negatives = [(i, s) for i, s in draws if not s.mask.any()]
    assert is_plausible(binomtest(len(negatives), len(draws), 0.2).pvalue)
    assert all(s.phrase == many.phrases[i] for i, s in draws if s.mask.any())
    # the other phrase is uniform over the different phrases, however frequent each is
    for own in many.by_phrase:
        other = Counter(s.phrase for i, s in negatives if many.phrases[i] == own)
        assert set(other) == set(many.by_phrase) - {own}
        assert is_plausible(chisquare(list(other.values())).pvalue)


def test_templates(draws):
    counts = Counter(s.text for _, s in draws if s.phrase == "cat")
    assert set(counts) == {t.format("cat") for t in TRAIN_TEMPLATES}
    assert is_plausible(chisquare(list(counts.values())).pvalue)


def test_supports_are_drawn_uniformly_from_the_samples_of_the_phrase(many):
    """Of the phrase that is asked for, in negatives too. As released, the query itself is among them."""
    plus = PhraseCutPlus(many, crop=False, seed=2)
    drawn, itself = {"cat": Counter(), "dog": Counter()}, []
    for n in range(1500):
        s = draw(plus, n)
        assert (s.support is None) == (s.phrase == "owl")  # the unique phrase
        if s.support:
            support = (
                int(np.flatnonzero(s.support.mask.any(0))[0]) // 2
            )  # uncropped, the square's left side tells the sample
            drawn[s.phrase][support] += 1
            if s.phrase == "cat" and s.mask.any():
                itself.append(support == plus.key(n)[1])
    for phrase, counts in drawn.items():
        assert sorted(counts) == many.by_phrase[phrase]
        assert is_plausible(chisquare(list(counts.values())).pvalue)
    assert is_plausible(binomtest(sum(itself), len(itself), 1 / 6).pvalue)


def test_supports_have_a_crop_of_their_own(draws):
    supports = [s.support for _, s in draws if s.support]
    assert all(s.image.shape == (30, 30, 3) and s.mask.shape == (30, 30) and s.mask.any() for s in supports)
    assert len({int(np.flatnonzero(s.mask.any(0))[0]) for s in supports}) > 15


def test_text_weights(many, draws):
    """Uniform on (0, 1) as in the paper, unless told the released (0, 0.5)."""
    plus = PhraseCutPlus(many, negative=0, crop=False, seed=3)
    for high, samples in ((0.5, [s for _, s in draws]), (1.0, [draw(plus, n) for n in range(500)])):
        weights = [s.text_weight for s in samples if s.support]
        assert is_plausible(kstest(weights, "uniform", args=(0, high)).pvalue)
        assert {s.text_weight for s in samples if s.support is None} == {1.0}


def test_what_is_drawn_is_independent(draws):
    """Whether negative, the template, and the text weight."""
    forms = [t.format("cat") for t in TRAIN_TEMPLATES]
    cats = [(not s.mask.any(), forms.index(s.text), s.text_weight) for _, s in draws if s.phrase == "cat"]
    negative, form, weight = map(np.array, zip(*cats, strict=True))
    assert is_plausible(chi2_contingency(np.histogram2d(negative, form, (2, 9))[0]).pvalue)
    assert is_plausible(ks_2samp(weight[negative], weight[~negative]).pvalue)
    assert is_plausible(kruskal(*(weight[form == k] for k in range(9))).pvalue)


def test_plain_phrasecut_has_text_only(many):
    plain = PhraseCutPlus(many, negative=0, visual=False)
    for n in range(50):
        s = draw(plain, n)
        assert s.support is None
        assert s.text_weight == 1.0
        assert s.mask.any()


def test_draws_repeat_exactly(many):
    """Also in another process: the view can be pickled."""
    first, second = PhraseCutPlus(many, seed=5), pickle.loads(pickle.dumps(PhraseCutPlus(many, seed=5)))
    other = PhraseCutPlus(many, seed=6)
    # the second one in another order, as after a resume
    again = {n: draw(second, n) for n in reversed(range(30))}
    same = 0
    for n in range(30):
        a, b = draw(first, n), again[n]
        assert (a.text, a.text_weight) == (b.text, b.text_weight)
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.mask, b.mask)
        assert (a.support is None) == (b.support is None)
        if a.support:
            assert np.array_equal(a.support.mask, b.support.mask)
        same += a.text == draw(other, n).text
    assert same < 15


def test_phrases_of_an_image_share_its_crop(tmp_path):
    tasks = [(20, phrase, [[SQUARE]]) for phrase in ("cat", "dog", "owl")] + [(7, "cow", [[SQUARE]])]
    dataset = PhraseCut(write_layout(tmp_path, tasks=tasks), "test")
    plus = PhraseCutPlus(dataset, negative=0, phrases_per_image=4)
    more = Counter()
    for n in range(400):
        epoch, i = plus.key(n)
        samples = plus[epoch, i]
        assert len(samples) == 4
        assert samples[0].phrase == dataset.phrases[i]
        assert all(s.image is samples[0].image and s.mask.shape == s.image.shape[:2] for s in samples)
        if i:
            more.update(s.phrase for s in samples[1:])
        else:
            assert {s.phrase for s in samples} == {"cow"}
    assert set(more) == {"cat", "dog", "owl"}
    assert is_plausible(chisquare(list(more.values())).pvalue)


def test_an_epoch_visits_every_sample_once(many):
    plus = PhraseCutPlus(many)
    keys = [plus.key(n) for n in range(20)]
    assert [e for e, _ in keys] == [0] * 10 + [1] * 10
    first, second = ([i for e, i in keys if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_crops_hold_the_object():
    mask = np.zeros((20, 100), np.uint8)
    mask[5:15, 60:66] = 1  # 60 pixels, 15% of a 20 x 20 crop
    rng = np.random.default_rng(0)
    starts = []
    for _ in range(200):
        rows, columns = crop_window(mask, rng)
        assert (rows.start, rows.stop, columns.stop - columns.start) == (0, 20, 20)
        assert mask[rows, columns].sum() > 20  # 5%
        starts.append(columns.start)
    # all places from 43 (columns 60 to 62 in view) to 63 (63 to 65), about equally often
    assert set(starts) == set(range(43, 64))
    assert is_plausible(chisquare(list(Counter(starts).values())).pvalue)
    # upright, and too small for 5%: the fullest view of 50
    tall = np.zeros((90, 10), np.uint8)
    tall[40:42, 3:5] = 1
    fullest = [tall[crop_window(tall, rng)].sum() for _ in range(100)]
    assert np.mean(np.array(fullest) == 4) > 0.9
    assert all(w.shape == (10, 10) for w in (tall[crop_window(tall, rng)] for _ in range(5)))


def test_wrong_settings(many):
    for settings in ({"negative": 1.2}, {"text_weight": (0.6, 0.5)}, {"text_weight": (0, 2)}):
        with pytest.raises(InputError, match=next(iter(settings))):
            PhraseCutPlus(many, **settings)


def test_too_few_phrases(official):
    """Only "black dog" has a second sample, and a negative needs another phrase."""
    with pytest.raises(InputError, match=r"1 phrase\(s\) that two samples share, 2 needed: .* negative=0"):
        PhraseCutPlus(PhraseCut(official, "test"), text_weight=(0, 0))
    assert len(PhraseCutPlus(PhraseCut(official, "test"), text_weight=(0, 0), negative=0)) == 2


def test_phrases_are_grouped(many):
    assert {p: len(i) for p, i in many.by_phrase.items()} == {"cat": 6, "dog": 3, "owl": 1}
    assert all(a < b for indices in many.by_phrase.values() for a, b in pairwise(indices))
