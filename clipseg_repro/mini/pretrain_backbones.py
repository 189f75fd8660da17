"""The mini world's other backbones: a CLIP with a ModifiedResNet, and a ViT that saw labels only, as on ImageNet."""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from clipseg_repro.devices import mixed_precision
from clipseg_repro.mini.curriculum import CYCLES, FINE
from clipseg_repro.mini.pretrain import (
    build_model,
    enlarged,
    optimisers,
    pretrain,
    probe_scenes,
    rescale,
    run_cycles,
)
from clipseg_repro.mini.vocabulary import load_vocabulary
from clipseg_repro.models.loading import load_model
from clipseg_repro.models.variants import ClipSegResNet, ClipSegResNetConfig, ViTSeg, ViTSegConfig
from clipseg_repro.prompts import RELEASED_SIZE

SHARE = 0.1  # of the mini CLIP's images, so of its hours


def build_resnet(tokenizer: CLIPTokenizer) -> ClipSegResNet:
    """An untrained mini CLIPSeg on a ModifiedResNet: three stages of two blocks, the last two on the mini ViT's 14 x 14
    grid at 112 px; all else as the mini CLIPSeg has it."""
    base = build_model(tokenizer).config
    vision = dict(
        stages=[2, 2, 2],
        strides=[1, 2, 1],
        width=32,
        hidden_size=512,
        num_attention_heads=8,
        image_size=112,
        patch_size=8,
    )
    return ClipSegResNet(ClipSegResNetConfig(**_settings(base), vision_config=vision, extract_layers=[0, 1, 2]))


def pretrain_vit(folder: Path, seed: int = 0, budget: float = SHARE) -> ViTSeg:
    """Train a mini ViT to name the kinds in a scene (multi-label), and save it in `folder/model` as a ViTSeg whose text
    tower is the mini CLIP's and whose decoder is untrained. Curves, checkpoints and `budget` as of `pretrain`."""
    folder = Path(folder)
    source, processor = load_model("mini")
    base = build_model(processor.tokenizer).config
    vision = base.vision_config.to_dict() | {"layer_norm_eps": 1e-6}
    options = _settings(base) | {"extract_layers": base.extract_layers}
    torch.manual_seed(seed)
    model = ViTSeg(ViTSegConfig(**options, vision_config=vision, input_size=vision["image_size"]))
    words = {k: v for k, v in source.clip.state_dict().items() if k.startswith("text_")}
    model.backbone.load_state_dict(words, strict=False)
    head = nn.Linear(vision["hidden_size"], len(load_vocabulary()))
    _train_labels("mini ViT", folder / "small", model, head, CYCLES, seed, budget)
    model = enlarged(model)
    _train_labels(f"mini ViT, {RELEASED_SIZE} px", folder, model, head, FINE, seed, budget, mean=True)
    rescale(model.eval(), probe_scenes(model, 64)[0])
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return model


def _train_labels(name, folder: Path, model: ViTSeg, head: nn.Linear, cycles, seed: int, budget: float, mean=False):
    vit = model.backbone.vit
    trained = nn.ModuleDict({"vit": vit, "head": head})

    def classify(pixels):
        with mixed_precision(pixels.device):
            tokens = vit(pixels, interpolate_pos_encoding=True).last_hidden_state
            return head(tokens[:, 0]).float()

    def losses(batch) -> dict[str, torch.Tensor]:
        images, objects, owners, *_ = batch
        shown = torch.zeros(len(images), head.out_features)
        shown[torch.from_numpy(owners), torch.from_numpy(objects[:, 0])] = 1
        # Summed over kinds: the mean of so many easy negatives would hardly move the weights.
        return {"label": F.binary_cross_entropy_with_logits(classify(images), shown, reduction="sum") / len(images)}

    @torch.inference_mode()
    def probe() -> dict[str, float]:
        """`top1`: share of fresh scenes whose most probable kind is among those that fill a patch."""
        pixels, labels = probe_scenes(model, 256)
        guess = torch.cat([classify(part).argmax(1) for part in pixels.split(32)])
        shown = (labels >= 0).any(1)
        return {"top1": round((labels == guess[:, None]).any(1)[shown].float().mean().item(), 4)}

    optimise = partial(optimisers, trained)
    run_cycles(name, folder, cycles, seed, budget, trained, optimise, losses, probe, attention=vit, mean=mean)


def _settings(config):
    """What a mini model shares with the mini CLIPSeg of that `config`."""
    names = ("text_config", "projection_dim", "reduce_dim", "decoder_num_attention_heads", "decoder_intermediate_size")
    return {name: config.to_dict()[name] for name in names}


PRETRAINING = {
    "mini-clip": pretrain,
    "mini-resnet-clip": partial(pretrain, budget=SHARE, build=build_resnet, name="mini ResNet CLIP"),
    "mini-vit": pretrain_vit,
}
