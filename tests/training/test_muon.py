"""Muon against torch's, whose iteration rounds to bfloat16, and against the decomposition that it stands for."""

import pytest
import torch

from clipseg_repro.training.muon import Muon, orthogonalised


@pytest.mark.parametrize(("nesterov", "shape"), [(True, (24, 6)), (False, (5, 16))])
def test_steps_are_torchs_but_for_rounding(nesterov, shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.01, "nesterov": nesterov}
    optimisers = [Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimiser in optimisers:
            optimiser.step()
    moved = (theirs - 1).abs().mean()
    assert (ours - theirs).abs().max() < 0.05 * moved
    optimisers[0].load_state_dict(optimisers[1].state_dict())  # so a checkpoint of one resumes with the other


def test_float32_where_bfloat16_is_slow(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    torch.manual_seed(0)
    matrix = torch.randn(8, 20) @ torch.diag(torch.linspace(0.5, 2, 20))
    found = orthogonalised(matrix, (2.0, -1.5, 0.5), 60, 1e-7)  # coefficients that converge: f(1) = 1, f'(1) = 0
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, u @ v, atol=1e-5, rtol=0)
