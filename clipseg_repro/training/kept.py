"""What a frozen backbone makes of training pictures, kept in files: the same for every run, seed and epoch."""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.lib.format import open_memmap

from clipseg_repro.datasets.phrasecut import Samples
from clipseg_repro.files import written_whole


def frozen_key(model, processor, data: Samples) -> str:
    """A name for what the outputs of a model's backbone depend on: weights, precision, preparation, data; not which
    layers are read nor how examples are shown, which name the folders within."""
    digest = hashlib.sha256(f"{data.fingerprint()} {processor.image_processor.to_json_string()}".encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(f"{name} {value.dtype}".encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Kept:
    """Rows of tensors, each computed the first time that it is asked for and read from `folder` from then on.

    Rows may be asked for in any order, by runs one after the other or by the processes of one; the files hold as much
    as was asked for (on file systems with sparse files). Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, rows: int, dtype=np.float16):
        self.folder, self.count, self.dtype = folder, rows, np.dtype(dtype)

    def __getstate__(self):  # a worker process opens the files itself: a pickled array would be a copy
        return {"folder": self.folder, "count": self.count, "dtype": self.dtype}

    @cached_property
    def _done(self) -> np.ndarray:
        return self._open("done.npy", (self.count,), np.uint8)

    def _open(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):  # of the processes of one run the first makes it
                if not path.exists():
                    with written_whole(path) as temporary:
                        open_memmap(temporary, "w+", dtype, shape)
        return open_memmap(path, "r+")

    def __contains__(self, row: int) -> bool:
        return self.folder is not None and bool(self._done[row])

    def get(self, inputs: dict[int, torch.Tensor | None], compute) -> list[torch.Tensor]:
        """Tensors with a row per key of `inputs`, in its order; compute(stacked inputs) gives those not kept yet."""
        rows = list(inputs)
        if self.folder is None:
            return compute(torch.stack(list(inputs.values())))
        new = [row for row in rows if row not in self]
        if new:
            made = compute(torch.stack([inputs[row] for row in new]))
            for i, tensor in enumerate(made):
                kept = self._open(f"{i}.npy", (self.count, *tensor.shape[1:]), self.dtype)
                kept[new] = tensor.float().cpu().numpy()
            self._done[new] = 1
        kept = [open_memmap(self.folder / f"{i}.npy", "r") for i in range(len(list(self.folder.glob("[0-9]*.npy"))))]
        return [torch.from_numpy(tensor[rows]) for tensor in kept]
