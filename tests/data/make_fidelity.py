"""Writes fidelity.json: what the loaders and counts that the authors' code calls make of the small replicas of
tests/evaluation/test_benchmarks.py. Arguments: clones of dvlab-research/PFENet, juhongm999/hsnet and cvlab-yonsei/JoEm.
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "evaluation"))

from test_benchmarks import SMALL  # noqa: E402

from clipseg_repro.mini import replicas  # noqa: E402


def load(file: Path, *names):
    """Names from a file of theirs, without the packages around it."""
    scope = {"__name__": "theirs"}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    return [scope[name] for name in names]


def pfenet(clone: Path, voc: Path) -> dict:
    """Which pictures are queries of a fold, and which can support a class."""
    (make_dataset,) = load(clone / "util" / "dataset.py", "make_dataset")
    names = (voc / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    listed = voc / "list.txt"
    listed.write_text("".join(f"JPEGImages/{n}.jpg SegmentationClassAug/{n}.png\n" for n in names))
    folds = {}
    for fold in range(4):
        queries, by_class = make_dataset(fold, str(voc), str(listed), list(range(5 * fold + 1, 5 * fold + 6)))
        stems = {c: [Path(image).stem for image, _ in own] for c, own in by_class.items()}
        folds[fold] = {"queries": [Path(image).stem for image, _ in queries], "supports": stems}
    listed.unlink()
    return folds


def hsnet(clone: Path, world: Path) -> dict:
    """Classes of COCO's folds; pixels of object and void in VOC's maps; pixels of FSS-1000's masks, which HSNet cuts at
    128."""
    (coco,) = load(clone / "data" / "coco.py", "DatasetCOCO")
    (pascal,) = load(clone / "data" / "pascal.py", "DatasetPASCAL")
    folds = []
    for fold in range(4):
        data = coco.__new__(coco)
        data.nclass, data.nfolds, data.fold, data.split = 80, 4, fold, "val"
        folds.append(data.build_class_ids())
    data = pascal.__new__(pascal)
    data.ann_path = str(world / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    pixels = {}
    for path in sorted(Path(data.ann_path).glob("2012_001*.png"))[:8]:
        for c in range(1, 21):
            mask, void = data.extract_ignore_idx(data.read_mask(path.stem).float(), c - 1)
            if mask.sum():
                pixels[f"{path.stem} {c}"] = [int(mask.sum()), int(void.sum())]
    return {"coco": folds, "pixels": pixels}


def joem(clone: Path) -> dict:
    """Seen, unseen and harmonic mIoU of noise, and the unseen classes by the number that is asked for."""
    (evaluator,) = load(clone / "model" / "metric.py", "Evaluator")
    source = (clone / "data_loader" / "__init__.py").read_text()
    scope = {}
    exec(source[source.index("def get_unseen_idx") : source.index("def get_seen_idx")], scope)
    unseen = {n: scope["get_unseen_idx"](n) for n in (2, 4, 5, 6, 8, 10)}
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 22, (3, 40, 50))
    truth[truth == 21] = 255
    guess = np.where(rng.random(truth.shape) < 0.6, np.minimum(truth, 20), rng.integers(0, 21, truth.shape))
    scores = {}
    for n, own in unseen.items():
        counted = evaluator(21, [c for c in range(21) if c not in own], own)
        counted.add_batch(truth, guess)
        found = counted.Mean_Intersection_over_Union()
        scores[n] = {key: float(found[key]) for key in ("seen", "unseen", "harmonic", "overall")}
    return {"unseen": unseen, "scores": scores}


def main(pfe, hs, jo):
    with tempfile.TemporaryDirectory() as folder, patch.object(replicas, "COUNTS", SMALL):
        world = Path(folder)
        replicas.build(world)
        figures = {"pfenet": pfenet(pfe, world / "VOCdevkit" / "VOC2012"), "hsnet": hsnet(hs, world), "joem": joem(jo)}
    file = Path(__file__).with_name("fidelity.json")
    file.write_text(
        json.dumps(figures, indent=1, default=lambda x: x.tolist() if torch.is_tensor(x) else int(x)) + "\n"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
