"""Measuring image by image: an image per core, resumable, the bad ones named together at the end."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from threading import Lock
from time import monotonic

import safetensors.torch
import torch
from torch import distributed as dist
from torchmetrics import Metric
from tqdm.auto import tqdm

from clipseg_repro import __version__
from clipseg_repro.errors import InputError, listed
from clipseg_repro.files import written_whole

KEEP_EVERY = 30  # seconds
WORKERS = 8  # at most, on a CPU: more wait for Python


def measure(
    segmenter,
    dataset,
    images: Sequence,
    read: Callable,
    work: Callable,
    label: str,
    metrics: Metric | None = None,
    keep: Path | None = None,
    settings: dict | None = None,
) -> list[dict]:
    """The rows that `work` gives for all images, in the order of `images`; what it counts is added to `metrics`.

    Under `accelerate launch` every process takes a part of the images, and has all rows and counts in the end.

    read(image) gives work's arguments, in the caller's thread, a few images ahead. work(segmenter, *arguments) runs in
    one of a few threads, with a query image of its own, and gives its rows (dicts of JSON's values) and the arguments
    of `metrics.update`, None for nothing.

    keep: a folder for what has been counted, written every KEEP_EVERY seconds and when the measurement stops early. The
    same call (model, data, images, label and settings) goes on from there, and removes it when it has counted all.
    Raises InputError before the start if `dataset.check_pictures()` does, and at the end for all images whose read,
    work or update did.
    """
    dataset.check_pictures()
    every, images = images, images[_rank() :: _processes()]
    file = keep and Path(keep) / f"{_digest(segmenter.model, dataset, images, label, settings)}.safetensors"
    rows, failed, lock = {}, {}, Lock()
    if file and file.exists():
        rows = _kept(file, metrics)
    todo = [image for image in images if image not in rows]

    def attempt(image, step, *arguments):
        try:
            return step(*arguments)
        except InputError as error:
            failed[image] = str(error)

    def tasks():
        for image in todo:
            given = attempt(image, read, image)
            if given is not None:
                yield image, count, image, given

    def count(image, given):
        found, counted = work(copy(segmenter), *given)  # the threads share the model, not the query image
        with lock:
            if counted is not None:
                metrics.update(*counted)
            rows[image] = found

    def save():
        with lock:
            state = metrics.metric_state if metrics is not None else {}
            content = safetensors.torch.save(state, {"rows": json.dumps(list(rows.items()))})
        try:
            with written_whole(file) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise InputError(f"cannot write '{file}' ({error.strerror}): free disk space or make it writable") from None

    progress = tqdm(
        _in_parallel(attempt, tasks(), segmenter.device),
        label,
        len(images),
        initial=len(rows),
        unit="image",
        mininterval=1,
    )
    saved = monotonic()
    try:
        for _ in progress:
            if file and monotonic() - saved >= KEEP_EVERY:
                save()
                saved = monotonic()
    finally:
        if file and len(rows) < len(images):
            save()
    rows, failed = _joined(rows), _joined(failed)
    if failed:
        kept = "what was counted of the others is kept, " if file else ""
        raise InputError(
            f"{len(failed)} of {len(every)} images could not be measured; {kept}mend these and run the same again: "
            + listed(failed.values())
        )
    if file:
        file.unlink(missing_ok=True)
    if metrics is not None and _processes() > 1:
        for state in metrics.metric_state.values():
            dist.all_reduce(state)
        metrics.sync_on_compute = False  # they are summed already
    return [row for image in every for row in rows[image]]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _joined(own: dict) -> dict:
    """The entries of all processes."""
    if _processes() == 1:
        return own
    parts = [{}] * _processes()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def _in_parallel(work: Callable, tasks: Iterable[tuple], device: torch.device) -> Iterator:
    """work(*task) of every task, in order, by a few threads. They share the CPU's cores, which one image alone does not
    keep busy; the caller's thread meanwhile goes through `tasks`, a few ahead of the results."""
    cores = torch.get_num_threads()
    # MPS allows no second thread: Metal ends the process
    workers = {"cpu": min(cores, WORKERS), "mps": 1}.get(device.type, 2)
    threads = max(1, cores // workers)
    pending = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            for task in tasks:
                pending.append(pool.submit(work, *task))
                if len(pending) > workers:
                    yield pending.popleft().result()
            for result in pending:
                yield result.result()
    finally:
        torch.set_num_threads(cores)  # which is one number for the process


def _digest(model, dataset, images, label, settings):
    """The name of a measurement: of another model, other data or other settings it is another."""
    asked = [__version__, label, dataset.fingerprint(), images, dataset.phrases, settings]
    digest = hashlib.sha256(json.dumps(asked).encode())
    digest.update(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:16]


def _kept(file, metrics):
    """The rows by image of a measurement that stopped early; what it had counted is added to `metrics`."""
    try:
        with safetensors.safe_open(file, "pt") as kept:
            rows = dict(json.loads(kept.metadata()["rows"]))
            state = {name: kept.get_tensor(name).clone() for name in kept.keys()}  # not the file's own memory
        if metrics is not None:
            metrics.merge_state(state)
        return rows
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{file}', what an earlier run has counted, is damaged ({error}): remove it") from None
