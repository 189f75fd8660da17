"""The baselines, and CLIPSeg on another backbone: transformers models like CLIPSeg, saved and loaded in the same way.

Each is a config (its model_type is the name in experiments.yaml), a backbone and a decoder. A decoder has the parts
that `models.decode` calls, so that it, Segmenter, protocols and training drive all of them.
"""

from torch import nn
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegVisionConfig
from transformers import initialization as init
from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder, CLIPSegPreTrainedModel

from clipseg_repro.errors import InputError
from clipseg_repro.models.backbones import Backbone, ClipResNet, ClipViT, ImageNetViT
from clipseg_repro.models.resnet import AttentionPool, Bottleneck


class ClipDeconvConfig(CLIPSegConfig):
    model_type = "clip-deconv"


class ViTSegConfig(CLIPSegConfig):
    """`vision_config` is the ViT's. `input_size`: side in pixels of the images given to the model and of its logits."""

    model_type = "vitseg"
    input_size: int = 352


class ResNetVisionConfig(CLIPSegVisionConfig):
    """Defaults are RN50x4's. `patch_size` is that of the grid to which the stages are resampled, `hidden_size` the
    width of the last stage, 4 * width * 2**(len(stages) - 1), and `num_attention_heads` those of the attention
    pooling."""

    model_type = "clipseg_resnet_vision_model"
    stages: list[int] | tuple[int, ...] = (4, 6, 10, 6)
    strides: list[int] | tuple[int, ...] = (1, 2, 2, 2)
    width: int = 80
    hidden_size: int = 2560
    num_attention_heads: int = 40
    image_size: int = 288
    patch_size: int = 16
    stem: int = 1  # of ModifiedResNet


class ClipSegResNetConfig(CLIPSegConfig):
    """`extract_layers` counts stages from 0: by default the last three, so that the decoder is as deep as CLIPSeg's."""

    model_type = "clipseg-resnet"
    sub_configs_defaults = CLIPSegConfig.sub_configs_defaults | {"vision_config": ResNetVisionConfig}
    projection_dim: int = 640
    extract_layers: list[int] | tuple[int, ...] = (1, 2, 3)


class _Mlp(nn.Sequential):
    """What CLIP-Deconv has in place of a transformer block, called like one."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, hidden, attention_mask=None, **_):
        return super().forward(hidden)


class ClipDeconvDecoder(CLIPSegDecoder):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(_Mlp(config.reduce_dim) for _ in config.extract_layers)
        self.post_init()


class ViTSegDecoder(CLIPSegDecoder):
    """CLIPSeg's; the logits, of the ViT's size, are resized to the input's (nearest, as released)."""

    def __init__(self, config):
        super().__init__(config)
        size = (config.input_size, config.input_size)
        self.transposed_convolution = nn.Sequential(self.transposed_convolution, nn.Upsample(size, mode="nearest"))


class ClipSegResNetDecoder(CLIPSegDecoder):
    """CLIPSeg's, with a reduce of its own width for every stage."""

    def __init__(self, config):
        super().__init__(config)
        widths = [4 * config.vision_config.width * 2**stage for stage in config.extract_layers]
        self.reduces = nn.ModuleList(nn.Linear(width, config.reduce_dim) for width in reversed(widths))
        self.post_init()


class ClipDeconv(CLIPSegForImageSegmentation):
    """CLIP-Deconv (paper, section 4.2; released CLIPDenseBaseline): a layer of CLIP, FiLM, an MLP, a deconvolution."""

    config: ClipDeconvConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = ClipDeconvDecoder(config)


class _Variant(CLIPSegPreTrainedModel):
    """A backbone and a decoder."""

    base_model_prefix = "backbone"
    backbone_class = decoder_class = None

    def __init__(self, config):
        super().__init__(config)
        # the decoder's blocks have a copy of this config; in CLIPSeg the vision tower sets it
        config.vision_config._attn_implementation = config._attn_implementation
        self.backbone = self.backbone_class(config)
        self.decoder = self.decoder_class(config)
        self.post_init()

    def _init_weights(self, module):
        """Of the backbone's own layers: torch's way, so that ViTSeg's random linear layer is the authors'."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
        else:
            super()._init_weights(module)
        if isinstance(module, Bottleneck):
            init.zeros_(module.bn3.weight)  # as CLIP starts
        if isinstance(module, AttentionPool):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)


class ViTSeg(_Variant):
    """ViTSeg (paper, section 4.2): CLIPSeg's decoder on a ViT trained on ImageNet (see `ImageNetViT`)."""

    config: ViTSegConfig
    backbone_class, decoder_class = ImageNetViT, ViTSegDecoder


class ClipSegResNet(_Variant):
    """CLIPSeg on a CLIP with a ModifiedResNet (see `ClipResNet`); its numbers have no counterpart in the paper."""

    config: ClipSegResNetConfig
    backbone_class, decoder_class = ClipResNet, ClipSegResNetDecoder


MODELS = {
    "clipseg": CLIPSegForImageSegmentation,
    ClipDeconvConfig.model_type: ClipDeconv,
    ViTSegConfig.model_type: ViTSeg,
    ClipSegResNetConfig.model_type: ClipSegResNet,
}


def backbone(model) -> Backbone:
    """The frozen part of any of MODELS."""
    return ClipViT(model) if isinstance(model, CLIPSegForImageSegmentation) else model.backbone


def adapted(model, kind: str):
    """`model` as one of MODELS[kind] on the same backbone; a CLIP-Deconv made of a CLIPSeg reads its deepest layer and
    is untrained.

    Raises InputError where the backbone is of another kind."""
    found = model.config.model_type
    if found == kind:
        return model
    if (found, kind) != ("clipseg", "clip-deconv"):
        raise InputError(f"the source is a '{found}' model, and this run trains a '{kind}': give a source of that kind")
    options = model.config.to_dict() | {"extract_layers": [max(model.config.extract_layers)]}
    made = ClipDeconv(
        ClipDeconvConfig(**{k: v for k, v in options.items() if k not in ("model_type", "architectures")})
    )
    made.clip = model.clip
    return made.eval()
