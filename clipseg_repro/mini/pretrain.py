"""Pre-training of the mini world's CLIP on images and captions. No mask is ever seen here.

The objective is CLIP's contrastive one, with two similarities per image and phrase: the image embedding's (CLIP) and the
best-matching patch embeddings' (FILIP, Yao et al. 2022: late interaction), so that a small model trained for minutes
carries what and where in its patch tokens as the big one does after 400 million pairs. Scenes grow from one large upright
object to the crowded scenes of the mini benchmarks (a curriculum; without it the vision tower hardly starts to learn).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    ViTImageProcessorPil,
)

from clipseg_repro.files import written_whole
from clipseg_repro.loop import fast_attention, fit
from clipseg_repro.mini.phrases import (
    Phrase,
    describe,
    general_phrases,
    name_phrases,
    tokenizer_corpus,
)
from clipseg_repro.mini.scenes import SceneRules, compose
from clipseg_repro.mini.vocabulary import load_vocabulary
from clipseg_repro.models import encode
from clipseg_repro.prompts import TRAIN_TEMPLATES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POOLING = 10.0  # sharpness of the soft maximum over patches: cosines that differ by 0.1 weigh 1 : e


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: `images` scenes of `size` pixels; rules run linearly from `first` to `last`.

    `details` adds attributes, relations and the properties of Table 8 to the captions' names.
    """

    images: int
    size: int
    first: SceneRules
    last: SceneRules
    details: bool = True

    def rules(self, progress: float) -> SceneRules:
        def mix(a, b):
            return a + (b - a) * progress

        a, b = self.first, self.last
        return replace(
            b,
            objects=(1, round(mix(a.objects[1], b.objects[1]))),
            scale=(mix(a.scale[0], b.scale[0]), mix(a.scale[1], b.scale[1])),
            max_angle=mix(a.max_angle, b.max_angle),
        )


def _rules(size: int, most: int, scale: tuple[float, float], angle: float) -> SceneRules:
    wide = round(size * 1.2)
    return SceneRules(
        sizes=((size, size), (size, size), (size, wide), (wide, size)), objects=(1, most), scale=scale, max_angle=angle
    )


@dataclass(frozen=True)
class Cycle:
    """One cycle of the learning rate over some stages: up in `warm_up` steps, level at `peak` (1 for the optimisers' own
    rates), and linearly to zero over the last share `decay` of the steps."""

    stages: tuple[Stage, ...]
    batch: int
    peak: float
    warm_up: int
    decay: float

    @property
    def steps(self) -> int:
        return sum(stage.images for stage in self.stages) // self.batch

    def rate(self, step: int) -> float:
        return self.peak * min((step + 1) / self.warm_up, 1.0, (self.steps - step) / (self.decay * self.steps))

    def shortened(self, budget: float) -> "Cycle":
        """The same with `budget` times the images, whole batches of every stage."""
        stages = (replace(s, images=max(1, round(s.images * budget / self.batch)) * self.batch) for s in self.stages)
        return replace(self, stages=tuple(stages))


# About 80 minutes on two cores. First from nothing to scenes, names before details: captions with details before the
# towers agree on names slow everything down. Then at full size, gently: a second start at the full rate forgets the first.
CYCLES = (
    Cycle(
        (
            Stage(80_000, 56, _rules(56, 1, (0.75, 0.97), 5), _rules(56, 1, (0.6, 0.97), 20), details=False),
            Stage(32_000, 56, _rules(56, 1, (0.6, 0.97), 20), _rules(56, 2, (0.45, 0.9), 25)),
            Stage(56_000, 80, _rules(80, 2, (0.4, 0.9), 25), _rules(80, 3, (0.28, 0.75), 25)),
            Stage(16_000, 112, _rules(112, 3, (0.22, 0.7), 25), _rules(112, 5, (0.2, 0.6), 25)),
        ),
        batch=64, peak=1.0, warm_up=200, decay=0.4,
    ),
    Cycle(
        (Stage(76_800, 112, _rules(112, 4, (0.22, 0.65), 25), _rules(112, 5, (0.2, 0.6), 25)),),
        batch=32, peak=0.3, warm_up=50, decay=1.0,
    ),
)  # fmt: skip


LAST = CYCLES[-1].stages[-1]


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, trained on the mini world's words."""
    corpus = [template.format(text) for text in tokenizer_corpus() for template in ("{}", *TRAIN_TEMPLATES)]
    tokenizer = CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=2000)
    tokenizer.model_max_length = 32
    return tokenizer


def build_processor() -> CLIPSegProcessor:
    size = {"height": 112, "width": 112}
    images = ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD)
    return CLIPSegProcessor(images, build_tokenizer())


def build_model(tokenizer: CLIPTokenizer) -> CLIPSegForImageSegmentation:
    """An untrained mini CLIPSeg: ViT of 8-pixel patches, width 192, depth 6; text tower of width 128, depth 3."""
    config = CLIPSegConfig(
        vision_config=dict(
            hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=112,
            patch_size=8, hidden_act="gelu",
        ),
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=32, hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        projection_dim=128, extract_layers=[1, 3, 5], reduce_dim=64, decoder_num_attention_heads=4,
        decoder_intermediate_size=512,
    )  # fmt: skip
    return CLIPSegForImageSegmentation(config)


class CaptionedScenes(Dataset):
    """Item i is (image (3, S, S) float32, objects (N, 3) int64: kind, colour, size, and true phrases), given the seed."""

    def __init__(self, stages: tuple[Stage, ...], seed: int):
        self.stages, self.seed = stages, seed

    def __len__(self) -> int:
        return sum(stage.images for stage in self.stages)

    def __getitem__(self, i: int):
        rng = np.random.default_rng([self.seed, i])
        start = 0
        for stage in self.stages:
            if i < start + stage.images:
                break
            start += stage.images
        scene = compose(rng, stage.rules((i - start) / stage.images))
        image = cv2.resize(scene.image, (stage.size, stage.size), interpolation=cv2.INTER_AREA)
        phrases = [p for j in range(len(scene.objects)) for p in self._captions(rng, scene, j, stage.details)]
        templated = rng.random(len(phrases)) < (0.5 if stage.details else 0.0)
        texts = [
            TRAIN_TEMPLATES[rng.integers(len(TRAIN_TEMPLATES))].format(p.text) if t else p.text
            for p, t in zip(phrases, templated, strict=True)
        ]
        objects = [(o.kind, _code(o.colour, COLOUR_CODES), _code(o.size, SIZE_CODES)) for o in scene.objects]
        return image, np.array(objects, np.int64).reshape(-1, 3), phrases, texts

    @staticmethod
    def _captions(rng, scene, index: int, details: bool) -> list[Phrase]:
        chosen = [describe(rng, scene, index, "category")]
        if not details:
            return chosen
        if rng.random() < 0.6:
            chosen.append(describe(rng, scene, index, "attribute"))
        if rng.random() < 0.25:
            chosen.append(describe(rng, scene, index, "relation"))
        if rng.random() < 0.3:
            kind = scene.objects[index].kind
            general = [p for p in general_phrases() if kind in p.kinds]
            chosen.append(general[rng.integers(len(general))])
        return [p for p in chosen if p is not None]


COLOUR_CODES = {"red": 1, "orange": 2, "yellow": 3, "green": 4, "blue": 5, "purple": 6, "pink": 7, "brown": 8}
SIZE_CODES = {"small": 1, "large": 2}


def _code(value: str | None, codes: dict[str, int]) -> int:
    return codes[value] if value else 0


def _normalised(images: list[np.ndarray]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def fresh_scenes(rules: SceneRules, size: int, scenes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised scenes (N, 3, S, S) that no stage shows, and the kind of each 8-pixel patch (N, patches).

    A patch less than 70% inside an object has kind -1.
    """
    images, labels = [], []
    for i in range(scenes):
        scene = compose(np.random.default_rng([987, i]), rules)
        images.append(cv2.resize(scene.image, (size, size), interpolation=cv2.INTER_AREA))
        grid = np.full((size // 8, size // 8), -1)
        for thing in scene.objects:
            share = cv2.resize(thing.mask.astype(np.float32), grid.shape, interpolation=cv2.INTER_AREA)
            grid[share > 0.7] = thing.kind
        labels.append(grid)
    return _normalised(images), torch.from_numpy(np.stack(labels)).flatten(1)


def collate(items: list) -> tuple[torch.Tensor, np.ndarray, np.ndarray, list[Phrase], list[int], list[str]]:
    """Images (B, 3, S, S) normalised, objects (N, 3), their images (N,), phrases (P), their images (P), texts (P)."""
    images = _normalised([item[0] for item in items])
    objects = np.concatenate([item[1] for item in items])
    owners = np.concatenate([np.full(len(item[1]), b) for b, item in enumerate(items)])
    phrases = [p for item in items for p in item[2]]
    sources = [b for b, item in enumerate(items) for _ in item[2]]
    return images, objects, owners, phrases, sources, [t for item in items for t in item[3]]


def truth(objects, owners, phrases, sources, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which phrase is true of which image: (true, unknown), both (images, P) bool.

    A relation is known for the image it was said of; elsewhere it is false without its kinds and unknown otherwise.
    """
    kinds = np.zeros((len(phrases), len(load_vocabulary())), bool)
    for row, phrase in zip(kinds, phrases):
        row[list(phrase.kinds)] = True
    colours = np.array([_code(p.colour, COLOUR_CODES) for p in phrases])
    sizes = np.array([_code(p.size, SIZE_CODES) for p in phrases])
    holds = kinds[:, objects[:, 0]].T
    holds &= (colours == 0) | (colours == objects[:, 1:2])
    holds &= (sizes == 0) | (sizes == objects[:, 2:3])
    true = np.zeros((images, len(phrases)), bool)
    np.logical_or.at(true, owners, holds)
    unknown = true & np.array([p.relation is not None for p in phrases])
    said = np.array(sources) >= 0
    own = np.array(sources)[said], np.nonzero(said)[0]
    unknown[own], true[unknown] = False, False
    true[own] = True
    return torch.from_numpy(true), torch.from_numpy(unknown)


def contrast(similarity: torch.Tensor, true: torch.Tensor, unknown: torch.Tensor) -> torch.Tensor:
    """Symmetric contrastive loss with several positives: each true pair against the false ones of its row and column."""
    false = similarity.masked_fill(true | unknown, -1e4)
    rows, columns = true.nonzero(as_tuple=True)
    pairs = similarity[rows, columns]
    by_image = torch.logaddexp(pairs, false.logsumexp(1)[rows]) - pairs
    by_phrase = torch.logaddexp(pairs, false.logsumexp(0)[columns]) - pairs
    return (by_image.mean() + by_phrase.mean()) / 2


def embed_patches(clip, pixel_values: torch.Tensor) -> torch.Tensor:
    """CLIP embeddings of all tokens, (B, 1 + patches, projection) of unit length; token 0 is the image's own."""
    tokens = clip.vision_model(pixel_values=pixel_values).last_hidden_state
    return F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(tokens)).float(), dim=-1)


def embed_texts(clip, tokenizer, texts: list[str]) -> torch.Tensor:
    """CLIP embeddings of texts, (P, projection) of unit length."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(clip.logit_scale.device)
    return F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)


def similarities(clip, tokens: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled similarities (B, P) of images and texts: by image embedding, and by the soft maximum over patches."""
    scale = clip.logit_scale.clamp(max=4.6).exp()
    cosines = tokens[:, 1:] @ texts.T
    pooled = (torch.logsumexp(cosines * POOLING, 1) - np.log(cosines.shape[1])) / POOLING
    return scale * tokens[:, 0] @ texts.T, scale * pooled


def optimisers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the towers' blocks, AdamW for everything else."""
    hidden = {n: p for n, p in model.named_parameters() if ".encoder." in n and p.ndim == 2}
    rest = [p for n, p in model.named_parameters() if n not in hidden]
    return {
        "muon": torch.optim.Muon(hidden.values(), lr=0.02, weight_decay=0.01),
        "adamw": torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    }


def pretrain(folder: Path, seed: int = 0, budget: float = 1.0, device: str = "cpu") -> CLIPSegForImageSegmentation:
    """Pre-train the mini CLIP and save it as a `transformers` folder in `folder/model` (its decoder is untrained).

    `budget` scales the number of images of every stage (1.0: about 80 minutes on two cores). The curve is in
    `folder/curve.csv`; every cycle has a folder of its own there, with its checkpoint. Resumes exactly.
    """
    torch.manual_seed(seed)
    folder = Path(folder)
    stored = folder / "processor"  # kept: the trainer of the tokenizer breaks ties differently in every process
    if not (stored / "tokenizer.json").exists():
        build_processor().save_pretrained(stored)
    processor = CLIPSegProcessor.from_pretrained(stored)
    model = build_model(processor.tokenizer).to(device)
    curves = []
    with fast_attention(model.clip):
        for number, cycle in enumerate(CYCLES, start=1):
            curve = _run_cycle(model, processor, folder / f"cycle-{number}", cycle.shortened(budget), seed)
            for column in ("step", "seconds"):  # on from the cycle before
                curve[column] += curves[-1][column].iloc[-1] if curves else 0
            curves.append(curve)
    with written_whole(folder / "curve.csv") as temporary:
        pd.concat(curves).round(5).to_csv(temporary, index=False)
    rescale(model, fresh_scenes(LAST.last, LAST.size, 64)[0].to(device))
    model.save_pretrained(folder / "model")
    # A fresh one: tokenizing has left its truncation in the other.
    CLIPSegProcessor.from_pretrained(stored).save_pretrained(folder / "model")
    return model


def _run_cycle(model, processor, folder: Path, cycle: Cycle, seed: int) -> pd.DataFrame:
    clip, device, size = model.clip, model.device, cycle.batch
    scenes = CaptionedScenes(cycle.stages, seed)
    optimiser = optimisers(clip)
    rates = {key: o.param_groups[0]["lr"] for key, o in optimiser.items()}
    names = list(name_phrases())

    def batches(first: int):
        order = range(first * size, len(scenes))
        return DataLoader(scenes, size, sampler=order, collate_fn=collate, num_workers=1, prefetch_factor=8)

    def step(i: int, batch) -> dict[str, torch.Tensor]:
        images, objects, owners, phrases, sources, texts = batch
        # Every name is a candidate for every image: negatives for all, and the text tower meets each name in each step.
        true, unknown = truth(objects, owners, phrases + names, sources + [-1] * len(names), len(images))
        true, unknown = true.to(device), unknown.to(device)
        for key, o in optimiser.items():
            o.param_groups[0]["lr"] = rates[key] * cycle.rate(i)
        with torch.autocast(device.type, torch.bfloat16):
            tokens = embed_patches(clip, images.to(device))
            # Apart, because together the short names would be padded to the longest caption.
            words = [embed_texts(clip, processor.tokenizer, t) for t in (texts, [p.text for p in names])]
        whole, local = similarities(clip, tokens, torch.cat(words))
        losses = {"image": contrast(whole, true, unknown), "patch": contrast(local, true, unknown)}
        (losses["image"] + losses["patch"]).backward()
        for o in optimiser.values():
            o.step()
            o.zero_grad(set_to_none=True)
        return losses

    return fit(
        f"mini CLIP, {folder.name}", folder, batches, step, cycle.steps, {"model": model, **optimiser},
        {"seed": seed} | asdict(cycle), validate=lambda: probe(model, processor), every=min(300, cycle.steps),
    )  # fmt: skip


@torch.no_grad()
def rescale(model: CLIPSegForImageSegmentation, pixel_values: torch.Tensor):
    """Scale the vision tower's residual stream so that its deepest activations have unit variance on `pixel_values`.

    Every block reads the stream through a layer norm, so CLIP's embeddings stay as they are; but Muon lets the stream grow
    to tens of units, and a decoder that reads it with fresh weights would drown in it.
    """
    *_, deepest = encode(model, pixel_values)
    vision, factor = model.clip.vision_model, 1 / deepest.std()
    writers = [w for block in vision.encoder.layers for w in (block.self_attn.out_proj, block.mlp.fc2)]
    for module in (vision.pre_layrnorm, *writers):
        module.weight.mul_(factor)
        module.bias.mul_(factor)


@torch.inference_mode()
def probe(model: CLIPSegForImageSegmentation, processor: CLIPSegProcessor, scenes: int = 256) -> dict[str, float]:
    """Zero-shot accuracy on fresh scenes of the last stage, against all canonical names.

    `top1`: share of single-object images whose embedding is nearest to the right name. `patch_top1`: share of patches
    more than 70% inside an object whose embedding is nearest to that object's name (MaskCLIP's reading of the tokens).
    """
    model.eval()
    clip, device = model.clip, model.device
    with torch.autocast(device.type, torch.bfloat16):
        names = embed_texts(clip, processor.tokenizer, [f"a photo of a {k.name}." for k in load_vocabulary()]).cpu()
    size = LAST.size
    result = {}
    for key, rules in {"top1": _rules(size, 1, (0.5, 0.8), 25), "patch_top1": LAST.last}.items():
        pixels, labels = fresh_scenes(rules, size, scenes)
        with torch.autocast(device.type, torch.bfloat16):
            tokens = torch.cat([embed_patches(clip, part) for part in pixels.to(device).split(64)]).cpu()
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
