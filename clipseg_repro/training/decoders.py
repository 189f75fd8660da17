"""Training of decoders on a frozen CLIP: the runs of `experiments.yaml`, on accelerate."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, PartialState
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from clipseg_repro.datasets.phrasecut import PhraseCut, PhraseCutPlus, TrainingSample
from clipseg_repro.devices import fast_dtype
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.metrics import SegmentationMetrics
from clipseg_repro.models.forward import decode, embed_images, embed_texts, encode
from clipseg_repro.models.loading import load_model
from clipseg_repro.models.variants import adapted, backbone
from clipseg_repro.prompts import prepare, to_pixels
from clipseg_repro.segmenter import Segmenter
from clipseg_repro.training.loop import fast_attention, fit, writing

ALIGN_ON = 64  # training images that `align_film` looks at


@cache
def experiments() -> dict[str, dict]:
    """All runs of `experiments.yaml` by name, their defaults filled in."""
    table = yaml.safe_load((files(__package__) / "experiments.yaml").read_text(encoding="utf-8"))
    defaults = table.pop("defaults")
    return {name: defaults | (own or {}) for name, own in table.items()}


@dataclass
class Batch:
    """Query crops, and for each of N prompts: which query it is put to, its words, example, mixture and truth.

    pixels: (B, 3, S, S). rows: (N,) indices into B. texts: N. supports: (M, 3, S, S) for the prompts `supported` (M,)
    in N. weights: (N,) share of the text. masks: (N, S, S) float.
    """

    pixels: torch.Tensor
    rows: torch.Tensor
    texts: list[str]
    supports: torch.Tensor
    supported: torch.Tensor
    weights: torch.Tensor
    masks: torch.Tensor


class _Draws(Dataset):
    """The n-th draw of a training run."""

    def __init__(self, data: PhraseCutPlus, draws: int):
        self.data, self.draws = data, draws

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, n: int) -> list[TrainingSample]:
        return self.data[self.data.key(n)]


class _Collate:
    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, draws: list[list[TrainingSample]]) -> Batch:
        pixels = to_pixels([draw[0].image for draw in draws], self.image_processor)
        samples = [sample for draw in draws for sample in draw]
        masks = [torch.tensor(sample.mask, dtype=torch.float32)[None, None] for sample in samples]
        supported = [i for i, s in enumerate(samples) if s.support]
        supports = [prepare(samples[i].support, self.image_processor)[0] for i in supported]
        return Batch(
            pixels=pixels,
            rows=torch.tensor([row for row, draw in enumerate(draws) for _ in draw]),
            texts=[s.text for s in samples],
            supports=torch.stack(supports) if supports else pixels[:0],
            supported=torch.tensor(supported, dtype=torch.long),
            weights=torch.tensor([s.text_weight for s in samples]),
            masks=torch.cat([F.interpolate(mask, pixels.shape[-2:])[0] for mask in masks]),
        )


def conditions(model, processor, batch: Batch) -> torch.Tensor:
    """The mixed conditions (N, P) of a batch: text * weight + visual * (1 - weight)."""
    text = embed_texts(model, processor, batch.texts).float()
    visual = text.clone()
    if len(batch.supported):
        embedded = embed_images(model, batch.supports.to(model.device, model.dtype)).float()
        visual[batch.supported.to(model.device)] = embedded
    weights = batch.weights.to(model.device)[:, None]
    return weights * text + (1 - weights) * visual


def train(
    run: str,
    root: Path,
    folder: Path,
    source: str = "mini",
    seed: int = 0,
    validate_on: int = 100,
    **budget,
):
    """Train a fresh decoder for `run` on the PhraseCut data in `root` and save the model to `folder/model`.

    `source` gives CLIP, or whatever backbone the run's model has (its decoder is replaced). `budget` overrides settings
    of the run, as `Scale.training` does. Progress, curve and checkpoint are `loop.fit`'s, in `folder`: a killed run
    resumes exactly. `validate_on`: images of the val split in the curve.
    Returns the trained Segmenter. Raises InputError for an unknown run and for a source of another kind of model.
    """
    if run not in experiments():
        raise InputError(f"unknown run '{run}': choose one of {', '.join(experiments())}")
    settings = experiments()[run] | budget | {"run": run, "seed": seed}
    steps = settings["iterations"]
    device = PartialState().device
    dtype = fast_dtype(device)
    accelerator = Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
    pretrained = settings["pretrained"]
    # this processor is saved as it is: tokenizing leaves its padding in the other
    model, untouched = load_model(source, pretrained=pretrained)
    model = adapted(model, settings["model"])
    frozen, processor = load_model(source, pretrained=pretrained)  # what no gradient reaches, as fast as can be
    frozen = adapted(frozen, settings["model"]).to(device, dtype)
    model = fresh_decoder(model, settings["reduce_dim"], seed).to(device).requires_grad_(False)
    model.decoder.requires_grad_(True).train()
    data = PhraseCutPlus(
        PhraseCut(root, "train"),
        settings["negative"],
        tuple(settings["text_weight"]),
        visual=settings["visual"],
        phrases_per_image=settings["phrases_per_image"],
        seed=seed,
    )
    val = PhraseCut(root, "val")
    optimiser = torch.optim.AdamW(model.decoder.parameters(), lr=settings["learning_rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, settings["final_learning_rate"])
    images = settings["batch"] // settings["phrases_per_image"]
    draws, collate = _Draws(data, steps * images), _Collate(processor.image_processor)
    if settings["film"] == "aligned":
        batch = collate([draws[n] for n in range(ALIGN_ON)])
        *_, deepest = encode(model, batch.pixels.to(device))
        align_film(model, deepest, embed_texts(model, processor, batch.texts))

    def batches(first: int):
        return DataLoader(
            draws,
            images,
            sampler=range(first * images, steps * images),
            num_workers=1,
            collate_fn=collate,
            prefetch_factor=4,
        )

    def step(_: int, batch: Batch) -> dict[str, torch.Tensor]:
        activations = encode(frozen, batch.pixels.to(device, dtype))
        condition = conditions(frozen, processor, batch)
        rows = batch.rows.to(device)
        with accelerator.autocast():
            logits = decode(model, [a[rows] for a in activations], condition)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.masks.to(device))
        accelerator.backward(loss)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        return {"loss": loss}

    with fast_attention(model.decoder):
        fit(
            run,
            Path(folder),
            batches,
            step,
            steps,
            {"decoder": model.decoder, "optimiser": optimiser, "schedule": schedule},
            settings,
            validate=lambda: validate(model, processor, val, validate_on),
            every=max(1, min(250, steps // 4)),
        )
    with writing(folder):
        model.eval().save_pretrained(Path(folder) / "model")
        untouched.save_pretrained(Path(folder) / "model")
    return Segmenter(model, processor)


def fresh_decoder(model, reduce_dim: int, seed: int):
    """Replace the decoder by an untrained one of width `reduce_dim`, initialised from `seed`. Returns the model.

    Layers start as torch has them, as the authors' do; transformers would draw weights of standard deviation 1.
    """
    torch.manual_seed(seed)
    model.config.reduce_dim = reduce_dim
    model.decoder = type(model.decoder)(model.config)
    for module in model.decoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@torch.no_grad()
def align_film(model, activations: torch.Tensor, texts: torch.Tensor):
    """Start the decoder's first step at what CLIP itself does: compare every patch with the condition.

    Short runs need not learn the comparison that CLIP already makes. `reduces[0]` and `film_mul` become the same D of
    CLIP's P joint dimensions (those in which `texts` (N, P) differ most, rotated at random), seen from the deepest
    `activations` (B, N, hidden) and from the condition; their products add up to the similarity. Nothing else changes,
    and nothing at all where the backbone has no space in common with the texts (ViTSeg).
    """
    joint = backbone(model).joint_weight()
    if joint is None:
        return
    decoder, width = model.decoder, model.config.reduce_dim
    directions = torch.linalg.svd(texts - texts.mean(0), full_matrices=False).Vh[:width].cpu()
    chosen = torch.linalg.qr(torch.randn(width, len(directions))).Q @ directions
    # The decoder's layer norm takes the mean over channels out: with signs, the sum of the products stays in.
    signs = torch.randint(2, (width, 1)) * 2.0 - 1
    seen = chosen @ joint.cpu()
    ends = {decoder.reduces[0]: (seen, activations.flatten(0, 1)), decoder.film_mul: (signs * chosen, texts)}
    for linear, (weight, inputs) in ends.items():
        weight = weight.to(inputs.device)
        weight = weight / (inputs @ weight.T).std(0).mean()  # outputs of zero mean and unit variance
        linear.weight.copy_(weight)
        linear.bias.copy_(-weight @ inputs.mean(0))
    for parameter in decoder.film_add.parameters():
        parameter.zero_()


@torch.no_grad()
def validate(model, processor, dataset: PhraseCut, images: int) -> dict[str, float]:
    """mIoU, IoU_FG at the best threshold and AP of text prompts on the first `images` of a split."""
    model.eval()
    segmenter, metrics = Segmenter(model, processor, model.device, model.dtype), SegmentationMetrics()
    for indices in list(dataset.by_image.values())[:images]:
        samples = [dataset[i] for i in indices]
        segmenter.set_image(samples[0].image)
        metrics.update(segmenter.predict([s.phrase for s in samples]), [s.mask for s in samples])
    model.decoder.train()
    best = metrics.best()
    return {key: round(best[key], 4) for key in ("miou", "iou_fg", "ap")}
