"""Loading CLIPSeg, and its forward pass in the pieces that everything else is made of: encode, embed, decode.

The modules and their weights are those of transformers' CLIPSegForImageSegmentation; the functions here call them in
another order. `decode(encode(image), condition)` equals the library's forward, but one image serves any number of
conditions. Symbols in shapes: B images, K conditions, N tokens (1 + patches), P = projection_dim, S = input side in pixels.
"""

import contextlib
import json
import math
import re
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import (
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    ViTImageProcessorPil,
)
from transformers.utils import logging

from clipseg_repro.errors import InputError
from clipseg_repro.prompts import IMAGENET_MEAN, IMAGENET_STD, RELEASED_SIZE, input_size
from clipseg_repro.released import read_decoder

MINI = Path(__file__).parent / "weights" / "mini"
CLIP = "openai/clip-vit-base-patch16"

# Hub id -> the commit that is loaded; of other ids, and of None, the newest.
REVISIONS = {
    "CIDAS/clipseg-rd64-refined": "999e0328d9e10b484360c477313983f9afdd7050",
    "CIDAS/clipseg-rd64": None,  # its commits could not be looked up when this was written
    "CIDAS/clipseg-rd16": None,  # likewise
    CLIP: "57c216476eefef5ab752ec549e440a49ae4ae5f3",
}


def load_model(source="mini", clip=CLIP):
    """(CLIPSegForImageSegmentation in float32 and eval mode, CLIPSegProcessor).

    `source` is "mini" (shipped with the package), a folder written by `save_pretrained`, a Hub id such as
    "CIDAS/clipseg-rd64-refined", or one of the authors' `.pth` files. Those hold the decoder only: `clip`, a Hub id or a
    `save_pretrained` folder of a CLIPModel and its tokenizer, gives the rest; no other source reads it. A model that is in the
    Hub's cache is not fetched again. Raises InputError if a source is unknown, damaged or another architecture.
    """
    if source == "mini" and not (MINI / "model.safetensors").is_file():
        raise InputError(
            f"the mini model's weights are missing from {MINI}: reinstall the package or give another source"
        )
    path = MINI if source == "mini" else Path(source)
    model, processor = _read_released(path, clip) if path.is_file() else _pretrained(_read_clipseg, path, "clipseg")
    words, known = len(processor.tokenizer), model.config.text_config.vocab_size
    if words != known:  # without its files, transformers makes an empty tokenizer and says nothing
        raise InputError(
            f"model '{source}': its tokenizer has {words} tokens, its text tower {known}: the tokenizer files are missing "
            "or belong to another model"
        )
    patch, size = model.config.vision_config.patch_size, input_size(processor.image_processor)
    if size % patch:
        raise InputError(
            f"model '{source}': input size {size} is no multiple of the patch size {patch}: correct the processor"
        )
    for layer in model.decoder.layers:  # ReLU: the same numbers, less memory to move
        layer.mlp.activation_fn = torch.nn.ReLU(inplace=True)
    return model.eval(), processor


def _pretrained(read, source, kind):
    """read(...) of a folder that holds a model of that `kind` (config.json's model_type), or of a Hub id."""
    path, name = Path(source), str(source)
    if path.is_dir():
        _check_folder(path, kind)
        failure = f"model folder '{name}' is damaged or incomplete: save or copy it again"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        failure = (
            f"model '{name}' is no folder, is not in the cache {HF_HUB_CACHE}, and could not be fetched from the Hub: "
            "check the name and the network, or use 'mini', which needs neither"
        )
    else:
        raise InputError(
            f"unknown model '{name}': give 'mini', an existing save_pretrained folder or .pth file, or a Hub id "
            "(owner/name)"
        )
    options = {"revision": REVISIONS[name]} if REVISIONS.get(name) else {}
    try:
        with _quiet():
            try:
                model, report, rest = read(name, local_files_only=True, **options)  # what is cached needs no network
            except OSError:
                model, report, rest = read(name, **options)
    except Exception as error:  # of many kinds: OSError, RuntimeError, SafetensorError, ValueError ...
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{failure} ({type(error).__name__}: {reason})") from error
    strange = [k for k in report["unexpected_keys"] if not k.endswith("position_ids")]  # old files store that buffer
    missing = sorted(report["missing_keys"])
    if missing or strange or report["mismatched_keys"]:
        raise InputError(
            f"model '{name}' is not a complete {type(model).__name__}: {len(missing)} weights missing {missing[:3]}, "
            f"{len(strange)} unexpected {sorted(strange)[:3]}: give weights of that class"
        )
    return model, rest


def _check_folder(path, kind):
    """Fail early, with the reason, on a folder of another kind of model."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise InputError(
            f"model folder '{path}' has no config.json: give a folder written by save_pretrained"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model folder '{path}' has a damaged config.json ({error!r}): save or copy it again"
        ) from None
    if found != kind:
        raise InputError(f"model folder '{path}' holds a '{found}' model: give one of model_type '{kind}'")


def _read_clipseg(name, **options):
    # float32 by name: transformers 5 would keep the precision of the file
    model, report = CLIPSegForImageSegmentation.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, **options
    )
    processor = CLIPSegProcessor.from_pretrained(name, **options)
    # where torchvision is installed, transformers would resize with it, to slightly other pixels
    processor.image_processor = ViTImageProcessorPil.from_dict(processor.image_processor.to_dict())
    return model, report, processor


def _read_clip(name, **options):
    model, report = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    return model, report, CLIPTokenizer.from_pretrained(name, **options)


def _read_released(path, clip):
    """(model, processor) of one of the authors' files and the CLIP that it was trained on."""
    options, tensors = read_decoder(path)  # before CLIP: its errors are cheaper
    towers, tokenizer = _pretrained(_read_clip, clip, "clip")
    config = CLIPSegConfig(
        text_config=towers.config.text_config.to_dict(),
        vision_config=towers.config.vision_config.to_dict(),
        projection_dim=towers.config.projection_dim,
        **options,
    )
    model = CLIPSegForImageSegmentation(config)
    model.clip.load_state_dict(towers.state_dict())
    wanted = {name: tuple(tensor.shape) for name, tensor in model.decoder.state_dict().items()}
    wrong = [
        f"{k} {tuple(tensor.shape)} in place of {wanted[k]}"
        for k, tensor in tensors.items()
        if tensor.shape != wanted[k]
    ]
    if wrong or max(config.extract_layers) >= config.vision_config.num_hidden_layers:
        raise InputError(
            f"weights '{path}' do not fit CLIP '{clip}' ({wrong[0] if wrong else 'too few layers'}): the authors' files "
            f"need {CLIP}"
        )
    model.decoder.load_state_dict(tensors)
    pixels = ViTImageProcessorPil(
        size={"height": RELEASED_SIZE, "width": RELEASED_SIZE},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        resample=2,  # bilinear
    )
    return model, CLIPSegProcessor(image_processor=pixels, tokenizer=tokenizer)


@contextlib.contextmanager
def _quiet():
    """Silence progress bars and load reports: we raise on what matters."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _block_outputs(model, pixel_values, keep=None, attention=None):
    """Yield (B, N, hidden) after each block of the image tower; blocks run only as far as the caller iterates."""
    vision = model.clip.vision_model
    patch, (height, width) = model.config.vision_config.patch_size, pixel_values.shape[2:]
    if height != width or height % patch:
        raise InputError(
            f"input of {height} x {width} px: this model takes squares whose side is a multiple of its patch size {patch}"
        )
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    rows, layers = attention or (None, None)
    blocks = vision.encoder.layers
    for index, block in enumerate(blocks):
        masked = layers == "all" or (layers == "last" and index == len(blocks) - 1)
        hidden = _masked_block(block, hidden, keep, rows) if masked else block(hidden, attention_mask=None)
        yield hidden


def _masked_block(block, hidden, keep, rows):
    """One encoder block whose attention logits on the patches outside `keep` (B, N - 1) are multiplied by 0."""
    attention = block.self_attn
    x = block.layer_norm1(hidden)
    query, key, value = (
        project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = query @ key.transpose(-1, -2) * attention.scale
    # as released: "patches" leaves the CLS row alone, and no row loses its view of the CLS token
    selected = slice(0, 1) if rows == "cls" else slice(1, None)
    logits[:, :, selected, 1:] *= keep[:, None, None].to(logits.dtype)
    mixed = logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.layer_norm2(hidden))


@torch.no_grad()
def encode(model, pixel_values):
    """The activations that the decoder reads: a list of (B, N, hidden), in the order of config.extract_layers.

    `pixel_values` is (B, 3, S, S). The image tower runs only up to the deepest extracted layer."""
    wanted = list(model.config.extract_layers)
    found = {}
    for index, hidden in enumerate(_block_outputs(model, pixel_values)):
        if index in wanted:
            found[index] = hidden
        if index == max(wanted):
            break
    return [found[index] for index in wanted]


@torch.no_grad()
def embed_images(model, pixel_values, masks=None, attention=None):
    """Image embeddings (B, P), un-normalised, of `pixel_values` (B, 3, S, S).

    With `attention` (rows, layers) as in prompts.Recipe, `masks` (B, S, S) bool restricts CLIP's attention. The masks are sampled
    to the patch grid (nearest, as released). Every image gets its own mask; the released code mixes the masks of a batch up."""
    if attention is None:
        return model.clip.get_image_features(pixel_values).pooler_output
    grid = pixel_values.shape[-1] // model.config.vision_config.patch_size
    keep = torch.nn.functional.interpolate(masks[:, None].float(), (grid, grid)).flatten(1).to(pixel_values.device)
    *_, hidden = _block_outputs(model, pixel_values, keep, attention)
    return model.clip.visual_projection(model.clip.vision_model.post_layernorm(hidden[:, 0]))


@torch.no_grad()
def embed_texts(model, processor, texts):
    """Text embeddings (K, P), un-normalised, of K phrases. Raises InputError for a blank phrase and for one longer than
    the text tower's context."""
    for text in texts:
        if not text.strip():
            raise InputError(f"prompt {text!r} is blank: describe what to segment")
    tokens = processor.tokenizer(list(texts), padding=True, return_tensors="pt", verbose=False)
    limit = model.config.text_config.max_position_embeddings
    lengths = tokens["attention_mask"].sum(1)
    if lengths.max() > limit:
        longest = texts[int(lengths.argmax())]
        raise InputError(
            f"prompt '{longest[:40]}...' has {int(lengths.max())} tokens, the text tower reads at most {limit}: shorten it"
        )
    tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return model.clip.get_text_features(**tokens).pooler_output


def decode(model, activations, conditions):
    """Logits (max(B, K), S, S) of `activations` (as from `encode`) under `conditions` (K, P).

    B = K goes row by row. B = 1 puts K conditions to one image, K = 1 one condition to B images; what does not depend on the
    condition is then computed once. Gradients flow through the decoder and to `conditions`."""
    decoder = model.decoder
    width = model.config.projection_dim
    if conditions.ndim != 2 or conditions.shape[1] != width:
        raise InputError(f"conditions of shape {tuple(conditions.shape)}: this model takes (K, {width})")
    if len(conditions) != len(activations[0]) and 1 not in (len(conditions), len(activations[0])):
        raise InputError(
            f"{len(activations[0])} images and {len(conditions)} conditions: give as many of both, or one of either"
        )
    conditions = conditions.to(decoder.film_mul.weight.dtype)
    output = 0
    # deepest activation first
    for index, (activation, block, reduce) in enumerate(zip(activations[::-1], decoder.layers, decoder.reduces)):
        output = reduce(activation) + output
        if index == decoder.conditional_layer:
            output = decoder.film_mul(conditions)[:, None] * output + decoder.film_add(conditions)[:, None]
        output = block(output, attention_mask=None)
    patches = output[:, 1:].transpose(1, 2)  # without the CLS token
    side = math.isqrt(patches.shape[2])
    return decoder.transposed_convolution(patches.unflatten(2, (side, side))).squeeze(1)
