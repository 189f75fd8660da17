"""The study: what is stored of its models, its tables, and the rule that decides the paper's claims."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.metrics import THRESHOLDS, SegmentationMetrics, threshold_counts
from clipseg_repro.study import measured as m
from clipseg_repro.study import queue, tables
from clipseg_repro.study.scales import SCALES
from clipseg_repro.training import experiments, untrained

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scale(tmp_path, data, tiny_folder):
    """The mini scale on the tiny model and the small PhraseCut, with a decoder of clipseg-pc+ kept."""
    (tmp_path / "PhraseCut").symlink_to(data)
    scale = replace(SCALES["mini"], model=str(tiny_folder), data=tmp_path, results=tmp_path / "results", images=4)
    settings = experiments()["clipseg-pc+"]
    made, _ = untrained(settings | scale.budget(settings) | {"seed": 3}, str(tiny_folder))
    m.keep_decoder("clipseg-pc+", 0, scale, made.state_dict())
    tables._FIGURES.clear()
    return scale


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_packed_counts_come_back(samples, seed):
    rng = np.random.default_rng(seed)
    maps, truth = rng.random((samples, 9, 7), np.float32), rng.integers(0, 2, (samples, 9, 7), np.uint8)
    counts = np.stack([threshold_counts(p, t).numpy() for p, t in zip(maps, truth)])
    assert np.array_equal(m.unpacked(m.packed(counts)), counts)
    for other in (rng.integers(0, 2**31, (samples, 21, 3)), rng.integers(0, 10**6, (samples, 1))):
        assert np.array_equal(m.unpacked(m.packed(other)), other)


def test_a_run_is_measured_stored_and_checked(scale):
    segmenter = m.load_run("clipseg-pc+", 0, scale)
    assert not segmenter.model.config.use_complex_transposed_convolution
    for part in ("phrasecut-text", "phrasecut-absent"):
        m.store("clipseg-pc+", 0, part, *m.measure(segmenter, "clipseg-pc+", part, scale), scale)
    assert m.parts("clipseg-pc+") == ("phrasecut-text", "phrasecut-visual", "phrasecut-absent")
    assert queue.state("clipseg-pc+", 0, scale) == "trained" and queue.state("d16", 0, scale) == "left"
    samples, counts = m.stored("clipseg-pc+", 0, "phrasecut-text", scale)
    assert samples.image_id.nunique() == 4 and len(samples) == len(counts)
    (row,) = [row for row in tables.rows(3) if row.method == "CLIPSeg (PC+)"]
    found = tables.figures(row, scale)["miou"]
    assert found.value == pytest.approx(100 * SegmentationMetrics.from_counts(counts).at(0.3)["miou"])
    assert m.differences("clipseg-pc+", 0, "phrasecut-text", scale, limit=2) < 1e-4
    other, _ = untrained(experiments()["clipseg-pc+"] | {"seed": 4}, scale.model)
    m.keep_decoder("clipseg-pc+", 0, scale, other.state_dict())
    assert m.differences("clipseg-pc+", 0, "phrasecut-text", scale, limit=2) > 0.01
    with pytest.raises(InputError, match="lists other samples than 'd16' was measured on"):
        m.store("d16", 0, "phrasecut-text", samples[1:], counts[1:], scale)
    with pytest.raises(InputError, match="has no 'voc': measure the run"):
        m.stored("clipseg-pc+", 0, "voc", scale)


def test_processes_share_the_queue(scale, monkeypatch):
    """A run that another process is at is left to it, and told; one that died holds none."""
    done = []
    monkeypatch.setattr(queue, "train_run", lambda run, scale, seed: done.append((run, seed)))
    monkeypatch.setattr(queue, "measure_run", lambda *_: None)
    monkeypatch.setattr(queue, "SEEDS", range(1))
    theirs = "import sys\nfrom clipseg_repro.study import queue\nfrom clipseg_repro.study.scales import *\n"
    theirs += f"scale = replace(SCALES['mini'], results=Path({str(scale.results)!r}))\n"
    theirs += "with queue._claimed('d16', 0, scale) as free: print(free, flush=True), sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", theirs], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        queue.study(scale, ["d16", "no-visual"])
        assert queue.state("d16", 0, scale) == "running" and queue.state("no-visual", 0, scale) == "left"
        other.kill()
    assert done == [("no-visual", 0)] and queue.state("d16", 0, scale) == "left"


def test_a_decoder_of_another_run_is_refused(scale):
    m.decoder_file("d16", 0, scale).write_bytes(m.decoder_file("clipseg-pc+", 0, scale).read_bytes())
    with pytest.raises((InputError, RuntimeError), match=r"no decoder of 'd16'|size mismatch"):
        m.load_run("d16", 0, scale)
    with pytest.raises(InputError, match=r"no decoder .*train it with clipseg-repro train 'clip-deconv' --seed 1"):
        m.load_run("clip-deconv", 1, scale)


def test_folds_of_one_part_are_listed_together(scale):
    counts = np.ones((2, len(THRESHOLDS), 4), np.int64)
    for fold in (2, 0):
        run = f"clipseg-pc+-pascal-5i-{fold}"
        m.decoder_file(run, 0, scale).touch()
        samples = pd.DataFrame({"fold": fold, "picture": ["a", "b"], "class": [f"c{fold}", f"d{fold}"]})
        m._opened.cache_clear()
        m.store(run, 0, "phrasecut-text", samples, counts, scale)
    again, _ = m.stored("clipseg-pc+-pascal-5i-2", 0, "phrasecut-text", scale)
    assert again["class"].tolist() == ["c2", "d2"]
    assert pd.read_csv(scale.results / "measured" / "phrasecut-text.csv").fold.tolist() == [0, 0, 2, 2]


def test_seeds_are_resampled_too():
    """Two seeds far apart, images that hardly matter: the interval spans the seeds; one seed alone has none of it."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2, tables.RESAMPLES))
    both = tables.Measured(np.array([10.0, 20.0]), np.array([[10.0], [20.0]]) + noise)
    low, high = np.percentile(both.resampled(), (2.5, 97.5))
    assert both.value == 15 and low < 11 and high > 19
    one = tables.Measured(both.values[:1], both.draws[:1])
    assert np.ptp(one.resampled()) < 1
    paired = both.resampled() - both.resampled()
    assert np.abs(paired).max() == 0


def test_the_rule():
    assert tables.verdict(0.1, 2) == "holds" and tables.verdict(-2, -0.1) == "does not hold"
    assert {tables.verdict(-1, 1), tables.verdict(np.nan, np.nan)} == {"cannot be told here"}


def test_claims_are_rows_of_the_paper_and_hold_there():
    claims = tables.claims()
    assert list(claims) == [f"C{n}" for n in range(1, 25)]
    for claim in claims.values():
        larger, smaller = (
            tables.paper(claim["table"], claim["metric"], claim[side]["method"], claim[side]["setting"])
            for side in ("larger", "smaller")
        )
        assert larger > smaller, claim["statement"]
        ours = {(row.method, row.setting) for row in tables.rows(claim["table"])} if claim["table"] > 2 else set()
        for side in ("larger", "smaller"):  # a run of ours, a recipe of Table 2, or somebody else's method
            own = claim[side]
            assert (
                claim["table"] == 2 or own["setting"].startswith("cited") or (own["method"], own["setting"]) in ours
            ), own


def test_the_rule_is_older_than_the_results():
    def first(path):
        command = ["git", "log", "--diff-filter=A", "--format=%ct", "--", path]
        times = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
        return int(times[-1]) if times else None

    rule, results = first("clipseg_repro/study/claims.yaml"), first("results/measured")
    if rule is None or results is None:
        pytest.skip("no history of them here")
    assert rule < results


def test_a_table_says_what_is_not_measured(scale):
    table = tables.study_table(3, scale)
    assert set(table[table.method == "MDETR"].paper.dropna()) == {53.7} and (table.seeds == 0).all()
    shown = tables.side_by_side(table)
    ours = shown.index.get_level_values("method").isin([row.method for row in tables.rows(3)])
    assert set(shown["miou", "mini"][ours]) == {"not measured"} and set(shown["miou", "mini"][~ours]) == {""}
    assert shown.loc[("CLIPSeg (PC+)", "text"), ("miou", "paper")] == "43.4"
    verdicts = tables.ledger(scale)
    assert set(tables.ledger(scale, table=7).claim) == {"C15"}
    assert set(verdicts.verdict) == {"cannot be told here"}


def test_table_2_is_told_by_pictures(scale):
    best = "crop + BG blur + BG intensity 10%"
    names = [*tables.claims()["C7"]["smaller"]["method"], best]
    gains = pd.DataFrame({name: np.full(30, 0.5 if name == best else 0.1) for name in names})
    verdicts = tables.ledger(scale, gains).set_index("claim")
    assert verdicts.verdict["C7"] == "holds" and verdicts.difference["C7"] == pytest.approx(40)
    assert verdicts.verdict["C8"] == "cannot be told here"
