"""The training loop: exact resume, refusals, and attention that a CPU differentiates fast."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from clipseg_repro.errors import InputError
from clipseg_repro.training.loop import fast_attention, fit


class Killed(Exception):
    pass


def run_fit(folder, steps=12, stop=None, settings=None):
    """Fit a line by SGD with momentum; `stop` kills the run before that step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def batches(first):
        return (torch.from_numpy(np.random.default_rng(i).normal(size=(8, 3))).float() for i in range(first, steps))

    def step(i, x):
        if i == stop:
            raise Killed
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return {"loss": loss}

    state = {"model": model, "optimiser": optimiser}
    curve = fit("line", folder, batches, step, steps, state, settings or {"seed": 0}, every=3)
    return model, curve


def test_killed_run_resumes_to_the_same_weights_and_curve(tmp_path):
    whole, curve = run_fit(tmp_path / "whole")
    with pytest.raises(Killed):
        run_fit(tmp_path / "killed", stop=7)
    resumed, resumed_curve = run_fit(tmp_path / "killed")
    assert torch.equal(whole.weight, resumed.weight)
    columns = ["step", "loss"]
    assert resumed_curve[columns].equals(curve[columns])
    assert curve.loss.iloc[-1] < curve.loss.iloc[0]
    assert not list((tmp_path / "killed").glob(".*"))  # no half-written file is left


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    class Samples(torch.Tensor):
        samples = (4, 7)

    def step(i, batch):
        return {"loss": torch.tensor(float("nan") if i == 4 else 1.0)}

    def batches(first):
        return iter([torch.zeros(1).as_subclass(Samples)] * (9 - first))

    with pytest.raises(InputError, match=r"line, step 5 on samples 4, 7: loss is nan; the last good checkpoint is "):
        fit("line", tmp_path, batches, step, 9, {"model": torch.nn.Linear(1, 1)}, {}, every=3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3


def test_folder_of_another_run_is_refused(tmp_path):
    run_fit(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        run_fit(tmp_path, settings={"seed": 1})


def _changed(**changes):
    return lambda path: torch.save(torch.load(path, weights_only=True) | changes, path)


def _state(change):
    def damage(path):
        saved = torch.load(path, weights_only=True)
        change(saved["state"])
        torch.save(saved, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_text("step 6"), "damaged"),
        (lambda path: torch.save([1, 2], path), "damaged"),
        (lambda path: torch.save({"step": 6}, path), "KeyError: 'seconds'"),
        (_changed(step=-6), "step -6 of 12"),
        (_changed(step=18), "step 18 of 12"),
        (_changed(step="six"), "damaged"),
        (_changed(curve=5), "damaged"),
        (_changed(state={}), "KeyError: 'model'"),
        (_state(lambda s: s["model"].pop("bias")), "Missing key"),
        (_state(lambda s: s["model"].update(weight=torch.zeros(2, 3))), "damaged"),
        (_state(lambda s: s["model"]["bias"].fill_(torch.nan)), "'model' has values that are not finite"),
        (_state(lambda s: s["optimiser"]["state"][0].update(momentum_buffer=torch.zeros(5))), "of another model"),
        (_state(lambda s: s["optimiser"].update(param_groups=[])), "damaged"),
    ],
)
def test_damaged_checkpoints_are_named_with_the_remedy(tmp_path, damage, reason):
    with pytest.raises(Killed):
        run_fit(tmp_path, stop=7)
    damage(tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=reason) as caught:
        run_fit(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "checkpoint.pt") in message and "remove it" in message and "\n" not in message


def test_curve_is_rewritten_and_leftovers_of_dead_processes_go(tmp_path):
    with pytest.raises(Killed):
        run_fit(tmp_path, stop=7)
    curve = (tmp_path / "curve.csv").read_bytes()
    (tmp_path / "curve.csv").unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftovers = [tmp_path / f".checkpoint.pt.{pid}.tmp" for pid in (dead.pid, os.getppid())]
    for leftover in leftovers:
        leftover.touch()
    with pytest.raises(Killed):
        run_fit(tmp_path, stop=7)
    assert (tmp_path / "curve.csv").read_bytes() == curve
    assert [leftover.exists() for leftover in leftovers] == [False, True]  # the second one's writer lives


def test_a_finished_run_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    run_fit(tmp_path)

    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refused)  # root may write anywhere, so a mode would not do
    with pytest.raises(InputError, match=r"cannot write to .*Permission denied"):
        run_fit(tmp_path)


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run_fit(tmp_path, stop=7)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(InputError, match=r"cannot write to .*No space left on device.*goes on from"):
            run_fit(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert torch.equal(run_fit(tmp_path)[0].weight, run_fit(tmp_path / "whole")[0].weight)


def test_fast_attention_equals_the_library_and_is_undone(tiny_model):
    model, _ = tiny_model
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    before = model.clip.vision_model(pixels).last_hidden_state
    with fast_attention(model):
        inside = model.clip.vision_model(pixels).last_hidden_state
    after = model.clip.vision_model(pixels).last_hidden_state
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)
    torch.testing.assert_close(before, inside, atol=0.05, rtol=0.05)
