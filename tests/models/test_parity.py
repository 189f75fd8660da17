"""Full-size CLIPSeg (ViT-B/16) against the authors' CLIPDensePredT and transformers' forward, on the same random
weights.

data/released_logits.json holds the authors' figures; data/make_released.py made them from `CASES` and says how.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from full_size import TOKENS, figures, full_size_model, image, logits, set_decoder

from clipseg_repro.models.forward import decode, embed_images, embed_texts, encode
from clipseg_repro.prompts import interpolate
from clipseg_repro.segmenter import Segmenter

ROOT = Path(__file__).parents[2]
LOGITS = ROOT / "tests" / "data" / "released_logits.json"
# (side in pixels, head, D, extracted layers); at 352 px, where positions are interpolated, the three released models
CASES = [
    *(
        (224, head, width, layers)
        for layers in ([3, 6, 9], [3, 7, 9])
        for head in ("plain", "refined")
        for width in (16, 64, 128)
    ),
    (352, "plain", 16, [3, 6, 9]),
    (352, "plain", 64, [3, 6, 9]),
    (352, "refined", 64, [3, 6, 9]),
]
VISUAL_SHARE = 0.25


def case_name(size, head, width, layers):
    return f"{size} px, {head} head, D = {width}, layers {layers}"


@pytest.fixture(scope="module")
def model():
    return full_size_model()


@pytest.fixture(scope="module")
def encoded(model):
    """What CLIP makes of the inputs, by our functions: (size, layers) -> activations, size -> conditions (3, 512)."""
    processor = SimpleNamespace(tokenizer=_tokenize)
    texts = embed_texts(model, processor, ["short", "long"])
    found = {}
    for size in (224, 352):
        (visual,) = embed_images(model, image("support", size))
        mixed = Segmenter(model, processor, "cpu").conditions(interpolate(texts[1], visual, VISUAL_SHARE))
        found[size] = torch.stack([texts[0], visual, *mixed])
    for size, layers in ((224, [3, 6, 9]), (224, [3, 7, 9]), (352, [3, 6, 9])):
        model.config.extract_layers = layers
        found[size, str(layers)] = encode(model, image("query", size))
    return found


def _tokenize(texts, **_):
    """As the released processor pads: with the end token, hidden by the attention mask."""
    length = max(len(ids) for ids in TOKENS)
    ids = [ids + [49407] * (length - len(ids)) for ids in TOKENS]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids in TOKENS]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case_name(*case))
def test_logits_equal_the_authors(case, model, encoded):
    size, head, width, layers = case
    set_decoder(model, head, width, layers)
    activations, conditions = encoded[size, str(layers)], encoded[size]
    with torch.no_grad():
        ours = decode(model, activations, conditions)
        library = model.decoder([a.repeat(3, 1, 1) for a in activations], conditions).logits
    released = json.loads(LOGITS.read_text())[case_name(*case)]
    for kind, map_, same in zip(("text", "image", "mixed"), ours, library, strict=True):
        expected = released[kind]
        tolerance = 1e-5 * expected["range"]
        for key, value in figures(map_).items():
            np.testing.assert_allclose(value, expected[key], rtol=0, atol=tolerance, err_msg=f"{kind}: {key}")
        torch.testing.assert_close(map_, same, rtol=0, atol=tolerance)
    # else the equalities would say little of the conditions
    assert torch.pdist(ours.flatten(1), float("inf")).min() > 0.03 * (ours.max() - ours.min())


@pytest.mark.parametrize("head", ["plain", "refined"])
def test_logits_equal_the_whole_forward_of_transformers(head, model, encoded):
    """The released models at 352 px, called as documented; the phrase is not padded here. And the table of versions has
    them: after an upgrade, make versions shows whether logits shifted."""
    library = logits(model, head)
    with torch.no_grad():
        (ours,) = decode(model, encoded[352, "[3, 6, 9]"], encoded[352][:1])
    torch.testing.assert_close(ours, library, rtol=0, atol=1e-5 * float(ours.max() - ours.min()))
    table = pd.read_csv(ROOT / "results" / "tables" / "versions.csv", dtype=str)
    (pinned,) = table[table.support == "pinned"].to_dict("records")
    assert f"transformers=={pinned['transformers']}" in (ROOT / "requirements.txt").read_text().splitlines()
    stored = [float(value) for value in pinned[f"logits, {head} head"].split()]
    assert figures(library)["logits"][: len(stored)] == pytest.approx(stored, abs=1e-4)
