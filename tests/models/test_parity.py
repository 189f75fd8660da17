"""Full-size CLIPSeg (ViT-B/16) against the authors' CLIPDensePredT and transformers' forward, on the same random
weights.

data/released_logits.json holds the authors' figures; data/make_released.py made them from `CASES` and says how.
"""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from clipseg_repro.models.forward import decode, embed_images, embed_texts, encode
from clipseg_repro.prompts import interpolate
from clipseg_repro.segmenter import Segmenter

LOGITS = Path(__file__).parents[1] / "data" / "released_logits.json"
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
# "cat." and "a photo of a cat." in CLIP's vocabulary, which is not shipped; the first is the text prompt, the second is
# mixed
TOKENS = [[49406, 2368, 269, 49407], [49406, 320, 1125, 539, 320, 2368, 269, 49407]]
VISUAL_SHARE = 0.25


def case_name(size, head, width, layers):
    return f"{size} px, {head} head, D = {width}, layers {layers}"


def random_weight(name, shape):
    """The weight that transformers calls `name`, the same on every machine: uniform numbers need no transcendental
    function."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.rand(shape, generator=generator).sub_(0.5).mul_(12**0.5)  # variance 1
    if len(shape) > 1:
        return values.mul_(values[0].numel() ** -0.5)  # keeps the variance of what it multiplies
    is_scale = "norm" in name and name.endswith("weight")
    return values.mul_(0.1).add_(1.0 if is_scale else 0.0)


def set_random_weights(module, prefix=""):
    with torch.no_grad():
        for name, parameter in module.named_parameters(prefix):
            parameter.copy_(random_weight(name, parameter.shape))


def full_size_model():
    model = CLIPSegForImageSegmentation(CLIPSegConfig(vision_config={"patch_size": 16})).eval()
    set_random_weights(model)
    return model


def set_decoder(model, head, width, layers):
    """Give `model` another decoder with weights of its own; CLIP stays as it is."""
    model.config.use_complex_transposed_convolution = head == "refined"
    model.config.reduce_dim = width
    model.config.extract_layers = model.extract_layers = layers
    model.decoder = type(model.decoder)(model.config).eval()
    set_random_weights(model.decoder, "decoder")


def image(name, size):
    """A smooth picture with noise, (1, 3, size, size), in the range of normalised images."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    coarse = torch.rand((1, 3, 7, 7), generator=generator) * 4 - 2
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    return smooth + torch.rand((1, 3, size, size), generator=generator) - 0.5


def figures(logits):
    """What is stored of one (S, S) map: mean, standard deviation, range, and twelve logits spread over it."""
    places = torch.linspace(0, logits.numel() - 1, 12).long()
    logits = logits.double()
    return {
        "mean": logits.mean().item(),
        "std": logits.std().item(),
        "range": (logits.max() - logits.min()).item(),
        "logits": logits.flatten()[places].tolist(),
    }


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


def test_logits_equal_the_whole_forward_of_transformers(model, encoded):
    """The released refined model at 352 px, called as documented; the phrase is not padded here."""
    set_decoder(model, "refined", 64, [3, 6, 9])
    with torch.no_grad():
        (ours,) = decode(model, encoded[352, "[3, 6, 9]"], encoded[352][:1])
        library = model(pixel_values=image("query", 352), input_ids=torch.tensor(TOKENS[:1])).logits
    tolerance = 1e-5 * float(ours.max() - ours.min())
    torch.testing.assert_close(ours, library.reshape(352, 352), rtol=0, atol=tolerance)
