"""A known answer: what the released weights give on one picture, so that a download can be checked in one command."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from clipseg_repro.downloads import download
from clipseg_repro.models.loading import load_model
from clipseg_repro.models.released import FILES, authors_name
from clipseg_repro.pictures import load_image
from clipseg_repro.segmenter import Segmenter

IMAGE = "http://images.cocodataset.org/val2017/000000039769.jpg"
PROMPTS = ("a cat", "a remote", "a blanket")
TOLERANCE = 1e-3
NO_ANSWER = "no known answer for this decoder, only for the refined one with D = 64"

# From the tests of Hugging Face's port: the first rows of what it gives for PROMPTS. The logits are those of D = 64
# with the refined head; the embeddings are CLIP's, and so the same for every released decoder.
CORNER = [[-7.4613, -7.4785, -7.3628], [-7.3268, -7.0899, -7.1333], [-6.9838, -6.7900, -6.8913]]
EXPECTED = {
    "conditional_embeddings[0, :3]": [0.5601, -0.0314, 0.1980],
    "pooled_output[0, :3]": [0.5036, -0.2681, -0.2644],
    "logits[0, :3, :3]": CORNER,
    "Segmenter.logits[0, :3, :3]": CORNER,
}


class Check(NamedTuple):
    """What was found for one tensor, or for the file itself; `passed` is None where there is no known answer."""

    name: str
    passed: bool | None
    found: str

    def __str__(self):
        mark = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        return f"{mark:<5} {self.name}: {self.found}"


def verify(source, image=None):
    """The Checks of the model at `source` (see `models.load_model`), in float32 on the CPU.

    `image` is the path of COCO val2017 000000039769.jpg; None fetches it. transformers' own call, as documented, gives
    the tensors of EXPECTED; this package's Segmenter gives the logits once more. Of a file, the first says whether it
    is one of the authors' three. Raises InputError as loading and fetching do.
    """
    picture = load_image(image) if image else _fetched_image()
    model, processor = load_model(source)
    pictures = [Image.fromarray(picture)] * len(PROMPTS)
    with torch.no_grad():
        output = model(**processor(text=list(PROMPTS), images=pictures, padding=True, return_tensors="pt"))
    segmenter = Segmenter(model, processor, device="cpu", dtype=torch.float32)
    segmenter.set_image(picture)
    found = {
        "conditional_embeddings[0, :3]": output.conditional_embeddings[0, :3],
        "pooled_output[0, :3]": output.pooled_output[0, :3],
        "logits[0, :3, :3]": output.logits[0, :3, :3],
        "Segmenter.logits[0, :3, :3]": segmenter.logits(PROMPTS)[0, :3, :3],
    }
    refined = model.config.reduce_dim == 64 and model.config.use_complex_transposed_convolution
    return _file_checks(source) + [
        _check(name, tensor) if refined or "logits" not in name else Check(name, None, NO_ANSWER)
        for name, tensor in found.items()
    ]


def _check(name, tensor):
    deviation = (tensor - torch.tensor(EXPECTED[name])).abs().max().item()
    found = f"largest deviation {deviation:.2g} (tolerance {TOLERANCE:g})"
    return Check(name, deviation <= TOLERANCE, found)  # NaN fails


def _file_checks(path):
    if not os.path.isfile(path):
        return []
    name = authors_name(path)
    found = f"that of the authors' {name}" if name else f"none of the authors' files ({', '.join(FILES)}) has it"
    return [Check("SHA-256", True if name else None, found)]


def _fetched_image():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(IMAGE).name
        download(IMAGE, path, otherwise="give the picture with --image")
        return load_image(path)
