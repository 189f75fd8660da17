"""One training loop: seeded, with a progress bar, curves as CSV, checkpoints, and exact resume after a kill."""

import ctypes
import json
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clipseg_repro.errors import InputError
from clipseg_repro.files import written_whole


class Stateful(Protocol):
    """What a checkpoint can hold: modules, optimisers, schedulers."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict): ...


def fit(
    name: str,
    folder: Path,
    batches: Callable[[int], Iterable],
    step: Callable[[int, object], dict[str, torch.Tensor]],
    steps: int,
    state: dict[str, Stateful],
    settings: dict,
    validate: Callable[[], dict[str, float]] | None = None,
    every: int = 500,
) -> pd.DataFrame:
    """Run `steps` optimisation steps and return the curve (one row per `every` steps, also in `folder/curve.csv`).

    `batches(first)` iterates over the batches from step `first` on, and `step(i, batch)` trains on one and returns its
    losses; both must depend on nothing but the step and `state`, so that a run that was killed and started again gives
    the same weights as one that was not. `settings` are stored with the checkpoint: a folder that holds a run with
    other settings is refused with an InputError.
    """
    _keep_freed_memory()
    folder = Path(folder)
    checkpoint = folder / "checkpoint.pt"
    curve: list[dict] = []
    first, seconds = 0, 0.0
    recorded = json.dumps(settings, sort_keys=True)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        if saved["settings"] != recorded:
            raise InputError(
                f"{folder} holds a run with other settings ({saved['settings']}); "
                f"remove that folder or train into another one to use {recorded}"
            )
        for key, holder in state.items():
            holder.load_state_dict(saved["state"][key])
        first, seconds, curve = saved["step"], saved["seconds"], saved["curve"]

    def save(done: int):
        with written_whole(checkpoint) as temporary:
            torch.save(
                {
                    "settings": recorded,
                    "step": done,
                    "seconds": seconds + time.monotonic() - started,
                    "curve": curve,
                    "state": {key: holder.state_dict() for key, holder in state.items()},
                },
                temporary,
            )
        with written_whole(folder / "curve.csv") as temporary:
            pd.DataFrame(curve).to_csv(temporary, index=False)

    started = time.monotonic()
    totals: dict[str, torch.Tensor] = {}
    counted = 0
    if first < steps:
        with tqdm(total=steps, initial=first, desc=name, unit="step", mininterval=1) as bar:
            for i, batch in zip(range(first, steps), batches(first)):
                losses = step(i, batch)
                for key, value in losses.items():
                    totals[key] = totals.get(key, 0) + value.detach()
                counted += 1
                bar.update()
                if (i + 1) % every == 0 or i + 1 == steps:
                    row = {"step": i + 1, **{k: round(float(v) / counted, 5) for k, v in totals.items()}}
                    row |= validate() if validate else {}
                    curve.append(row | {"seconds": round(seconds + time.monotonic() - started, 1)})
                    bar.set_postfix({k: v for k, v in row.items() if k != "step"})
                    totals, counted = {}, 0
                    save(i + 1)
    return pd.DataFrame(curve)


def _keep_freed_memory():
    """Have glibc keep large freed blocks: handed back, every activation is paged in anew, a third of a CPU step's time."""
    with suppress(OSError, AttributeError):  # other C libraries
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def plain_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention as two products and a softmax, in bfloat16."""
    given = query.dtype
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        scores = (query * scaling) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        return (scores.softmax(-1) @ value).transpose(1, 2).to(given), None


ALL_ATTENTION_FUNCTIONS.register("plain_bfloat16", plain_attention)


@contextmanager
def fast_attention(*modules):
    """Train transformers modules on a CPU with `plain_attention`: the fused kernel's backward is several times slower."""
    configs = [m.config for module in modules for m in module.modules() if hasattr(m, "config")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "plain_bfloat16"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
