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
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clipseg_repro.devices import device_name, fast_dtype
from clipseg_repro.errors import InputError
from clipseg_repro.files import sweep, written_whole


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
    log: Callable[[dict[str, float], int], None] | None = None,
) -> pd.DataFrame:
    """Run `steps` optimisation steps and return the curve (one row per `every` steps, also in `folder/curve.csv`).

    `batches(first)` iterates over the batches from step `first` on, and `step(i, batch)` trains on one and returns its
    losses; both must depend on nothing but the step and `state`, so that a run that was killed and started again gives
    the same weights as one that was not. `settings` are stored with the checkpoint: a folder that holds a run with
    other settings, or a damaged checkpoint, is refused with an InputError, as is a folder that cannot be written. A
    loss that is not finite stops the run with an InputError that names the step and the batch's `samples`; the last
    checkpoint stays. `log(row, step)` is told every new row of the curve. Of several processes (accelerate) the main
    one validates and writes.
    """
    folder, main = Path(folder), PartialState().is_main_process
    checkpoint = folder / "checkpoint.pt"
    if main:
        sweep(folder)
    recorded = json.dumps(settings, sort_keys=True)
    first, seconds, curve = _resume(checkpoint, recorded, state, steps)

    def save(done: int):
        saved = {
            "settings": recorded,
            "step": done,
            "seconds": seconds + time.monotonic() - started,
            "curve": curve,
            "state": {key: holder.state_dict() for key, holder in state.items()},
        }
        with writing(folder):
            with written_whole(checkpoint) as temporary:
                torch.save(saved, temporary)
            _write_curve(curve, folder)

    PartialState().wait_for_everyone()  # none writes before all have read
    if curve and main:  # of a run that was killed between the two writes, or whose curve was removed
        with writing(folder):
            _write_curve(curve, folder)
    started = time.monotonic()
    totals: dict[str, torch.Tensor] = {}
    counted = 0
    if first < steps:
        loader = iter(batches(first))
        _keep_freed_memory()  # after the start of loader's workers: theirs would grow to gigabytes
        with tqdm(total=steps, initial=first, desc=name, unit="step", mininterval=1, disable=not main or None) as bar:
            for i, batch in zip(range(first, steps), loader):
                losses = step(i, batch)
                if not all(value.isfinite() for value in losses.values()):
                    told = ", ".join(f"{key} is {float(value):g}" for key, value in losses.items())
                    samples = f" on samples {', '.join(map(str, batch.samples))}" if hasattr(batch, "samples") else ""
                    raise InputError(
                        f"{name}, step {i + 1}{samples}: {told}; the last good checkpoint is '{checkpoint}': try a "
                        "smaller learning rate, or look at those samples"
                    )
                for key, value in losses.items():
                    totals[key] = totals.get(key, 0) + value.detach()
                counted += 1
                bar.update()
                if (i + 1) % every == 0 or i + 1 == steps:
                    row = {"step": i + 1, **{k: round(float(v) / counted, 5) for k, v in totals.items()}}
                    row |= validate() if validate and main else {}
                    row["seconds"] = round(seconds + time.monotonic() - started, 1)
                    curve.append(row | {"device": device_name(PartialState().device)})
                    bar.set_postfix({k: v for k, v in row.items() if k != "step"}, refresh=False)
                    totals, counted = {}, 0
                    if main:
                        save(i + 1)
                    if log:
                        log({k: v for k, v in curve[-1].items() if k not in ("step", "device")}, i + 1)
    return pd.DataFrame(curve)


@contextmanager
def writing(folder: Path):
    """Turn a full or read-only disk into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: of torch's writer
        raise InputError(
            f"cannot write to '{folder}' ({error}): free disk space or make the folder writable; the same command goes "
            "on from the last checkpoint"
        ) from error


def _resume(checkpoint: Path, recorded: str, state: dict[str, Stateful], steps: int) -> tuple[int, float, list[dict]]:
    """(steps done, seconds spent, curve) of a checkpoint, whose `state` is restored; of none, (0, 0.0, [])."""
    if not checkpoint.exists():
        return 0, 0.0, []
    try:
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        first, seconds, curve = int(saved["step"]), float(saved["seconds"]), list(saved["curve"])
        theirs = saved["settings"]
        if theirs == recorded:
            _restore(state, saved["state"])
            if not 0 <= first <= steps:
                raise ValueError(f"step {first} of {steps}")
            pd.DataFrame(curve)
    except Exception as error:  # of many kinds: UnpicklingError, RuntimeError, KeyError, TypeError, EOFError ...
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"checkpoint '{checkpoint}' is damaged ({type(error).__name__}: {reason}): remove it, and the same command "
            "trains from the start"
        ) from None
    if theirs != recorded:
        raise InputError(
            f"{checkpoint.parent} holds a run with other settings ({theirs}); "
            f"remove that folder or train into another one to use {recorded}"
        )
    return first, seconds, curve


def _restore(state: dict[str, Stateful], saved: dict[str, dict]):
    for key, holder in state.items():
        holder.load_state_dict(saved[key])
        if isinstance(holder, torch.optim.Optimizer):  # which does not look at shapes itself
            tensors = [(p, v) for p, own in holder.state.items() for v in own.values() if torch.is_tensor(v) and v.ndim]
            if any(p.shape != v.shape for p, v in tensors):
                raise ValueError(f"'{key}' is of another model")
        values = torch.utils._pytree.tree_leaves(saved[key])
        if not all(v.isfinite().all() for v in values if torch.is_tensor(v)):
            raise ValueError(f"'{key}' has values that are not finite")


def _write_curve(curve: list[dict], folder: Path):
    with written_whole(folder / "curve.csv") as temporary:
        pd.DataFrame(curve).to_csv(temporary, index=False)


def loader_workers() -> int:
    """Processes that read and draw while the model trains. What they make does not depend on how many there are."""
    return max(1, min(8, torch.get_num_threads() // 2))


def _keep_freed_memory():
    """Have glibc keep all freed blocks, where `models.forward.keep_freed_memory` keeps those of up to 32 MB: handed
    back, every activation is paged in anew, a third of a step's time."""
    with suppress(OSError, AttributeError):  # other C libraries
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def plain_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention as two products and a softmax, in the device's fastest precision."""
    given, fast = query.dtype, fast_dtype(query.device)
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = query.to(fast), key.to(fast), value.to(fast)
        scores = (query * scaling) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        return (scores.softmax(-1) @ value).transpose(1, 2).to(given), None


ALL_ATTENTION_FUNCTIONS.register("plain", plain_attention)


@contextmanager
def fast_attention(*modules):
    """Train transformers modules with `plain_attention`: a CPU takes several times as long for the fused one's
    backward."""
    configs = [m.config for module in modules for m in module.modules() if hasattr(m, "config")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "plain"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
