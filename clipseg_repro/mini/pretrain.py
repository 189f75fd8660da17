"""Pre-training of the mini world's CLIP on images and captions. No mask is ever seen here.

The objective is CLIP's contrastive one, with two similarities per image and phrase: the image embedding's (CLIP) and
the best-matching patch embeddings' (FILIP, Yao et al. 2022: late interaction), so that a small model trained for hours
carries what and where in its patch tokens as the big one does after 400 million pairs. A third loss, on words alone,
draws every phrase to the names of what it asks for. Scenes grow from one large upright object to the crowded scenes of
the mini benchmarks (a curriculum; without it the vision tower hardly starts to learn).
"""

import math
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from clipseg_repro.devices import mixed_precision
from clipseg_repro.files import written_whole
from clipseg_repro.mini.curriculum import (
    CYCLES,
    FINE,
    CaptionedScenes,
    Cycle,
    collate,
    fresh_scenes,
    truth,
)
from clipseg_repro.mini.phrases import name_phrases, tokenizer_corpus
from clipseg_repro.mini.scenes import SceneRules
from clipseg_repro.mini.vocabulary import load_vocabulary
from clipseg_repro.models.forward import encode
from clipseg_repro.models.loading import load_model
from clipseg_repro.models.variants import backbone
from clipseg_repro.prompts import IMAGENET_MEAN, IMAGENET_STD, RELEASED_SIZE, TRAIN_TEMPLATES
from clipseg_repro.training.loop import fast_attention, fit, loader_workers
from clipseg_repro.training.muon import Muon

POOLING = 10.0  # sharpness of the soft maximum over patches: cosines that differ by 0.1 weigh 1 : e


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, trained on the mini world's words."""
    corpus = [template.format(text) for text in tokenizer_corpus() for template in ("{}", *TRAIN_TEMPLATES)]
    tokenizer = CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=2000)
    tokenizer.model_max_length = 32
    return tokenizer


def build_processor() -> CLIPSegProcessor:
    size = {"height": 112, "width": 112}
    images = ViTImageProcessorPil(size=size, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    return CLIPSegProcessor(images, build_tokenizer())


def build_model(tokenizer: CLIPTokenizer) -> CLIPSegForImageSegmentation:
    """An untrained mini CLIPSeg: ViT of 8-pixel patches, width 192, depth 6; text tower of width 128, depth 3."""
    config = CLIPSegConfig(
        vision_config=dict(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=3,
            image_size=112,
            patch_size=8,
            hidden_act="gelu",
        ),
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=32,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        projection_dim=128,
        extract_layers=[1, 3, 5],
        reduce_dim=64,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=512,
    )
    return CLIPSegForImageSegmentation(config)


def contrast(similarity: torch.Tensor, true: torch.Tensor, unknown: torch.Tensor) -> torch.Tensor:
    """Symmetric contrastive loss with several positives: a true pair against the false ones of its row and column."""
    false = similarity.masked_fill(true | unknown, -1e4)
    rows, columns = true.nonzero(as_tuple=True)
    pairs = similarity[rows, columns]
    by_image = torch.logaddexp(pairs, false.logsumexp(1)[rows]) - pairs
    by_phrase = torch.logaddexp(pairs, false.logsumexp(0)[columns]) - pairs
    return (by_image.mean() + by_phrase.mean()) / 2


def embed_patches(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """CLIP embeddings of all tokens, (B, 1 + patches, projection) of unit length; token 0 is the image's own."""
    return F.normalize(backbone(model).embed_tokens(pixel_values).float(), dim=-1)


def embed_texts(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """CLIP embeddings of texts, (P, projection) of unit length."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return F.normalize(backbone(model).embed_texts(**tokens).float(), dim=-1)


def logit_scale(model) -> torch.Tensor:
    """CLIP's learned factor of cosines, at most 100."""
    return model.base_model.logit_scale.clamp(max=4.6).exp()


def similarities(model, tokens: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled similarities (B, P) of images and texts: by image embedding, and by the soft maximum over patches."""
    scale = logit_scale(model)
    cosines = tokens[:, 1:] @ texts.T
    pooled = (torch.logsumexp(cosines * POOLING, 1) - np.log(cosines.shape[1])) / POOLING
    return scale * tokens[:, 0] @ texts.T, scale * pooled


def optimisers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the towers' blocks, AdamW for everything else."""
    hidden = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    rest = [p for n, p in model.named_parameters() if n not in hidden]
    return {
        "muon": Muon(hidden.values(), lr=0.02, weight_decay=0.01),
        "adamw": torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    }


def pretrain(
    folder: Path,
    seed: int = 0,
    budget: float = 1.0,
    device: str = "cpu",
    build=build_model,
    name: str = "mini CLIP",
    source: str | Path | None = None,
) -> PreTrainedModel:
    """Pre-train the mini CLIP and save it as a `transformers` folder in `folder/model` (its decoder is untrained).

    First from nothing, at 112 px, in `folder/small`; then, `enlarged`, at the paper's geometry. With `source`, a model
    that the first part made, only the second. `budget` scales the number of images of every stage (1.0: less than four
    hours on two cores with bfloat16 units, and two more on any two). Curves are in `curve.csv` of both folders; every
    cycle has a folder of its own there, with its checkpoint. Resumes exactly. `build(tokenizer)` gives the untrained
    model, one of variants.MODELS with a CLIP in it.
    """
    folder = Path(folder)
    if source is None:
        torch.manual_seed(seed)
        stored = folder / "small" / "processor"  # kept: the tokenizer's trainer breaks ties differently in each process
        if not (stored / "tokenizer.json").exists():
            build_processor().save_pretrained(stored)
        processor = CLIPSegProcessor.from_pretrained(stored)
        model = build(processor.tokenizer)
        _train(name, folder / "small", model, processor, CYCLES, seed, budget, device)
        source = folder / "small" / "model"
    model, processor = load_model(source)
    if model.config.model_type == "clipseg":  # undo `rescale`: Muon's steps are of one size for all matrices
        scale_stream(model, 1 / model.clip.vision_model.pre_layrnorm.weight.mean())
    torch.manual_seed(seed)
    model = enlarged(model)
    processor.image_processor.size = {"height": RELEASED_SIZE, "width": RELEASED_SIZE}
    _train(f"{name}, {RELEASED_SIZE} px", folder, model, processor, FINE, seed, budget, device, mean=True)
    return model


def _train(name, folder: Path, model, processor, cycles, seed: int, budget: float, device: str, mean: bool = False):
    model.to(device).train()
    names = list(name_phrases())
    untouched = deepcopy(processor)  # tokenizing leaves its truncation in the other

    def losses(batch) -> dict[str, torch.Tensor]:
        images, objects, owners, phrases, sources, said, texts = batch
        # "cat left of the dog" and "dog right of the cat" are true of the same images: only words tell what is meant.
        named = torch.tensor([[name.kinds <= phrase.kinds for name in names] for phrase in phrases], device=device)
        # Every name is a candidate for every image: negatives for all, and the text tower meets each name in each step.
        phrases, sources, said = phrases + names, sources + [-1] * len(names), said + [False] * len(names)
        true, unknown = truth(objects, owners, phrases, sources, said, len(images))
        true, unknown = true.to(device), unknown.to(device)
        with mixed_precision(model.device):
            tokens = embed_patches(model, images.to(device))
            # Apart, because together the short names would be padded to the longest caption.
            words = [embed_texts(model, processor.tokenizer, t) for t in (texts, [p.text for p in names])]
        whole, local = similarities(model, tokens, torch.cat(words))
        heads = logit_scale(model) * words[0] @ words[1].T
        return {
            "image": contrast(whole, true, unknown),
            "patch": contrast(local, true, unknown),
            "head": contrast(heads, named, torch.zeros_like(named)),
        }

    run_cycles(
        name,
        folder,
        cycles,
        seed,
        budget,
        model,
        lambda: optimisers(model.base_model),
        losses,
        lambda: probe(model, processor),
        attention=model.base_model,
        mean=mean,
    )
    if model.config.model_type == "clipseg":  # batch norm keeps a ResNet's activations in range
        rescale(model, probe_scenes(model, 64)[0].to(device))
    model.save_pretrained(folder / "model")
    untouched.save_pretrained(folder / "model")
    return model


def enlarged(model: PreTrainedModel) -> PreTrainedModel:
    """A mini model at the paper's geometry: 352 px and patches twice the size; its decoder, with the refined head, is
    untrained.

    On a picture whose pixels are repeated 2 x 2, all is embedded as before: the first kernel is repeated 2 x 2 and
    divided by 4 (so is a ResNet's, whose stride doubles). Positions are interpolated bicubically.
    """
    config = deepcopy(model.config)
    vision = config.vision_config
    vision.image_size, vision.patch_size = RELEASED_SIZE, 2 * vision.patch_size
    if hasattr(vision, "stem"):
        vision.stem *= 2
    if hasattr(config, "input_size"):
        config.input_size = RELEASED_SIZE
    config.use_complex_transposed_convolution = True
    made = type(model)(config)
    wanted = made.state_dict()
    towers = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    made.load_state_dict({name: _resized(value, wanted[name].shape) for name, value in towers.items()}, strict=False)
    return made


def _resized(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A kernel (O, I, k, k) or positions ([1,] 1 + side**2, width) in the larger `shape`."""
    if weight.shape == shape:
        return weight
    if weight.ndim == 4:
        return weight.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    rows = weight.view(-1, shape[-1])
    before, after = (math.isqrt(n - 1) for n in (len(rows), shape[-2]))
    grid = F.interpolate(rows[1:].T.view(1, -1, before, before), (after, after), mode="bicubic")
    return torch.cat([rows[:1], grid[0].flatten(1).T]).view(shape)


def run_cycles(
    name,
    folder: Path,
    cycles,
    seed: int,
    budget: float,
    model: nn.Module,
    optimise,
    losses,
    probe,
    attention,
    mean: bool = False,
):
    """Train `model` in `cycles`, `budget` times as long; the curve is in `folder/curve.csv`. Resumes exactly.

    optimise() gives the optimisers by name, fresh ones for every cycle; losses(batch) the losses by name, whose sum is
    minimised; probe() what the curve shows besides. `attention`: the module whose attention is trained. `mean`: end
    with the mean of the weights after each cycle (Izmailov et al. 2018), which the curve's last row shows; a text tower
    keeps the last ones.
    """
    curves, ends = [], []
    with fast_attention(attention):
        for number, cycle in enumerate(cycles, start=1):
            own = seed + number - 1  # every cycle has scenes of its own
            part = (f"{name}, cycle-{number}", folder / f"cycle-{number}", cycle.shortened(budget), own)
            curve = _run_cycle(*part, model, optimise(), losses, probe)
            for column in ("step", "seconds"):  # on from the cycle before
                curve[column] += curves[-1][column].iloc[-1] if curves else 0
            curves.append(curve)
            ends.append(deepcopy(model.state_dict()))
    if mean:
        seen = [key for key, value in ends[-1].items() if "text_" not in key and value.is_floating_point()]
        model.load_state_dict(ends[-1] | {key: torch.stack([end[key] for end in ends]).mean(0) for key in seen})
        for column, value in probe().items():
            curves[-1].loc[curves[-1].index[-1], column] = value
    with written_whole(folder / "curve.csv") as temporary:
        pd.concat(curves).round(5).to_csv(temporary, index=False)


def _run_cycle(name, folder: Path, cycle: Cycle, seed: int, model, optimiser, losses, probe) -> pd.DataFrame:
    size, scenes = cycle.batch, CaptionedScenes(cycle.stages, seed)
    rates = {key: o.param_groups[0]["lr"] for key, o in optimiser.items()}

    def batches(first: int):
        order = range(first * size, len(scenes))
        workers = loader_workers()
        return DataLoader(scenes, size, sampler=order, collate_fn=collate, num_workers=workers, prefetch_factor=8)

    def step(i: int, batch) -> dict[str, torch.Tensor]:
        for key, o in optimiser.items():
            o.param_groups[0]["lr"] = rates[key] * cycle.rate(i)
        found = losses(batch)
        sum(found.values()).backward()
        for o in optimiser.values():
            o.step()
            o.zero_grad(set_to_none=True)
        return found

    return fit(
        name,
        folder,
        batches,
        step,
        cycle.steps,
        {"model": model, **optimiser},
        {"seed": seed} | asdict(cycle),
        validate=probe,
        every=min(150, cycle.steps),
    )


@torch.no_grad()
def rescale(model: PreTrainedModel, pixel_values: torch.Tensor):
    """Scale a ViT's residual stream so that its deepest activations have unit variance on `pixel_values`.

    Every block reads the stream through a layer norm, so embeddings stay as they are; but Muon lets the stream grow
    to tens of units, and a decoder that reads it with fresh weights would drown in it.
    """
    *_, deepest = encode(model, pixel_values)
    scale_stream(model, 1 / deepest.std())


@torch.no_grad()
def scale_stream(model: PreTrainedModel, factor: float | torch.Tensor):
    """Multiply all that writes to a ViT's residual stream by `factor`."""
    for parameter in _stream_writers(model):
        parameter.mul_(factor)


def _stream_writers(model) -> list[nn.Parameter]:
    if model.config.model_type == "vitseg":
        vit = model.backbone.vit
        start = [*vit.embeddings.parameters()]
        writers = [w for block in vit.layers for w in (block.attention.o_proj, block.mlp.fc2)]
    else:
        vision = model.clip.vision_model
        start = [*vision.pre_layrnorm.parameters()]
        writers = [w for block in vision.encoder.layers for w in (block.self_attn.out_proj, block.mlp.fc2)]
    return start + [parameter for writer in writers for parameter in writer.parameters()]


def probe_scenes(model: PreTrainedModel, scenes: int, rules: SceneRules | None = None):
    """`fresh_scenes` of the mini benchmarks (`rules` None) for a model's input and patches."""
    vision = model.config.vision_config
    return fresh_scenes(rules or SceneRules(), vision.image_size, vision.patch_size, scenes)


@torch.inference_mode()
def probe(model: PreTrainedModel, processor: CLIPSegProcessor, scenes: int = 256) -> dict[str, float]:
    """Zero-shot accuracy on fresh scenes, against all canonical names.

    `top1`: share of single-object images whose embedding is nearest to the right name. `patch_top1`: share of patches
    more than 70% inside an object whose embedding is nearest to that object's name (MaskCLIP's reading of the tokens).
    """
    model.eval()
    device = model.device
    with mixed_precision(device):
        names = embed_texts(model, processor.tokenizer, [f"a photo of a {k.name}." for k in load_vocabulary()]).cpu()
    result = {}
    for key, rules in {"top1": SceneRules(objects=(1, 1), scale=(0.5, 0.8)), "patch_top1": SceneRules()}.items():
        pixels, labels = probe_scenes(model, scenes, rules)
        with mixed_precision(device):
            tokens = torch.cat([embed_patches(model, part) for part in pixels.to(device).split(32)]).cpu()
        if key == "top1":
            kinds = labels.amax(1)
            guess = (tokens[:, 0] @ names.T).argmax(-1)
            right = (guess == kinds)[kinds >= 0]
        else:
            guess = (tokens[:, 1:] @ names.T).argmax(-1)
            right = (guess == labels)[labels >= 0]
        result[key] = round(right.float().mean().item(), 4)
    model.train()
    return result
