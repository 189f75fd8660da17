"""Where the sources disagree: what each entry of audit.yaml says is so, and what it is worth is computed rightly."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score
from transformers import CLIPSegConfig

from clipseg_repro.datasets.held_out import held_out
from clipseg_repro.datasets.phrasecut import PhraseCut
from clipseg_repro.datasets.voc import CLASSES
from clipseg_repro.evaluation.metrics import SegmentationMetrics, resampled, threshold_counts
from clipseg_repro.evaluation.referring import NO_EXAMPLE, phrasecut
from clipseg_repro.evaluation.semantic import RELEASED_UNSEEN
from clipseg_repro.prompts import IMAGENET_STD, RECIPES, Recipe, prepare
from clipseg_repro.study import audit as a
from clipseg_repro.study import tables
from clipseg_repro.study.scales import get_scale
from clipseg_repro.training import experiments

ROOT = Path(__file__).parents[2]
METRICS = ("miou", "iou_bin", "ap")


# --- the entries -------------------------------------------------------------------------------------------------


def test_every_entry_names_its_sources_and_a_test_that_is_there():
    for name, entry in a.disagreements().items():
        path, test = entry["shown_by"].split("::")
        defined = {
            node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if hasattr(node, "name")
        }
        assert test in defined, f"{name}: no {entry['shown_by']}"
        assert len(entry["sources"]) > 1 and entry["effects"], name
        for source in entry["sources"]:
            assert source["where"].strip() and source["says"].strip() and "nan" not in source["says"], name


def test_every_side_is_a_row_of_ours_or_the_papers():
    """Only what has no run of ours by design (CLIPSeg on PhraseCut in Table 6) is unknown to the tables."""
    unknown = set()
    for entry in a.disagreements().values():
        for side in (effect[name] for effect in entry["effects"] for name in ("this", "over") if name in effect):
            if side["table"] == 2:
                assert side["method"].removesuffix(", another's mask") in RECIPES
            elif not any(
                (row.method, row.setting) == (side["method"], side["setting"]) for row in tables.rows(side["table"])
            ):
                unknown.add((side["table"], side["method"]))
    assert unknown == {(6, "CLIPSeg (PC+)")}


def test_worth_is_the_paired_difference(tmp_path, monkeypatch):
    """Known draws on both sides; what is not measured, and what the paper does not print, is nan."""
    noise = np.random.default_rng(0).normal(0, 5, (1, tables.RESAMPLES))
    known = {"layers 3, 7, 9": tables.Measured(np.array([12.0]), 12 + noise)}
    known["CLIPSeg (PC+)"] = tables.Measured(np.array([10.0]), 10 + noise)
    monkeypatch.setattr(a, "side", lambda asked, *_: known.get(asked["method"]) if asked["table"] == 9 else None)
    worth = a.audit(get_scale("mini")).set_index("compared")
    layers = worth.loc["3, 7, 9 over 3, 6, 9: mIoU by text"]
    assert [layers.mini, layers.low, layers.high] == pytest.approx([2, 2, 2]) and np.isnan(layers.paper)
    twins = worth.loc["with the crop over without: gain in P(object)"]
    assert twins.paper == 0 and np.isnan(twins.mini)
    assert worth.loc["decoder for patches of 32 over 16"].mini == 64 * (32**2 - 16**2)


# --- the model and its training ----------------------------------------------------------------------------------


def test_the_port_reads_other_layers_than_the_paper_names():
    assert list(CLIPSegConfig().extract_layers) == [3, 6, 9]
    assert experiments()["layers-3-7-9"]["layers"] == [3, 7, 9]


def test_what_explains_the_papers_parameters():
    paper, plain = 1_122_305, a.decoder_parameters(16)
    assert plain == 1_073_153
    assert a.decoder_parameters(32) == paper == plain + 768 * 64  # the other kernel, or the layer's weights


def test_pc_with_and_without_negatives():
    """The two runs that the effect compares differ in nothing else."""
    ours, theirs = experiments()["clipseg-pc"], experiments()["no-visual"]
    differ = {key for key in ours if ours[key] != theirs[key]} - {"method", "tables"}
    assert differ == {"negative"} and (ours["negative"], theirs["negative"]) == (0, 0.2)


def test_table_6_has_no_run_on_phrasecut():
    table = tables.reported()
    ours = table[(table.table == 6) & (table.setting != "cited")].method
    assert ours.str.contains("COCO").all() and not ours.str.contains("PC").any()
    runs = [run for row in tables.rows(6) for run in row.runs]
    assert {experiments()[run]["dataset"] for run in runs} == {"coco"}
    assert {experiments()[run]["negative"] for run in runs if "+n" in run} == {0.2}


# --- the tables --------------------------------------------------------------------------------------------------


def test_released_splits_are_not_what_training_left_out():
    places = {n: {CLASSES.index(name) for name in held_out(f"unseen-{n}")} for n in (4, 10)}
    assert set(RELEASED_UNSEEN[4]) < places[4] and len(RELEASED_UNSEEN[4]) == 2  # half of them
    assert {CLASSES[c] for c in set(RELEASED_UNSEEN[10]) - places[10]} == {"sheep"}  # which was trained
    assert len(set(RELEASED_UNSEEN[10]) & places[10]) == 4  # of ten


def test_background_counts_as_a_seen_class():
    """IoU is the class's number in percent: 1 / 100 of background, 2 / 100 of airplane, and so on."""
    areas = np.array([[[c + 1, 100, c + 1] for c in range(21)]])
    figures = {metric: value for metric, (value, _) in tables._zero_shot(areas, "unseen-4").items()}
    iou = np.arange(1, 22)
    unseen = [10, 14, 1, 18]
    seen = [c for c in range(21) if c not in unseen]
    assert figures["miou_seen"] == pytest.approx(iou[seen].mean())
    assert figures["seen_things"] == pytest.approx(iou[seen[1:]].mean())
    assert figures["miou_unseen"] == pytest.approx(iou[unseen].mean())
    assert figures["released_seen"] == pytest.approx(iou[[10, 14]].mean())


def test_twin_rows_of_table_2():
    crop, blur = "crop + BG intensity 10%", "BG blur + intensity 10%"
    assert tables.paper(2, "delta_p_object", crop) == tables.paper(2, "delta_p_object", blur)
    assert RECIPES[crop] != RECIPES[blur] == Recipe(blur=3.0, background=0.1)  # the notebook's options for both


def test_vitseg_has_one_row_in_two_tables():
    for row in tables.rows(7):
        figures = [[tables.paper(table, metric, row.method) for metric in METRICS] for table in (5, 7)]
        assert (figures[0] == figures[1]) == (row.method == "ViTSeg (PC+)"), row.method


def test_two_thresholds_of_one_model():
    three, nine = ([tables.paper(t, metric, "CLIPSeg (PC+)", "text") for metric in ("ap", "miou")] for t in (3, 9))
    assert three[0] == nine[0] and three[1] < nine[1]


def test_no_clipseg_of_the_paper_has_what_summaries_tell():
    theirs = tables.reported().query("table == 3")
    assert theirs.value[theirs.method.str.startswith("CLIPSeg") & (theirs.metric == "miou")].max() < 61.5
    assert not tables.reported().method.str.contains("RN50x4").any()
    assert [name for name, run in experiments().items() if "RN50x4" in str(run["method"])] == ["clipseg-rn50x4-pc+"]


def test_an_image_of_zeros_is_a_grey_picture(segmenter, data):
    """And the phrases that are shown it are those that no other sample shares."""
    pixels, mask = prepare(NO_EXAMPLE, segmenter.processor.image_processor)
    assert pixels.abs().max() < 0.5 / 255 / min(IMAGENET_STD) and mask.all()  # as near as 8 bits come
    dataset = PhraseCut(data / "VGPhraseCut_v0", "train")
    visual, unique = (set(phrasecut(segmenter, dataset, prompts).samples["index"]) for prompts in ("visual", "unique"))
    assert visual and not visual & unique and visual | unique == set(range(len(dataset)))


def test_a_second_part_counts_too(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    stored = {}
    for part, hit in (("phrasecut-visual", 1.0), ("phrasecut-unique", 0.0)):
        counts = [
            threshold_counts(np.full((2, 2), hit, np.float32), np.ones((2, 2), np.uint8)).numpy() for _ in range(5)
        ]
        stored[part] = pd.DataFrame({"image_id": rng.integers(9, size=5)}), np.array(counts)
    monkeypatch.setattr(tables, "measured", lambda run, seed, scale: [] if seed else list(stored))
    monkeypatch.setattr(tables, "stored", lambda run, seed, part, scale: stored[part])
    row = tables.Row(9, "CLIPSeg (PC+)", "visual", ("clipseg-pc+",), 0.3)
    alone, both = (
        tables._measured_figures(own, None)["miou"].value for own in (row, tables.replace(row, also="phrasecut-unique"))
    )
    assert alone == pytest.approx(80) and both == pytest.approx(40)  # 4 of 4 pixels, by 4 / (4 + 1)


# --- the metrics -------------------------------------------------------------------------------------------------


def test_ap_of_thresholds_falls_as_predictions_get_better():
    """The same maps, surer: pixels above 0.98 are no area any more, however right they are."""
    rng = np.random.default_rng(0)
    target = (rng.random((4, 40, 40)) < 0.3).astype(np.uint8)
    scores = 2 * target - 1 + rng.normal(0, 0.7, target.shape)
    figures = {}
    for sure in (1, 8):
        p = 1 / (1 + np.exp(-sure * (scores + 0.2 * (sure - 1) / 7 * (2 * target - 1))))
        counts = np.stack([threshold_counts(*pair).numpy() for pair in zip(p.astype(np.float32), target)])
        figures[sure] = [SegmentationMetrics.from_counts(counts, None, c).at(0.3)["ap"] for c in ("released", "exact")]
        steps = np.ceil(p * 50)  # what counts keep of a probability
        assert figures[sure][1] == pytest.approx(average_precision_score(target.ravel(), steps.ravel()), abs=1e-6)
        drawn = resampled(counts, [0] * 4, 0.3, 2, convention="exact")
        assert drawn["ap"] == pytest.approx([figures[sure][1]] * 2)
    assert figures[8][0] < figures[1][0] and figures[8][1] > figures[1][1]


def test_one_more_in_the_denominator():
    """An object of one pixel, found: 1 of 1, or 1 of 2. Nothing there, nothing found: right, or 0 of 1."""
    found = threshold_counts(np.float32([[1, 0]]), np.uint8([[1, 0]])).numpy()
    nothing = threshold_counts(np.float32([[0, 0]]), np.uint8([[0, 0]])).numpy()
    for counts, expected in ((found, (0.5, 1)), (nothing, (0, 1))):
        for convention, iou in zip(("released", "exact"), expected):
            figures = SegmentationMetrics.from_counts(counts[None], None, convention).at(0.3)
            assert figures["miou"] == figures["iou_fg"] == iou
            assert resampled(counts[None], [0], 0.3, 2, convention=convention)["miou"].tolist() == [iou] * 2
