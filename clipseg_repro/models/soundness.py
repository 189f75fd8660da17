"""Whether a loaded model can be what it says: its weights are numbers, its layers exist, its images can be prepared."""

import re

import numpy as np
import torch
from safetensors import safe_open

from clipseg_repro.errors import InputError
from clipseg_repro.prompts import input_size


def check_model(source, model, processor):
    """Raises InputError, with the first fault, for a model of variants.MODELS or a processor that is not sound."""
    config, pixels = model.config, processor.image_processor
    vision, read = config.vision_config, list(config.extract_layers)
    depth = len(getattr(vision, "stages", ())) or vision.num_hidden_layers
    words, known = len(processor.tokenizer), config.text_config.vocab_size
    size = input_size(pixels) if pixels.size else 0
    statistics = _numbers(pixels.image_mean), _numbers(pixels.image_std)
    faulty = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all()
    ]
    rules = (
        # without its files, transformers makes an empty tokenizer and says nothing
        (
            words == known,
            f"its tokenizer has {words} tokens, its text tower {known}: the tokenizer files are missing or belong to "
            "another model",
        ),
        (
            all(layer in range(depth) for layer in read),
            f"extract_layers {read} are not all among its {depth} layers, which count from 0: give a model with as "
            "many, or correct config.json",
        ),
        (
            config.conditional_layer in range(len(read)),
            f"conditional_layer {config.conditional_layer} is none of its decoder's {len(read)} layers, which count "
            "from 0: correct config.json",
        ),
        (
            isinstance(size, int) and size > 0 and size % vision.patch_size == 0,
            f"input size {size} is no multiple of the patch size {vision.patch_size}: correct the processor",
        ),
        (
            size == getattr(config, "input_size", size),
            f"its processor makes images of {size} px, the model takes {getattr(config, 'input_size', size)}: correct "
            "the processor",
        ),
        (
            all(s.shape == (3,) and np.isfinite(s).all() for s in statistics) and (statistics[1] > 0).all(),
            f"image_mean {pixels.image_mean} and image_std {pixels.image_std} have to be three numbers each, those of "
            "image_std above 0: correct the processor",
        ),
        (
            not faulty,
            f"{len(faulty)} of its weights hold NaN or infinite numbers {faulty[:3]}: save, copy or train it again",
        ),
    )
    for holds, fault in rules:
        if not holds:
            raise InputError(f"model '{source}': {fault}")


def _numbers(values):
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        return np.empty(0)


def check_stored_types(folder, model):
    """Raises InputError if a weight of `model` is stored in `folder` as integers, which loading has made floats of."""
    stored = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_slice(name).get_dtype() for name in file.keys()}
    for path in folder.glob("pytorch_model*.bin") if not stored else ():
        tensors = torch.load(path, map_location="meta", weights_only=True)
        stored |= {name: "F" if tensor.is_floating_point() else str(tensor.dtype) for name, tensor in tensors.items()}
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    wrong = sorted(
        f"{name} ({kind})" for name, kind in stored.items() if name in floating and not re.match("B?F", kind)
    )
    if wrong:
        raise InputError(
            f"model folder '{folder}' stores {len(wrong)} weights as integers or the like {wrong[:3]}: save it again"
        )
