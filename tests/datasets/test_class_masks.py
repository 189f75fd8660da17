"""Readers of masks by class, each on a small copy of its official layout that has the traps of the real files."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pycocotools import mask as rle

from clipseg_repro.datasets import episodes, pascal_context, voc
from clipseg_repro.datasets.class_masks import VOID
from clipseg_repro.datasets.coco import COCO, THINGS
from clipseg_repro.datasets.coco_stuff import COCOStuff
from clipseg_repro.datasets.fss1000 import FSS1000
from clipseg_repro.datasets.lvis import LVIS
from clipseg_repro.datasets.own import Own
from clipseg_repro.datasets.pascal_context import PascalContext
from clipseg_repro.datasets.voc import VOC
from clipseg_repro.errors import InputError

SIZE = 6, 8  # height, width


def picture(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (200, 50, 20)).save(path)


def label_map(path, labels, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(labels, np.uint8), "L" if mode == "L" else None)
    if mode != "L":
        image = image.convert("L")
        image.putpalette([c for n in range(256) for c in (n, 255 - n, 7 * n % 256)])
    image.convert(mode).save(path) if mode == "RGB" else image.save(path)


def labels(**areas):
    """A map with the given labels in its first rows: labels(15=8) has no meaning in Python, so _15=8."""
    flat = [int(name[1:]) for name, n in areas.items() for _ in range(n)]
    return np.array(flat + [0] * (48 - len(flat)), np.uint8).reshape(SIZE)


@pytest.fixture
def devkit(tmp_path):
    """VOC 2012 of a horse (13) with a void border, a picture of two classes, and one of nothing but background."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    maps = {"2007_000001": labels(_13=20, _255=4), "2007_000002": labels(_13=8, _15=16), "2007_000003": labels()}
    for name, stored in maps.items():
        picture(folder / "JPEGImages" / f"{name}.jpg")
        label_map(folder / "SegmentationClass" / f"{name}.png", stored)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in maps))
    return folder


def test_voc(devkit, tmp_path):
    data = VOC(tmp_path, "val")
    assert len(data) == 3
    assert data.shown == [{0: 24, 13: 20}, {0: 24, 13: 8, 15: 16}, {0: 48}]
    mask = data.mask(0, 13)
    assert [(mask == v).sum() for v in (0, 1, VOID)] == [24, 20, 4]
    assert data.sample(1, 15).phrase == "person"
    assert data.prompts[11] == "dining table"
    assert not data.check()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: label_map(d / "SegmentationClass/2007_000001.png", labels(_13=20), "RGB"), "RGB, not labels"),
        (lambda d: label_map(d / "SegmentationClass/2007_000001.png", labels(_113=20), "L"), "labels 113 are none of"),
        (lambda d: (d / "SegmentationClass/2007_000001.png").unlink(), "missing"),
        (lambda d: (d / "SegmentationClass/2007_000001.png").write_bytes(b"\x89PNG"), "unreadable"),
    ],
)
def test_label_maps_of_another_kind_are_refused(devkit, damage, message):
    damage(devkit)
    data = VOC(devkit)
    with pytest.raises(InputError, match=message):
        data.labels(0)
    assert [message in line for line in data.check().lines()] == [True]


def test_lists(devkit):
    with pytest.raises(InputError, match=r"no list .*trainaug.txt' \(splits that are there: val\)"):
        VOC(devkit, "trainaug")
    (devkit / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nb\na\n")
    with pytest.raises(InputError, match="names a twice"):
        VOC(devkit)
    with pytest.raises(InputError, match="no VOC2012 at"):
        VOC(devkit / "JPEGImages")


@pytest.fixture
def context(tmp_path):
    """Pascal Context of one picture, as the converter writes it: a horse (31) on grass (29), the rest unlabelled."""
    folder = tmp_path / "VOCdevkit" / "VOC2010"
    picture(folder / "JPEGImages" / "2008_000001.jpg")
    label_map(folder / "SegmentationClassContext" / "2008_000001.png", labels(_31=16, _29=8))
    (folder / "ImageSets" / "SegmentationContext").mkdir(parents=True)
    (folder / "ImageSets" / "SegmentationContext" / "val.txt").write_text("2008_000001\n")
    return folder


def test_pascal_context_in_both_forms(context, tmp_path):
    """The `detail` annotations give the same: categories 207 (horse), 187 (grass) and 1, which is none of the 59."""
    data = PascalContext(tmp_path)
    assert {data.classes[c]: n for c, n in data.areas(0).items()} == {"grass": 8, "horse": 16}
    stored = data.labels(0)
    (context / "SegmentationClassContext").rename(context / "elsewhere")
    regions = {187: stored != VOID, 207: stored == 30, 1: stored == VOID}
    annotations = [
        {"id": n, "image_id": 5, "category_id": n, "segmentation": encode(region)} for n, region in regions.items()
    ]
    image = {"image_id": 5, "file_name": "2008_000001.jpg", "height": 6, "width": 8, "phase": "val"}
    content = {"images": [image], "annos_segmentation": annotations}
    (context / "trainval_merged.json").write_text(json.dumps(content))
    assert (PascalContext(tmp_path).labels(0) == stored).all()
    assert dict(zip(pascal_context.CLASSES, pascal_context.NUMBERS, strict=True))["dog"] == 113


def test_pascal_context_in_another_order_is_reported(context, tmp_path):
    """VOC's own map says horse where Context's says computer: 31 is a door where VOC's classes come first."""
    assert not PascalContext(tmp_path).check()
    label_map(context / "SegmentationClass" / "2008_000001.png", labels(_13=16))
    assert not PascalContext(tmp_path).check()
    label_map(context / "SegmentationClassContext" / "2008_000001.png", labels(_13=16, _36=8))
    assert "contradicts VOC's own" in PascalContext(tmp_path).check().lines()[0]


def encode(region):
    found = rle.encode(np.asfortranarray(region.astype(np.uint8)))
    return found | {"counts": found["counts"].decode()}


def box(x, y, width, height):
    """A box of whole pixels as a polygon."""
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.fixture
def coco(tmp_path):
    """Two pictures of COCO 2014: a person of two boxes with a crowd, and nothing. Numbers of categories have holes."""
    crowd = {"size": list(SIZE), "counts": [24, 24]}  # uncompressed: the right half
    annotations = [
        {"id": 1, "image_id": 9, "category_id": 1, "iscrowd": 0, "segmentation": box(0, 0, 2, 2) + box(0, 4, 2, 2)},
        {"id": 2, "image_id": 9, "category_id": 1, "iscrowd": 1, "segmentation": crowd},
        {"id": 3, "image_id": 9, "category_id": 90, "iscrowd": 0, "segmentation": [[1, 1, 2, 2]]},
    ]
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg", "height": 6, "width": 8} for i in (9, 4)]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": n, "name": THINGS[n]} for n in (90, 1)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    picture(tmp_path / "val2014" / "COCO_val2014_000000000009.jpg")
    picture(tmp_path / "val2014" / "000000000004.jpg")  # without the prefix of 2014
    return tmp_path


def test_coco(coco):
    data = COCO(coco)
    assert (data.ids, data.classes) == ([4, 9], ["person", "toothbrush"])
    assert data.shown == [{}, {0: 8}]
    mask = data.mask(1, 0)
    assert (mask[:, 4:] == VOID).all()
    assert mask[:2, :2].all() and mask[4:, :2].all() and mask[:, :4].sum() == 8
    assert data.image(0).shape == (6, 8, 3)
    assert data.check().lines() == ["mask that comes out empty: annotation 3"]


def test_coco_faults_are_named_together(coco):
    file = coco / "annotations" / "instances_val2014.json"
    content = json.loads(file.read_text())
    content["annotations"] += [{"id": 1, "image_id": 9, "category_id": 1, "segmentation": []}, {"id": 7, "image_id": 9}]
    content["images"][0]["height"] = "6"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        COCO(coco)
    for fault in ("impossible size: 9", "id that occurs twice: 1", "neither polygons nor RLE: 7", "no sound entry"):
        assert fault in str(error.value)


def test_lvis_in_both_versions(tmp_path):
    """v1 gives addresses in place of names, and its pictures are in both of COCO's folders."""
    image = {"id": 4, "height": 6, "width": 8, "coco_url": "http://images.cocodataset.org/train2017/000000000004.jpg"}
    categories = [{"id": n, "name": name} for n, name in ((3, "shirt_(clothing)"), (8, "deck_chair"))]
    annotations = [{"id": 1, "image_id": 4, "category_id": 8, "segmentation": box(0, 0, 3, 2)}]
    content = {"images": [image], "categories": categories, "annotations": annotations}
    folder = tmp_path / "LVIS"
    folder.mkdir()
    (folder / "lvis_v1_val.json").write_text(json.dumps(content))
    picture(tmp_path / "COCO" / "images" / "train2017" / "000000000004.jpg")
    data = LVIS(folder)
    assert (data.shown, data.prompts, data.image(0).shape) == ([{1: 6}], ["shirt", "deck chair"], (6, 8, 3))
    (folder / "lvis_v1_val.json").rename(folder / "lvis_v0.5_val.json")
    assert LVIS(folder).ids == [4]
    with pytest.raises(InputError, match=r"lvis_v1_train\.json"):
        LVIS(folder, "train")


def test_coco_stuff(tmp_path):
    """A person (0), a brick wall (170), nothing (255); a hat (25), which COCO has a number for, but no masks."""
    picture(tmp_path / "images" / "val2017" / "000000000004.jpg")
    path = tmp_path / "stuffthingmaps" / "val2017" / "000000000004.png"
    label_map(path, labels(_170=8, _255=16), "L")
    data = COCOStuff(tmp_path)
    assert len(data.classes) == 171
    assert {data.prompts[c]: n for c, n in data.areas(0).items()} == {"person": 24, "brick wall": 8}
    assert not data.check()
    label_map(path, labels(_25=8), "L")
    with pytest.raises(InputError, match="labels 25 are none of the 171"):
        COCOStuff(tmp_path).labels(0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["0 and 1", "smooth", "palette"])
def test_fss1000(tmp_path, nested, kind):
    """The same object of 12 pixels, however its mask is stored."""
    region = labels(_1=12).astype(bool)
    for name in ("abacus", "zebra"):
        for n in (1, 10, 2):
            picture(tmp_path / name / ("image" if nested else "") / f"{n}.jpg")
            path = tmp_path / name / ("label" if nested else "") / f"{n}.png"
            path.parent.mkdir(exist_ok=True)
            if kind == "0 and 1":
                colours = np.repeat(region[..., None], 3, 2).astype(np.uint8)
                colours[0, 0, 0] = 0  # (0, 1, 1): the authors' masks have such
                Image.fromarray(colours).save(path)
            elif kind == "smooth":
                grey = np.where(region, 230, 40).astype(np.uint8)
                Image.fromarray(np.dstack([grey] * 3 + [np.full(SIZE, 255, np.uint8)])).save(path)
            else:
                image = Image.fromarray(region.astype(np.uint8)).convert("P")
                image.putpalette([0, 0, 0, 128, 0, 0])
                image.save(path)
    data = FSS1000(tmp_path, None)
    assert data.ids == [f"{name}/{n}" for name in ("abacus", "zebra") for n in (1, 2, 10)]
    assert data.shown == [{0: 12}] * 3 + [{1: 12}] * 3
    assert (data.mask(4, 1) == region).all()
    Image.new("RGB", SIZE[::-1]).save(data.mask_path(2))
    assert "is empty" in data.check().lines()[0]
    with pytest.raises(InputError, match="no list"):
        FSS1000(tmp_path, "test")


def test_own_data(tmp_path):
    """Two rows about one picture and phrase are one; a file without masks of the words is refused by line."""
    for name in ("a b.png", "ü.jpg"):
        picture(tmp_path / name)
    for n, region in enumerate((labels(_1=12), labels(_255=20), np.ones(SIZE))):
        Image.fromarray(np.asarray(region, np.uint8)).save(tmp_path / f"m{n}.png")
    rows = [
        ("a b.png", "m0.png", "a cup", "train"),
        ("a b.png", "m1.png", "a cup", "train"),
        ("ü.jpg", "m2.png", "Tür", "val"),
    ]
    pd.DataFrame(rows, columns=["image", "mask", "phrase", "split"]).to_csv(tmp_path / "segments.csv", index=False)
    data = Own(tmp_path / "segments.csv")
    assert data.classes == ["Tür", "a cup"]
    assert data.shown == [{1: 20}, {0: 48}]
    assert "fills the picture: ü.jpg 'Tür'" in data.check().lines()[0]
    assert Own(tmp_path / "segments.csv", "val").ids == ["ü.jpg"]
    (tmp_path / "segments.csv").write_text("image,mask,phrase\na b.png,gone.png,cup\nü.jpg,m0.png,\n")
    with pytest.raises(
        InputError, match=r"missing file: gone.png \(line 2\); line with an empty cell: 3|empty cell: 3"
    ):
        Own(tmp_path / "segments.csv")


def test_folds():
    """Pascal-5i: the published folds by name; COCO-20i: every fourth of the 80. Each class is held out once."""
    assert [voc.CLASSES[c] for c in episodes.pascal_fold(3)] == ["pottedplant", "sheep", "sofa", "train", "tvmonitor"]
    assert sorted(c for fold in range(4) for c in episodes.pascal_fold(fold)) == list(range(1, 21))
    assert episodes.coco_fold(1)[:3] == [1, 5, 9]
    assert sorted(c for fold in range(4) for c in episodes.coco_fold(fold)) == list(range(80))
    with pytest.raises(InputError, match="fold 4"):
        episodes.pascal_fold(4)


def test_episodes(devkit, tmp_path):
    """A picture is a query if it shows enough; its class is any that it shows; supports are other pictures."""
    data = VOC(devkit)
    drawn = episodes.episode_per_picture(data, [13], least=8)
    assert drawn == [episodes.Episode(0, 13, (1,)), episodes.Episode(1, 13, (0,))]
    assert not episodes.episode_per_picture(data, [13], least=16), "the only picture with so much of a horse"
    path = tmp_path / "episodes.json"
    episodes.write(drawn, data, path)
    assert episodes.read(path, data) == drawn
    assert episodes.random_episodes(data, [13], 5, seed=3) == episodes.random_episodes(data, [13], 5, seed=3)
    path.write_text("2007_000002__13\n2007_000001__13\n")
    assert episodes.published(data, path) == drawn[::-1]
    path.write_text("2007_999999__13\n")
    with pytest.raises(InputError, match="lacks: 2007_999999"):
        episodes.published(data, path)
