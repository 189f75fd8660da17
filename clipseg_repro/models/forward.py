"""The forward pass in the pieces that everything else is made of: encode, embed, decode.

CLIPSeg is transformers' CLIPSegForImageSegmentation, with its modules and weights; the functions here call them in
another order. `decode(encode(image), condition)` equals the library's forward, but one image serves any number of
conditions. The baselines and the other backbone (variants.MODELS) are driven by the same functions. Symbols in shapes:
B images, K conditions, N tokens (1 + patches), P = projection_dim, S = input side in pixels.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoderLayer

from clipseg_repro.errors import InputError
from clipseg_repro.models.variants import backbone

CACHED_BYTES = 4 * 2**20  # of the decoder's widest activations, on a CPU: more do not stay in its cache


@torch.no_grad()
def encode(model, pixel_values):
    """The activations that the decoder reads: a list of (B, N, width), in the order of config.extract_layers.

    `pixel_values` is (B, 3, S, S). The image tower runs only up to the deepest extracted layer."""
    return backbone(model).activations(pixel_values)


@torch.no_grad()
def embed_images(model, pixel_values, masks=None, attention=None):
    """Image embeddings (B, P), un-normalised, of `pixel_values` (B, 3, S, S).

    With `attention` (rows, layers) as in prompts.Recipe, `masks` (B, S, S) bool restricts CLIP's attention. The masks
    are sampled to the patch grid (nearest, as released). Every image gets its own mask; the released code mixes the
    masks of a batch up. Only CLIP's ViT can do that: of other backbones, `attention` raises InputError."""
    return backbone(model).embed_images(pixel_values, masks, attention)


@torch.no_grad()
def embed_texts(model, processor, texts):
    """Text embeddings (K, P), un-normalised, of K phrases. Raises InputError for a blank phrase and for one longer than
    the text tower's context."""
    for text in texts:
        if not text.strip():
            raise InputError(f"prompt {text!r} is blank: describe what to segment")
        if text.encode(errors="ignore").decode() != text:
            raise InputError(f"prompt {text!r} is not valid Unicode: write it in UTF-8")
    tokens = processor.tokenizer(list(texts), padding=True, return_tensors="pt", verbose=False)
    limit = model.config.text_config.max_position_embeddings
    lengths = tokens["attention_mask"].sum(1)
    if lengths.max() > limit:
        longest = texts[int(lengths.argmax())]
        raise InputError(
            f"prompt '{longest[:40]}...' has {int(lengths.max())} tokens, the text tower reads at most {limit}: cut it"
        )
    tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return backbone(model).embed_texts(**tokens)


def decode(model, activations, conditions):
    """Logits (max(B, K), S, S) of `activations` (as from `encode`) under `conditions` (K, P).

    B = K goes row by row. B = 1 puts K conditions to one image, K = 1 one condition to B images; what does not depend
    on the condition is then computed once. Gradients flow through the decoder and to `conditions`."""
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
        output = _decoder_block(block, output)
    patches = output[:, 1:].transpose(1, 2)  # without the CLS token
    side = math.isqrt(patches.shape[2])
    return _enlarged(decoder.transposed_convolution, patches.unflatten(2, (side, side))).squeeze(1)


def _enlarged(head, patches):
    """head(patches), (K, 1, S, S). The windows of its transposed convolutions do not overlap: each is a product and a
    rearrangement, which a CPU does ten times as fast as it does a transposed convolution."""
    for layer in (module for module in head.modules() if not list(module.children())):
        if isinstance(layer, nn.ConvTranspose2d):
            (step, _), weight = layer.stride, layer.weight.flatten(1).T[:, :, None, None]
            patches = F.pixel_shuffle(F.conv2d(patches, weight, layer.bias.repeat_interleave(step**2)), step)
        else:
            patches = layer(patches)
    return patches


def _decoder_block(block, hidden):
    """block(hidden), (K, N, D). Without gradients, a CPU takes the widest part of it some rows at a time."""
    if torch.is_grad_enabled() or hidden.device.type != "cpu" or not isinstance(block, CLIPSegDecoderLayer):
        return block(hidden, attention_mask=None)
    hidden = block.layer_norm1(hidden + block.self_attn(hidden, attention_mask=None)[0])
    at_once = max(1, CACHED_BYTES // (block.mlp.fc1.out_features * hidden.element_size()))
    wide = torch.cat([block.mlp(rows) for rows in hidden.flatten(0, 1).split(at_once)])
    return block.layer_norm2(hidden + wide.view_as(hidden))


def keep_freed_memory():
    """Make glibc keep freed blocks of up to 32 MB for the next layer, and not return them and fault in new pages.

    Its limits follow the largest block that was freed so far (mallopt(3), M_MMAP_THRESHOLD); elsewhere this does
    nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed at once
