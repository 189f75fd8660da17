"""Muon (Jordan et al., 2024) in the precision that the device is fast at."""

import math

import torch

from clipseg_repro.devices import fast_dtype


class Muon(torch.optim.Muon):
    """torch's Muon, which orthogonalises in bfloat16 on every device: without units for it, that takes most of a step.

    State and steps are torch's with its default coefficients, and learning rates are scaled as in the original.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95, nesterov=True):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient, momentum = self.state[parameter], parameter.grad, group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                update = orthogonalised(
                    gradient.lerp(buffer, momentum) if group["nesterov"] else buffer,
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalised(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float):
    """About U V^T of the singular value decomposition U S V^T of a matrix (m, n), by the Newton-Schulz iteration."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(fast_dtype(matrix.device))
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
