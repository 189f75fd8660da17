"""A full-size CLIPSeg (ViT-B/16) with fixed weights, and fixed inputs: the same numbers in every process, on every
machine, and under every version of transformers, of which nothing is asked but CLIPSeg itself.

    python tests/models/full_size.py FILE        # writes what the transformers that is found makes of them
"""

import sys
import zlib

import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

# "cat." and "a photo of a cat." in CLIP's vocabulary, which is not shipped; the first is the text prompt, the second is
# mixed
TOKENS = [[49406, 2368, 269, 49407], [49406, 320, 1125, 539, 320, 2368, 269, 49407]]


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


@torch.no_grad()
def logits(model, head):
    """(352, 352) logits of phrase TOKENS[0] in image "query" by transformers' documented call, of the released size."""
    set_decoder(model, head, 64, [3, 6, 9])
    return model(pixel_values=image("query", 352), input_ids=torch.tensor(TOKENS[:1])).logits.reshape(352, 352)


if __name__ == "__main__":
    fixed = full_size_model()
    torch.save({head: logits(fixed, head) for head in ("plain", "refined")}, sys.argv[1])
