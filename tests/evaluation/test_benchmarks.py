"""The protocols of the tables, on small replicas of all benchmarks and against other ways to count."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import bootstrap
from torchmetrics.classification import MulticlassConfusionMatrix

from clipseg_repro.datasets import episodes
from clipseg_repro.datasets.catalogue import CATALOGUE
from clipseg_repro.datasets.class_masks import VOID
from clipseg_repro.datasets.class_phrases import ClassPhrases
from clipseg_repro.datasets.coco import COCO
from clipseg_repro.datasets.lvis import LVIS
from clipseg_repro.datasets.voc import CLASSES, VOC
from clipseg_repro.evaluation.benchmarks import BENCHMARKS, COLUMNS, Budget, evaluate
from clipseg_repro.evaluation.by_class import ClassResult
from clipseg_repro.evaluation.generalized import PROMPTS, generalized
from clipseg_repro.evaluation.metrics import resampled, threshold_counts
from clipseg_repro.evaluation.one_shot import one_shot, squared
from clipseg_repro.evaluation.semantic import BACKGROUND_FACTOR, SemanticResult, generalized_zero_shot, semantic
from clipseg_repro.mini import replicas
from clipseg_repro.prompts import VisualPrompt
from clipseg_repro.segmenter import load_segmenter

SMALL = {"voc": {"train": 2, "val": 24}, "context": {"train": 2, "val": 3}, "stuff": 3, "fss": 2}
SMALL |= {"coco": {"train2014": 2, "val2014": 40, "val2017": 8}, "own": {"train": 3, "val": 2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of small replicas."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "COUNTS", SMALL)
        replicas.build(root)
    return root


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_segmenter(str(tiny_folder), device="cpu", dtype="float32")


def test_replicas_are_sound_and_damage_is_found_and_mended(world):
    for name, source in CATALOGUE.items():
        if name != "phrasecut":
            lines, problems = source.check(world)
            assert not problems, name
            assert lines[0].startswith(source.splits[0])
    label_map = next((world / "VOCdevkit" / "VOC2012" / "SegmentationClass").glob("*.png"))
    sound = label_map.read_bytes()
    label_map.write_bytes(sound[:-20])
    _, problems = CATALOGUE["voc"].check(world)
    assert {"file that is missing, or not as it was built", "val: label map that cannot be used"} >= set(problems.found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "COUNTS", SMALL)
        replicas.build(world)
    assert label_map.read_bytes() == sound


def test_every_benchmark_fills_its_rows(world, model, tmp_path):
    for name in BENCHMARKS:
        if name == "phrasecut":
            continue
        rows = evaluate(model, name, world, Budget(limit=4, episodes=4, keep=tmp_path))
        assert list(rows.columns) == COLUMNS
        assert (rows.n > 0).all() and rows.value.notna().any()
        rows = rows[rows.value.notna()]  # of unseen classes, few pictures show none
        assert rows.value.between(-100, 100).all()
        assert (rows.low <= rows.value + 1e-9).all() and (rows.value <= rows.high + 1e-9).all()
    own = evaluate(model, str(world / "own" / "segments.csv"), world)
    assert own.n.max() == (pd.read_csv(world / "own" / "segments.csv").split == "val").sum()


def test_semantic_iou_is_that_of_the_confusion_matrix(world, model):
    data = VOC(world)
    result = semantic(model, data, limit=5)
    confusion = MulticlassConfusionMatrix(21, ignore_index=VOID)
    factors = np.array([BACKGROUND_FACTOR, *[1] * 20])[:, None, None]
    for i in range(5):
        model.set_image(data.image(i))
        best = (model.predict(data.prompts) * factors).argmax(0)
        confusion.update(torch.from_numpy(best), torch.from_numpy(data.labels(i).astype(np.int64)))
    matrix = confusion.compute().double()
    expected = matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())
    np.testing.assert_allclose(result.iou(), expected, atol=1e-4)
    assert result.table()["class"].tolist() == list(data.classes)


def test_table_4_in_both_readings(world, model):
    """As released, seen are the last five classes, all others unseen."""
    result = semantic(model, VOC(world), limit=5)
    iou = 100 * result.iou()
    described, released = generalized_zero_shot(result, 10).to_dict("records")
    pairs = [10, 14, 1, 18, 8, 20, 19, 5, 9, 16]
    rest = [c for c in range(21) if c not in pairs]
    assert described["miou_unseen"] == pytest.approx(np.nanmean(iou[pairs]))
    assert described["miou_seen"] == pytest.approx(np.nanmean(iou[rest]))
    assert released["miou_seen"] == pytest.approx(np.nanmean(iou[16:]))
    assert released["miou_unseen"] == pytest.approx(np.nanmean(iou[:16]))
    harmonic = (
        2 * described["miou_seen"] * described["miou_unseen"] / (described["miou_seen"] + described["miou_unseen"])
    )
    assert described["harmonic"] == pytest.approx(harmonic)
    assert len(generalized_zero_shot(result, 6)) == 1


@pytest.mark.parametrize("prompts", ["visual", "text"])
def test_episodes_are_counted_by_class_and_fold(world, model, prompts):
    data = VOC(world)
    folds = {f: episodes.episode_per_picture(data, episodes.pascal_fold(f), 2)[:3] for f in (0, 3)}
    result = one_shot(model, data, folds, prompts)
    mious = []
    for own in folds.values():
        counts = {}
        for episode in own:
            supports = [data.sample(i, episode.label) for i in episode.supports]
            examples = [VisualPrompt(s.image, s.mask == 1) for s in supports]
            asked = examples if prompts == "visual" else [f"a photo of a {data.prompts[episode.label]}."]
            query = data.sample(episode.query, episode.label)
            height, width = query.mask.shape
            model.set_image(squared(query.image))
            probability = model.predict(model.conditions(asked).mean(0))[0, :height, :width]
            counted = threshold_counts(probability, query.mask).numpy()[14]
            counts[episode.label] = counts.get(episode.label, 0) + counted
        mious.append(np.mean([tp / (1 + tp + fp + fn) for tp, fp, fn, _ in counts.values()]))
    figures = result.at(0.3)
    assert figures["miou"] == pytest.approx(np.mean(mious), abs=1e-3)
    assert figures["miou_low"] <= figures["miou"] <= figures["miou_high"]


def test_intervals_of_classes_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (12, 49, 4))
    images, groups = np.repeat(np.arange(6), 2), rng.integers(0, 3, 12)
    ours = resampled(counts, images, 0.3, n=20, seed=5, groups=groups)["miou"]
    drawn = np.random.default_rng(5).integers(6, size=(20, 6))
    for value, chosen in zip(ours, drawn, strict=True):
        rows = np.concatenate([np.flatnonzero(images == image) for image in chosen])
        sums = [counts[rows[groups[rows] == g], 14].sum(0) for g in set(groups[rows])]
        assert value == pytest.approx(np.mean([tp / (1 + tp + fp + fn) for tp, fp, fn, _ in sums]))


def test_intervals_of_one_class_are_scipys():
    rng = np.random.default_rng(0)
    samples = pd.DataFrame({"fold": 0, "picture": range(60), "class": ["cat"] * 40 + ["dog"] * 20})
    result = ClassResult(samples, rng.integers(0, 50, (60, 49, 4)))
    cat = result.table(0.3).set_index("class").loc["cat"]
    hits, false, missed, _ = result.counts[:40, 14].T

    def iou(hits, false, missed, axis):
        return hits.sum(axis) / (hits.sum(axis) + false.sum(axis) + missed.sum(axis))

    theirs = bootstrap((hits, false, missed), iou, paired=True, method="percentile", n_resamples=2000, rng=1)
    assert cat.iou == pytest.approx(iou(hits, false, missed, 0), abs=1e-3)
    assert (cat.iou_low, cat.iou_high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_generalized_prompts_mean_all_the_named_objects(world, model):
    data = LVIS(world / "LVIS")
    result = generalized(model, data)
    row = result.samples.iloc[0]
    i = data.ids.index(row.picture)
    named = PROMPTS[row.fold][row["class"]]
    truth = np.any([data.mask(i, c) == 1 for c in data.areas(i) if data.prompts[c] in named], 0)
    assert result.counts[0, 0, [0, 2]].sum() == truth.sum()
    asked = {(row.picture, row["class"]) for _, row in result.samples.iterrows()}
    expected = {
        (data.ids[i], prompt)
        for i, areas in enumerate(data.shown)
        for own in PROMPTS.values()
        for prompt, names in own.items()
        if any(data.prompts[c] in names for c in areas)
    }
    assert asked == expected


def test_class_masks_in_the_place_of_phrases(world):
    data = COCO(world / "COCO")
    held = set(episodes.coco_fold(0))
    phrases = ClassPhrases(data, set(range(80)) - held)
    assert not {data.prompts[c] for c in held} & set(phrases.phrases)
    sample = phrases[3]
    assert sample.phrase == phrases.phrases[3] and phrases.image_id(3) == sample.image_id
    assert len(ClassPhrases(data)) == sum(map(len, data.shown)) > len(phrases)
    assert ClassPhrases(data).fingerprint() != phrases.fingerprint()


@pytest.fixture(scope="module")
def theirs():
    """What the loaders that the authors' code calls make of the same small world (tests/data/make_fidelity.py)."""
    return json.loads((Path(__file__).parents[1] / "data" / "fidelity.json").read_text())


def test_queries_and_supports_are_pfenets(world, theirs):
    data = VOC(world, sbd=True)
    for fold, expected in theirs["pfenet"].items():
        held = episodes.pascal_fold(int(fold))
        pictures = episodes.by_class(data, held, episodes.LEAST_PIXELS)
        found = {str(c): [data.ids[i] for i in own] for c, own in pictures.items()}
        assert found == expected["supports"]
        queries = {data.ids[e.query] for e in episodes.episode_per_picture(data, held)}
        # of a class with one picture, theirs would look for a support for ever
        alone = {own[0] for own in expected["supports"].values() if len(own) == 1}
        assert set(expected["queries"]) - alone <= queries <= set(expected["queries"])


def test_folds_and_masks_are_hsnets(world, theirs):
    assert [episodes.coco_fold(fold) for fold in range(4)] == theirs["hsnet"]["coco"]
    data = VOC(world)
    for key, (inside, void) in theirs["hsnet"]["pixels"].items():
        name, c = key.split()
        mask = data.mask(data.ids.index(name), int(c))
        assert [(mask == 1).sum(), (mask == VOID).sum()] == [inside, void]


def test_seen_and_unseen_are_joems(theirs):
    """The same noise, counted by ours: classes, mIoU and the harmonic mean."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 22, (3, 40, 50))
    truth[truth == 21] = VOID
    guess = np.where(rng.random(truth.shape) < 0.6, np.minimum(truth, 20), rng.integers(0, 21, truth.shape))
    areas = [
        [[((t == c) & (g == c)).sum(), ((g == c) & (t != VOID)).sum(), (t == c).sum()] for c in range(21)]
        for t, g in zip(truth, guess, strict=True)
    ]
    result = SemanticResult(CLASSES, np.array(areas))
    for number in (2, 4, 6, 8, 10):
        expected = theirs["joem"]["scores"][str(number)]
        row = generalized_zero_shot(result, number).iloc[0]
        assert [row.miou_seen, row.miou_unseen, row.harmonic] == pytest.approx(
            [100 * expected[key] for key in ("seen", "unseen", "harmonic")]
        )
    for unseen, asked in {4: "2", 10: "5"}.items():  # as released: the number of pairs, and the lists swapped
        expected, row = theirs["joem"]["scores"][asked], generalized_zero_shot(result, unseen).iloc[1]
        assert [row.miou_seen, row.miou_unseen] == pytest.approx([100 * expected["unseen"], 100 * expected["seen"]])


def test_two_processes_measure_what_one_does(world, tiny_folder, tmp_path):
    """`accelerate launch` with two CPU processes, and one, on the same benchmarks."""
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\nfrom accelerate import PartialState\n"
        "from clipseg_repro import load_segmenter\n"
        "from clipseg_repro.evaluation.benchmarks import Budget, evaluate\n"
        "state, world, folder, out = PartialState(cpu=True), *sys.argv[1:]\n"
        "segmenter = load_segmenter(folder, device='cpu', dtype='float32')\n"
        "names = ('voc-20', 'pascal-5i-text')\n"
        "rows = {n: evaluate(segmenter, n, Path(world), Budget(5)).value.tolist() for n in names}\n"
        "state.is_main_process and Path(out).write_text(json.dumps(rows))\n"
    )
    found = []
    for processes in ("1", "2"):
        out = tmp_path / f"{processes}.json"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        done = subprocess.run([*launch, script, world, tiny_folder, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(out.read_text()))
    for name, values in found[0].items():
        assert found[1][name] == pytest.approx(values, abs=1e-4)  # of 100 percent
