"""The training loop: exact resume, refusals, and attention that a CPU differentiates fast."""

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


def test_folder_of_another_run_is_refused(tmp_path):
    run_fit(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        run_fit(tmp_path, settings={"seed": 1})


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
