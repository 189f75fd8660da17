"""Image towers as others published them, read from their safetensors files: timm's ViT and open_clip's copy of RN50x4.

Every key is accounted for: used, known to be unused, or an error that lists what is missing and what is unexpected.
Sizes are read off the shapes.
"""

import math
import re

from safetensors import SafetensorError
from safetensors.torch import load_file

from clipseg_repro.downloads import foreign_content
from clipseg_repro.errors import InputError
from clipseg_repro.models.released import renamed

# Hub id -> the file in it.
FILES = {
    "timm/vit_base_patch16_384.augreg_in21k_ft_in1k": "model.safetensors",
    "timm/resnet50x4_clip.openai": "open_clip_model.safetensors",
}

AGAIN = f"fetch them again, or give the Hub id: {' or '.join(FILES)}"

HEAD_WIDTH = 64  # channels per attention head, in all of these models

# Keys that are in some or all of the files and that we do not use.
UNUSED = {
    r"head\.(weight|bias)": "timm's classifier of ImageNet",
    r".+\.num_batches_tracked": "a count that batch norm needs in training only",
    r"attn_mask": "CLIP's causal mask, which is no weight",
    r"(input_resolution|context_length|vocab_size)": "sizes that OpenAI stored beside the weights",
}

BLOCK = {  # timm -> transformers' ViTModel
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TEXT_BLOCK = {  # OpenAI -> transformers' CLIP text tower
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def read_tower(path):
    """(kind, options, tensors) of a file: kind "vitseg" or "clipseg-resnet", its config's options, and float32 weights
    as its backbone names them; of a ViT only those below `vit.`. Raises InputError for any other file."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = foreign_content(path) or error
        raise InputError(f"weights '{path}' are damaged or no safetensors file ({reason}): {AGAIN}") from None
    for mark, read in (("cls_token", _read_vit), ("visual.attnpool.positional_embedding", _read_resnet)):
        if mark in state:
            try:
                return read(state, path)
            except InputError:
                raise
            except (KeyError, IndexError, TypeError, ValueError) as error:  # of what tells the sizes
                raise InputError(
                    f"weights '{path}' are incomplete: they lack what tells the sizes ({error}): {AGAIN}"
                ) from None
    raise InputError(
        f"weights '{path}' are neither a ViT of timm nor a CLIP ResNet of open_clip: give those of {', '.join(FILES)}"
    )


def _read_vit(state, path):
    width, depth = state["cls_token"].shape[-1], _count(state, r"blocks\.(\d+)\.")
    patch = state["patch_embed.proj.weight"].shape[-1]
    names = {
        "cls_token": ["vit.embeddings.cls_token"],
        "pos_embed": ["vit.embeddings.position_embeddings"],
    }
    modules = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm"}
    for i in range(depth):
        modules |= {f"blocks.{i}.{theirs}": f"vit.layers.{i}.{ours}" for theirs, ours in BLOCK.items()}
        for kind in ("weight", "bias"):
            names[f"blocks.{i}.attn.qkv.{kind}"] = [f"vit.layers.{i}.attention.{x}_proj.{kind}" for x in "qkv"]
    tensors = renamed(state, names | _both(modules), UNUSED, _another(path), FILES)
    vision = {
        "hidden_size": width,
        "intermediate_size": len(state["blocks.0.mlp.fc1.bias"]),
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD_WIDTH,
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    return "vitseg", {"vision_config": vision}, tensors


def _read_resnet(state, path):
    stages = [
        _count(state, rf"visual\.layer{i}\.(\d+)\.") for i in range(1, 1 + _count(state, r"visual\.layer(\d+)\.", 1))
    ]
    width, layers = len(state["visual.bn3.weight"]), _count(state, r"transformer\.resblocks\.(\d+)\.")
    places, channels = state["visual.attnpool.positional_embedding"].shape
    context, text_width = state["positional_embedding"].shape
    words = len(state["token_embedding.weight"])
    text = "text_model"
    names = {
        "logit_scale": ["logit_scale"],
        "text_projection": ["text_projection.weight"],
        "token_embedding.weight": [f"{text}.embeddings.token_embedding.weight"],
        "positional_embedding": [f"{text}.embeddings.position_embedding.weight"],
        "visual.attnpool.positional_embedding": ["visual.attnpool.positional_embedding"],
    }
    modules = {"ln_final": f"{text}.final_layer_norm"}
    for i in range(layers):
        theirs, ours = f"transformer.resblocks.{i}", f"{text}.encoder.layers.{i}"
        modules |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in TEXT_BLOCK.items()}
        for kind in ("weight", "bias"):
            names[f"{theirs}.attn.in_proj_{kind}"] = [f"{ours}.self_attn.{x}_proj.{kind}" for x in "qkv"]
    names |= _both(modules) | {key: [key] for key in _resnet_keys(stages)}
    state["text_projection"] = state["text_projection"].T
    tensors = renamed(state, names, UNUSED, _another(path), FILES)
    vision = {
        "stages": stages,
        "width": width,
        "hidden_size": channels,
        "num_attention_heads": channels // HEAD_WIDTH,
        "image_size": math.isqrt(places - 1) * 32,
    }
    options = {
        "vision_config": vision,
        "text_config": {
            "vocab_size": words,
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": layers,
            "num_attention_heads": text_width // HEAD_WIDTH,
            "max_position_embeddings": context,
        },
        "projection_dim": len(tensors["text_projection.weight"]),
    }
    return "clipseg-resnet", options, tensors


def _resnet_keys(stages):
    """Keys of a ModifiedResNet under `visual.`: the same in OpenAI's files and here."""
    convolutions = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
    pairs = list(convolutions)
    for i, count in enumerate(stages, start=1):
        for j in range(count):
            pairs += [(f"layer{i}.{j}.{a}", f"layer{i}.{j}.{b}") for a, b in convolutions]
        pairs.append((f"layer{i}.0.downsample.0", f"layer{i}.0.downsample.1"))
    keys = [f"visual.{conv}.weight" for conv, _ in pairs]
    keys += [f"visual.{norm}.{k}" for _, norm in pairs for k in ("weight", "bias", "running_mean", "running_var")]
    return keys + [f"visual.attnpool.{x}_proj.{k}" for x in "qkvc" for k in ("weight", "bias")]


def _both(modules):
    return {f"{theirs}.{k}": [f"{ours}.{k}"] for theirs, ours in modules.items() for k in ("weight", "bias")}


def _count(state, pattern, first=0):
    """How many numbers, from `first` on, the keys have where `pattern` has a group."""
    return max(int(found[1]) for key in state if (found := re.match(pattern, key))) + 1 - first


def _another(path):
    return f"weights '{path}' are another model's"
