"""PhraseCut's reader on a hand-made official layout, and the distribution of PhraseCut+."""

import json
import pickle
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest, chi2_contingency, chisquare, kruskal, ks_2samp, kstest
from skimage.draw import polygon2mask

from clipseg_repro.datasets import phrasecut_files
from clipseg_repro.datasets.phrasecut import (
    PhraseCut,
    PhraseCutPlus,
    crop_window,
    mentions_property,
    rasterise,
)
from clipseg_repro.datasets.phrasecut_files import BAD_IMAGES, check
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
    dataset = PhraseCut(official, "test")
    whole, less = (PhraseCutPlus(dataset, negative=0.5, crop_once=True, remove=r) for r in (None, mentions_property))
    assert set(dataset.phrases) - set(less._phrases) == {"dog left of the wheel"} and len(less) == len(whole) - 1
    drawn = [sample for n in range(30) for sample in less[less.key(n)]]
    assert {sample.phrase for sample in drawn} == {"dog", "black dog"}  # nor as a negative
    assert whole[whole.key(0)][0].view.window == less[(0, whole.key(0)[1])][0].view.window  # what is kept is shared
    with pytest.raises(InputError, match="the data have 0 phrase"):
        PhraseCutPlus(dataset, remove=lambda phrase: True)


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
    with pytest.raises(InputError, match=r"missing file: refer_train.json.* clipseg-repro data check phrasecut"):
        PhraseCut(official, "train")
    with pytest.raises(InputError, match="unknown PhraseCut split 'dev': choose one of train, val, test, miniv"):
        PhraseCut(official, "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"task_id": "1__0", "ima', r"not valid JSON \(Unterminated string"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"<!DOCTYPE html><html>", "not valid JSON"),
        (b'{"tasks": []}', "file that holds no list: refer_test.json"),
        (b'[{"task_id": "1__0"}]', "image_id that is no whole number: '1__0'"),
        (b"[null, 5]", r"entry that is no object \(2\): None, 5"),
        (b"[]", "no phrase"),
    ],
)
def test_damaged_files(official, content, message):
    (official / "refer_test.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        PhraseCut(official, "test")


NAN, INFINITY = float("nan"), float("inf")
POLYGONS = "Polygons that are empty, or no lists of instances of polygons of [x, y]"
FAR = "coordinates that are not finite, or farther outside than the image's longer side"


def square(x=1, y=1):
    return {"Polygons": [[[[x, y], [3, 1], [3, 3], [1, 3]]]]}


@pytest.mark.parametrize(
    ("change", "wrong"),  # of the task '20__0', on an image of 8 x 6 pixels; '20__1' shares its image
    [
        (square(NAN), FAR),
        (square(y=INFINITY), FAR),
        (square(1e12), FAR),
        (square(-8.5), FAR),
        (square(y=16.5), FAR),
        (square(10**400), POLYGONS),
        (square(None), POLYGONS),
        (square("1"), POLYGONS),
        (square(True), POLYGONS),
        (square([1]), POLYGONS),
        ({"Polygons": None}, POLYGONS),
        ({"Polygons": []}, POLYGONS),
        ({"Polygons": [[]]}, POLYGONS),
        ({"Polygons": [[SQUARE, []]]}, POLYGONS),
        ({"Polygons": [SQUARE]}, POLYGONS),
        ({"Polygons": [[[[1, 2, 3], [4, 5, 6]]]]}, POLYGONS),
        ({"Polygons": {"x": 1}}, POLYGONS),
        ({"image_id": 5}, "task whose image has no sound entry in the table of images"),
        ({"image_id": "20"}, "image_id that is no whole number"),
        ({"image_id": "/etc/hostname"}, "image_id that is no whole number"),
        ({"image_id": "../20"}, "image_id that is no whole number"),
        ({"image_id": None}, "image_id that is no whole number"),
        ({"phrase": None}, "phrase that is no text"),
        ({"phrase": " "}, "phrase that is no text"),
        ({"phrase_structure": None}, "phrase_structure without name, attributes or relations"),
        ({"phrase_structure": {"name": "dog"}}, "phrase_structure without name, attributes or relations"),
    ],
)
def test_damaged_tasks(official, change, wrong):
    path = official / "refer_test.json"
    tasks = json.loads(path.read_text())
    tasks[0] |= change
    path.write_text(json.dumps(tasks))
    with pytest.raises(InputError) as error:
        PhraseCut(official, "test")
    assert f"refer_test.json: {wrong}: '20__0'. Remedy: " in str(error.value)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"width": 0}, "image of an impossible size: 20"),
        ({"height": -6}, "image of an impossible size: 20"),
        ({"height": 10**6, "width": 10**6}, "image of an impossible size: 20"),
        ({"height": "6"}, "image of an impossible size: 20"),
        ({"width": None}, "image of an impossible size: 20"),
        ({"image_id": "20"}, "image_id that is no whole number: '20'"),
        ({"image_id": 7}, "image_id that occurs twice: 7"),
        ({"split": 5}, "image without a split: 20"),
    ],
)
def test_damaged_table_of_images(official, change, wrong):
    path = official / "image_data_split3000.json"
    images = json.loads(path.read_text())
    images[0] |= change
    path.write_text(json.dumps(images))
    with pytest.raises(InputError, match=f"image_data_split3000.json: {wrong}"):
        PhraseCut(official, "test")


@pytest.mark.parametrize("names", [{"7": ["dog"]}, {"7": ["dog"], "20": "dog"}, {"7": ["dog"], "20": [5]}, []])
def test_damaged_names(official, names):
    (official / "names.json").write_text(json.dumps(names))
    with pytest.raises(InputError, match=r"names\.json"):
        PhraseCut(official, "test")


def test_every_kind_of_problem_is_counted_and_the_first_few_named(official):
    path = official / "refer_test.json"
    tasks = json.loads(path.read_text())
    broken = [dict(tasks[0], task_id=f"20__{n}", phrase=None) for n in range(10, 17)]
    tasks[2] |= square(NAN)
    path.write_text(json.dumps(tasks + broken + [tasks[1]]))
    with pytest.raises(InputError) as error:
        PhraseCut(official, "test")
    message = str(error.value)
    assert "\n" not in message
    assert (
        "refer_test.json: phrase that is no text (7): '20__10', '20__11', '20__12', '20__13', '20__14', ...; "
        in message
    )
    assert "refer_test.json: task_id that occurs twice: '20__1'; " in message
    assert f"refer_test.json: {FAR}: '7__2'. Remedy: " in message


def test_what_the_official_data_may_have_is_no_problem(official):
    """Coordinates beyond the border, an instance without polygons, short polygons, another image's bad coordinates."""
    path = official / "refer_test.json"
    tasks = json.loads(path.read_text())
    tasks[0] |= {"Polygons": [[], [[[-2, -2], [9.5, -2], [9.5, 7], [-2, 7]], [[1, 1], [2, 2]], [[1, 1]]]]}
    tasks[4] |= square(NAN)  # of one of the images that are left out
    tasks[5] |= square(NAN)  # of another split
    path.write_text(json.dumps(tasks))
    assert PhraseCut(official, "test")[2].mask.all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([20, 7, "test"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.lists(st.integers(0, 6), max_size=7), value=JSON, table=st.booleans())
def test_odd_values_give_samples_or_one_error(official, where, value, table):
    """Any value at any place of the annotations."""
    path = official / ("image_data_split3000.json" if table else "refer_test.json")
    sound = path.read_bytes()
    content = parent = json.loads(sound)
    try:
        for step in where or [0]:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            if not keys:
                break
            place, key = parent, keys[step % len(keys)]
            parent = parent[key]
            if not isinstance(parent, dict | list):
                break
        place[key] = value
        path.write_text(json.dumps(content))
        dataset = PhraseCut(official, "test")
        for i in range(len(dataset)):
            sample = dataset[i]
            assert sample.mask.shape == sample.image.shape[:2]
            dataset.may_show(sample.image_id, "dog")
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(sound)


def web_page(path):
    path.write_bytes(b"\n<!DOCTYPE html><title>503 Service Unavailable</title>")


DAMAGED_IMAGES = [
    (lambda path: Image.new("RGB", (9, 6)).save(path), r"picture of another size.*9 x 6 pixels, annotated as 8 x 6"),
    (lambda path: path.write_bytes(path.read_bytes()[:400]), "unreadable picture"),
    (lambda path: path.write_bytes(b""), r"file that is no picture.*empty"),
    (web_page, "web page in place of a picture"),
    (Path.unlink, "missing picture"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED_IMAGES)
def test_damaged_images(official, damage, message):
    dataset = PhraseCut(official, "test")
    damage(official / "images" / "20.jpg")
    with pytest.raises(InputError, match=message) as error:
        dataset[2]
    assert "images/20.jpg'" in str(error.value)
    assert "clipseg-repro data check phrasecut" in str(error.value)


def test_pictures_are_checked_by_their_headers(official):
    dataset = PhraseCut(official, "test")
    dataset.check_pictures()
    web_page(official / "images" / "20.jpg")
    (official / "images" / "7.jpg").unlink()
    with pytest.raises(InputError, match=r"missing picture: 7.jpg; web page in place of a picture: 20.jpg"):
        dataset.check_pictures()


# The check of a whole folder


@pytest.fixture
def whole(official, monkeypatch):
    """The official layout with all its splits, under the name of the official script; its counts taken as official."""
    (official / "image_data_split3000.json").rename(official / "image_data_split.json")
    for split in ("train", "val", "miniv"):
        shutil.copy(official / "refer_test.json", official / f"refer_{split}.json")
    monkeypatch.setattr(phrasecut_files, "COUNTS", {split: [(6, 4)] for split in phrasecut_files.SPLITS})
    return official


def test_a_whole_folder_is_all_right(whole):
    counts, problems = check(whole.parent)
    assert problems.lines() == []
    assert counts == dict.fromkeys(("train", "val", "test", "miniv"), (6, 4))
    assert PhraseCut(whole, "test").phrases == ["dog", "black dog", "black dog", "dog left of the wheel"]


def test_check_lists_all_problems_at_once(whole, monkeypatch):
    for image_id, damage in ((7, web_page), (20, Path.unlink)):
        damage(whole / "images" / f"{image_id}.jpg")
    (whole / "refer_val.json").unlink()
    tasks = json.loads((whole / "refer_train.json").read_text())
    (whole / "refer_train.json").write_text(json.dumps(tasks[1:]))
    monkeypatch.setattr(phrasecut_files, "COUNTS", phrasecut_files.COUNTS | {"train": [(7, 4), (8, 4)]})
    _, problems = check(whole)
    assert problems.lines() == [
        "refer_train.json: not the official number of entries: 5 phrases on 4 images, official 7 phrases on 4 images",
        "missing file: refer_val.json",
        "web page in place of a picture: 7.jpg (an error message of the server that it was fetched from)",
        "missing picture: 20.jpg",
    ]
    assert len(problems) == 4


def test_official_counts():
    """Table in the README of ChenyunWu/PhraseCutDataset: miniv is a part of val there, its file is not of val's."""
    first = {split: counts[0] for split, counts in phrasecut_files.COUNTS.items()}
    assert [sum(first[s][k] for s in ("train", "val", "test")) for k in (0, 1)] == [345_486, 77_262]
    phrases, images = first["miniv"]
    assert phrasecut_files.COUNTS["val"][1] == (first["val"][0] - phrases, first["val"][1] - images)


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
        assert all(np.array_equal(s.image, samples[0].image) and s.mask.shape == s.image.shape[:2] for s in samples)
        if i:
            more.update(s.phrase for s in samples[1:])
        else:
            assert {s.phrase for s in samples} == {"cow"}
    assert set(more) == {"cat", "dog", "owl"}
    assert is_plausible(chisquare(list(more.values())).pvalue)


def test_crops_drawn_once_are_the_same_for_all_seeds_and_epochs(many):
    views = {"query": {}, "support": {}}
    for seed in (0, 1):
        plus = PhraseCutPlus(many, crop_once=True, seed=seed)
        for n in range(100):
            s = draw(plus, n)
            views["query"].setdefault(many.image_id(s.view.sample), set()).add(str(s.view.window))
            if s.supported:
                views["support"].setdefault(s.supported.sample, set()).add(str(s.supported.window))
    assert len(views["query"]) == len(many.by_image) and len(views["support"]) == len(many.supported)
    assert all(len(found) == 1 for kind in views.values() for found in kind.values())
    assert len(set.union(*views["query"].values())) > 1


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
    for wrong in ({"negative": 1.2}, {"text_weight": (0.6, 0.5)}, {"text_weight": (0, 2)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            PhraseCutPlus(many, **wrong)


def test_too_few_phrases(official):
    """Only "black dog" has a second sample, and a negative needs another phrase."""
    with pytest.raises(InputError, match=r"1 phrase\(s\) that two samples share, 2 needed: .* negative=0"):
        PhraseCutPlus(PhraseCut(official, "test"), text_weight=(0, 0))
    assert len(PhraseCutPlus(PhraseCut(official, "test"), text_weight=(0, 0), negative=0)) == 2


def test_phrases_are_grouped(many):
    assert {p: len(i) for p, i in many.by_phrase.items()} == {"cat": 6, "dog": 3, "owl": 1}
    assert all(a < b for indices in many.by_phrase.values() for a, b in pairwise(indices))
