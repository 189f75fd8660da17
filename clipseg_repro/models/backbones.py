"""The frozen part of every model, behind one protocol: image -> activations and embedding, text -> embedding.

Symbols in shapes: B images, K texts, N tokens (1 + patches; the CLS or global token is first), L tokens of text, P =
projection_dim, S = input side in pixels. Images are normalised as the processor does.
"""

import math
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPSegTextModel, ViTConfig, ViTModel

from clipseg_repro.errors import InputError
from clipseg_repro.models.resnet import ModifiedResNet


class Backbone(Protocol):
    """What a decoder and a Segmenter need of the frozen part."""

    def activations(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """[(B, N, C_i)] of `pixel_values` (B, 3, S, S), in the order of config.extract_layers; nothing deeper runs."""

    def embed_images(self, pixel_values: torch.Tensor, masks=None, attention=None) -> torch.Tensor:
        """(B, P), un-normalised; `masks` (B, S, S) and `attention` as in `models.embed_images`."""

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(K, P), un-normalised, of tokens (K, L)."""

    def joint_weight(self) -> torch.Tensor | None:
        """(P, C): the linear part of how the deepest activations are seen in the texts' space; None without one."""


def _check_square(pixel_values, multiple):
    height, width = pixel_values.shape[2:]
    if height != width or height % multiple:
        raise InputError(
            f"input of {height} x {width} px: this model takes squares of a multiple of its patch size {multiple}"
        )


def _chosen(outputs, layers):
    """[outputs[i] for i in layers] of an iterator, which is asked no further than that."""
    found = {}
    for index, output in enumerate(outputs):
        if index in layers:
            found[index] = output
        if index == max(layers):
            break
    return [found[index] for index in layers]


def _refuse_masking(attention):
    if attention is not None:
        raise InputError("this recipe masks the attention of CLIP's ViT, which this model lacks: choose another recipe")


class ClipViT:
    """The CLIP inside transformers' CLIPSegForImageSegmentation, as it is: a view that holds no weights of its own."""

    def __init__(self, model):
        self.clip, self.config = model.clip, model.config

    def activations(self, pixel_values):
        return _chosen(self._block_outputs(pixel_values), list(self.config.extract_layers))

    def embed_images(self, pixel_values, masks=None, attention=None):
        if attention is None:
            return self.clip.get_image_features(pixel_values).pooler_output
        grid = pixel_values.shape[-1] // self.config.vision_config.patch_size
        keep = F.interpolate(masks[:, None].float(), (grid, grid)).flatten(1).to(pixel_values.device)
        *_, hidden = self._block_outputs(pixel_values, keep, attention)
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden[:, 0]))

    def embed_texts(self, input_ids, attention_mask):
        return self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def embed_tokens(self, pixel_values):
        """(B, N, P): the joint space's view of every token; the first is the image's embedding."""
        tokens = self.clip.vision_model(pixel_values=pixel_values).last_hidden_state
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(tokens))

    def joint_weight(self):
        return self.clip.visual_projection.weight @ torch.diag(self.clip.vision_model.post_layernorm.weight)

    def _block_outputs(self, pixel_values, keep=None, attention=None):
        """Yield (B, N, hidden) after each block; blocks run only as far as the caller iterates."""
        _check_square(pixel_values, self.config.vision_config.patch_size)
        vision = self.clip.vision_model
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


class _ClipText(nn.Module):
    """CLIP's text tower, with the names that it has inside transformers' CLIPSegModel."""

    def __init__(self, config):
        super().__init__()
        self.text_model = CLIPSegTextModel._from_config(config.text_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)

    def embed_texts(self, input_ids, attention_mask):
        tokens = self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return self.text_projection(tokens)


class ImageNetViT(_ClipText):
    """ViTSeg's backbone (paper, section 4.2; released models/vitseg.py): a ViT trained on ImageNet, and CLIP's texts.

    As released, inputs are resized to the ViT's own size (nearest), and an image's embedding is the CLS output after
    the final norm through a linear layer that is random and stays so: everything in the ViT is frozen, this layer
    included.
    """

    def __init__(self, config):
        super().__init__(config)
        vision = config.vision_config
        names = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
        names += " image_size patch_size hidden_act layer_norm_eps"
        self.vit = ViTModel._from_config(
            ViTConfig(**{name: getattr(vision, name) for name in names.split()}), add_pooling_layer=False
        )
        self.projection = nn.Linear(vision.hidden_size, config.projection_dim)
        self.layers, self.input_size = list(config.extract_layers), config.input_size

    def activations(self, pixel_values):
        return _chosen(self._block_outputs(pixel_values), self.layers)

    def embed_images(self, pixel_values, masks=None, attention=None):
        _refuse_masking(attention)
        *_, hidden = self._block_outputs(pixel_values)
        return self.projection(self.vit.layernorm(hidden[:, 0]))

    def joint_weight(self):
        return None

    def _block_outputs(self, pixel_values):
        if pixel_values.shape[2:] != (self.input_size, self.input_size):
            height, width = pixel_values.shape[2:]
            raise InputError(f"input of {height} x {width} px: this model takes {self.input_size} x {self.input_size}")
        size = self.vit.config.image_size
        hidden = self.vit.embeddings(F.interpolate(pixel_values, (size, size), mode="nearest"))
        for block in self.vit.layers:
            hidden = block(hidden, attention_mask=None)
            yield hidden


class ClipResNet(_ClipText):
    """CLIP with a ModifiedResNet, as RN50x4. The paper did not use it.

    Activations are the outputs of the stages `extract_layers`, each resampled (bilinear) to a grid of S / patch_size,
    with its mean in place of a CLS token. Embeddings are the attention pooling's.
    """

    def __init__(self, config):
        super().__init__(config)
        vision = config.vision_config
        self.stride = 4 * vision.stem * math.prod(vision.strides)
        grid = vision.image_size // self.stride
        sizes = vision.width, grid, vision.num_attention_heads, config.projection_dim
        self.visual = ModifiedResNet(vision.stages, vision.strides, *sizes, vision.stem)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.layers, self.patch = list(config.extract_layers), vision.patch_size

    def activations(self, pixel_values):
        self._check(pixel_values)
        side = pixel_values.shape[-1] // self.patch
        found = []
        for stage in _chosen(self.visual.stages(pixel_values), self.layers):
            grid = F.interpolate(stage, (side, side), mode="bilinear", align_corners=False)
            tokens = grid.flatten(2).transpose(1, 2)
            found.append(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
        return found

    def embed_images(self, pixel_values, masks=None, attention=None):
        _refuse_masking(attention)
        return self.embed_tokens(pixel_values)[:, 0]

    def embed_tokens(self, pixel_values):
        """(B, 1 + places of the last stage, P): the joint space's view; the first is the image's embedding."""
        self._check(pixel_values)
        return self.visual(pixel_values)

    def joint_weight(self):
        pool = self.visual.attnpool
        return pool.c_proj.weight @ pool.v_proj.weight

    def _check(self, pixel_values):
        _check_square(pixel_values, max(self.stride, self.patch))
