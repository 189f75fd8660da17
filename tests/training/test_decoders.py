"""Decoder training: exact resume, what it leaves alone, and its conditions."""

import os
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipseg_repro.errors import InputError
from clipseg_repro.models.loading import load_model
from clipseg_repro.segmenter import load_segmenter
from clipseg_repro.training import decoders
from clipseg_repro.training.decoders import Batch, align_film, experiments, fresh_decoder, mixed, train


class Killed(Exception):
    pass


def test_experiments_are_the_papers():
    runs = experiments()
    assert runs["clipseg-pc+"]["visual"] and runs["clipseg-pc+"]["negative"] == 0.2
    longer = {name: run["iterations"] for name, run in runs.items() if run["iterations"] != 20_000}
    assert longer.pop("fine-tune") == 300 and longer.pop("clipseg-pc+-refined") == 50_000
    assert set(longer.values()) == {7_000} and all("coco-20i-" in name for name in longer)
    reported = pd.read_csv(files("clipseg_repro.study") / "reported_results.csv")
    for table, rows in reported[~reported.setting.fillna("").str.contains("cited")].groupby("table"):
        if table != "T2":  # every row of the authors' own models has its runs
            ours = {run["method"] for run in runs.values() if int(table[1:]) in run["tables"]}
            assert set(rows.method) <= ours | ({"CLIP-Deconv"} if table == "T8" else set()), table


def test_a_run_per_held_out_key():
    folds = [experiments()[f"vitseg-mixed-pascal-5i-{fold}"] for fold in range(4)]
    assert [fold["held_out"] for fold in folds] == [f"pascal-5i-{fold}" for fold in range(4)]
    assert all(fold["tables"] == [5, 7] and fold["model"] == "vitseg" for fold in folds)


def test_an_unknown_key_of_a_run_is_an_error(monkeypatch):
    monkeypatch.setattr(decoders.yaml, "safe_load", lambda _: {"defaults": {}, "shared": {}, "mine": {"itertions": 1}})
    with pytest.raises(InputError, match="'mine' has itertions, which has no default"):
        experiments.__wrapped__()


@pytest.fixture
def one_thread():
    """Exact equality is a property of our state, not of how several threads split a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder(folder):
    return torch.cat([p.flatten() for p in load_segmenter(str(folder), dtype="float32").model.decoder.parameters()])


def test_decoder_training_resumes_exactly_and_leaves_clip_alone(tiny_folder, data, tmp_path, monkeypatch, one_thread):
    budget = {"iterations": 8, "batch": 8, "phrases_per_image": 2, "validate_on": 2, "source": str(tiny_folder)}
    train("clipseg-pc+", data, tmp_path / "whole", **budget)
    with monkeypatch.context() as patch:
        calls = []

        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == 6:
                raise Killed
            return real(*args, **kwargs)

        real = decoders.decode
        patch.setattr(decoders, "decode", dies)
        with pytest.raises(Killed):
            train("clipseg-pc+", data, tmp_path / "killed", **budget)
    train("clipseg-pc+", data, tmp_path / "killed", **budget)
    assert torch.equal(decoder(tmp_path / "whole" / "model"), decoder(tmp_path / "killed" / "model"))
    trained, source = (load_segmenter(str(f), dtype="float32") for f in (tmp_path / "whole" / "model", tiny_folder))
    for ours, theirs in zip(trained.model.clip.parameters(), source.model.clip.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(decoder(tmp_path / "whole" / "model"), decoder(tiny_folder))


def test_aligned_film_starts_at_clips_own_similarity(tiny_folder):
    """The tiny model's joint space (48) fits the decoder (64) whole: the signed sum of products is the similarity."""
    model = fresh_decoder(load_model(str(tiny_folder))[0], 64, seed=0)
    activations, texts = torch.randn(5, 7, 64) + 1, torch.randn(90, 48) - 2
    align_film(model, activations, texts)
    decoder, clip = model.decoder, model.clip
    shape = clip.visual_projection.weight * clip.vision_model.post_layernorm.weight
    seen, asked = (activations - activations.mean((0, 1))) @ shape.T, texts - texts.mean(0)
    signs = ((decoder.film_mul.weight @ shape) * decoder.reduces[0].weight).sum(1).sign()
    with torch.no_grad():
        patches, conditions = decoder.reduces[0](activations).flatten(0, 1), decoder.film_mul(texts) * signs
        found, similarity = patches @ conditions.T, seen.flatten(0, 1) @ asked.T
        assert np.corrcoef(found.flatten(), similarity.flatten())[0, 1] > 0.9999
        assert torch.equal(decoder.film_add(texts), torch.zeros(90, 64))


def test_conditions_are_mixed_by_the_text_weight():
    """text * w + visual * (1 - w); a sample without support is its text alone; two samples may share a support."""
    texts, visual = torch.randn(4, 5), torch.randn(2, 5)
    weights = torch.tensor([0.25, 1.0, 0.5, 0.0])
    batch = Batch({}, None, [], {}, torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3]), weights, None)
    expected = [0.25 * texts[0] + 0.75 * visual[0], texts[1], 0.5 * texts[2] + 0.5 * visual[1], visual[0]]
    torch.testing.assert_close(mixed(texts, visual, batch), torch.stack(expected))


def test_training_on_kept_outputs(tiny_folder, data, tmp_path, monkeypatch, one_thread):
    """The same decoder whether a picture's outputs are computed or read, and each is computed once for all runs."""
    budget = {"iterations": 6, "batch": 8, "phrases_per_image": 2, "validate_on": 2, "source": str(tiny_folder)}
    budget |= {"crop_once": True, "keep": tmp_path / "kept"}
    train("clipseg-pc+", data, tmp_path / "first", **budget)

    def fails(*_):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        for name in ("encode", "embed_images"):
            patch.setattr(decoders, name, fails)
        train("clipseg-pc+", data, tmp_path / "second", **budget)
    assert torch.equal(decoder(tmp_path / "first" / "model"), decoder(tmp_path / "second" / "model"))
    train("clipseg-pc+", data, tmp_path / "without", **budget | {"keep": None})
    kept, computed = decoder(tmp_path / "first" / "model"), decoder(tmp_path / "without" / "model")
    assert (kept - computed).abs().mean() < 2e-5  # kept in half precision; a step moves a weight by 1e-3


def test_tensorboard_has_the_curve(tiny_folder, data, tmp_path, monkeypatch):
    budget = {"iterations": 4, "batch": 4, "phrases_per_image": 2, "validate_on": 1, "source": str(tiny_folder)}
    train("clipseg-pc+", data, tmp_path, tensorboard=True, **budget)
    curve = pd.read_csv(tmp_path / "curve.csv").set_index("step").drop(columns="device")
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert set(logged) == {*curve, "learning_rate"}
    for tag in curve:
        assert logged[tag] == pytest.approx(curve[tag].to_dict(), rel=1e-6), tag
    assert logged["learning_rate"][4] < logged["learning_rate"][1] < 0.001
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard needs a package that is not here: pip install tensorboard"):
        train("clipseg-pc+", data, tmp_path / "without", tensorboard=True, **budget)
    assert not (tmp_path / "without").exists()


def test_unknown_run_is_named(data, tmp_path):
    with pytest.raises(InputError, match="unknown run 'clipseg-pcx'"):
        train("clipseg-pcx", data, tmp_path)


def test_two_processes_train_what_one_does(tiny_folder, data, tmp_path):
    """`accelerate launch` with two CPU processes, half the batch each, and one with all of it: the same curve."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom accelerate import PartialState\n"
        "from clipseg_repro.training import train\n"
        "PartialState(cpu=True)\n"
        "budget = {'iterations': 8, 'batch': 8, 'phrases_per_image': 2, 'crop_once': True, 'validate_on': 2}\n"
        "data, source, out = map(Path, sys.argv[1:])\n"
        "train('clipseg-pc+', data, out, str(source), keep=out / 'kept', **budget)\n"
    )
    curves = []
    for processes in ("1", "2"):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [*launch, script, data, tiny_folder, tmp_path / processes]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        curves.append(pd.read_csv(tmp_path / processes / "curve.csv"))
    assert curves[0].loss.tolist() == pytest.approx(curves[1].loss.tolist(), abs=1e-4)
    one, two = (decoder(tmp_path / processes / "model") for processes in ("1", "2"))
    assert (one - two).abs().mean() < 1e-4
