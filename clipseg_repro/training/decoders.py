"""Training of decoders on a frozen CLIP: the runs of `experiments.yaml`, on accelerate."""

from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from clipseg_repro.datasets.class_phrases import ClassPhrases
from clipseg_repro.datasets.coco import COCO
from clipseg_repro.datasets.held_out import Words, remover
from clipseg_repro.datasets.lvis import LVIS
from clipseg_repro.datasets.own import Own, splits
from clipseg_repro.datasets.phrasecut import PhraseCut, PhraseCutPlus, Samples, TrainingSample
from clipseg_repro.devices import fast_dtype
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.metrics import SegmentationMetrics
from clipseg_repro.models.forward import decode, embed_images, embed_texts, encode
from clipseg_repro.models.loading import load_model
from clipseg_repro.models.variants import adapted, backbone
from clipseg_repro.prompts import prepare, to_pixels
from clipseg_repro.segmenter import Segmenter
from clipseg_repro.training.kept import Kept, frozen_key
from clipseg_repro.training.loop import fast_attention, fit, loader_workers, writing

AT_ONCE = 12  # prompts whose gradients a CPU computes together: more do not stay in its cache
# The paper's tables that runs without some classes stand in, by what they are without.
TABLES = {"unseen": [4], "pascal-5i": [5, 7], "coco-20i": [6], "properties": [8]}
ALIGN_ON = 64  # training images that `align_film` looks at


@cache
def experiments() -> dict[str, dict]:
    """All runs of `experiments.yaml` by name, their defaults filled in. Raises InputError for a key that has none."""
    table = yaml.safe_load((files(__package__) / "experiments.yaml").read_text(encoding="utf-8"))
    defaults, _ = table.pop("defaults"), table.pop("shared")
    runs = {}
    for entry, own in table.items():
        if unknown := set(own) - set(defaults):
            raise InputError(f"experiments.yaml: '{entry}' has {', '.join(sorted(unknown))}, which has no default")
        settings = defaults | own
        keys = settings["held_out"] if isinstance(settings["held_out"], list) else [settings["held_out"]]
        for key in keys:
            tables = TABLES[key.rstrip("-0123456789")] if key else settings["tables"]
            runs[f"{entry}-{key}" if key else entry] = settings | {"held_out": key, "tables": tables}
    return runs


@dataclass
class Batch:
    """Pictures, and for each of N prompts: which query it is put to, its words, example, mixture and truth.

    queries, supports: pixels (3, S, S) by the row of `Kept` that stands for the picture, None where it is kept.
    rows: (N,) places in `queries`. texts: N. shown: (M,) places in `supports` for the prompts `supported` (M,) in N.
    weights: (N,) share of the text. masks: (N, S, S) float. samples: N places in the data set.
    """

    queries: dict[int, torch.Tensor | None]
    rows: torch.Tensor
    texts: list[str]
    supports: dict[int, torch.Tensor | None]
    shown: torch.Tensor
    supported: torch.Tensor
    weights: torch.Tensor
    masks: torch.Tensor
    samples: tuple[int, ...] = ()


class _Draws(Dataset):
    """The n-th draw of a training run."""

    def __init__(self, data: PhraseCutPlus, draws: int):
        self.data, self.draws = data, draws

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, n: int) -> list[TrainingSample]:
        return self.data[self.data.key(n)]


class _Collate:
    """Makes a Batch of draws; pictures whose outputs are kept are not even read."""

    def __init__(self, image_processor, images: Kept, examples: Kept, row_of: dict[int, int]):
        self.image_processor, self.images, self.examples, self.row_of = image_processor, images, examples, row_of
        self.size = image_processor.size["height"], image_processor.size["width"]

    def __call__(self, draws: list[list[TrainingSample]]) -> Batch:
        samples = [sample for draw in draws for sample in draw]
        masks = [torch.tensor(sample.mask, dtype=torch.float32)[None, None] for sample in samples]
        supported = [i for i, s in enumerate(samples) if s.supported]
        # Where nothing is kept, crops differ: each has a row of its own.
        keep = self.images.folder is not None
        asked = [self.row_of[d[0].dataset.image_id(d[0].view.sample)] if keep else n for n, d in enumerate(draws)]
        shown = [samples[i].supported.sample if keep else i for i in supported]
        queries = {
            row: None if row in self.images else to_pixels([draw[0].image], self.image_processor)[0]
            for row, draw in zip(asked, draws, strict=True)
        }
        supports = {
            row: None if row in self.examples else prepare(samples[i].support, self.image_processor)[0]
            for row, i in zip(shown, supported, strict=True)
        }
        queried = [list(queries).index(row) for row in asked]
        return Batch(
            queries=queries,
            rows=torch.tensor([row for row, draw in zip(queried, draws, strict=True) for _ in draw]),
            texts=[s.text for s in samples],
            supports=supports,
            shown=torch.tensor([list(supports).index(row) for row in shown], dtype=torch.long),
            supported=torch.tensor(supported, dtype=torch.long),
            weights=torch.tensor([s.text_weight for s in samples]),
            masks=torch.cat([F.interpolate(mask, self.size)[0] for mask in masks]),
            samples=tuple(s.view.sample for s in samples),
        )


def mixed(texts: torch.Tensor, examples: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """Conditions (N, P) of texts (N, P) and examples (as many as batch.supports, P): text * weight + visual * (1 -
    weight)."""
    visual = texts.clone()
    if len(batch.supported):
        visual[batch.supported.to(texts.device)] = examples.to(texts)[batch.shown.to(texts.device)]
    weights = batch.weights.to(texts.device)[:, None]
    return weights * texts + (1 - weights) * visual


def samples(dataset: str, root: Path, split: str) -> Samples:
    """The samples of a split (train or val) of the data set that a run of experiments.yaml asks for.

    root: the folder of the data set, or a CSV of one's own, all of whose rows are taken where it has no such split.
    """
    if str(root).endswith(".csv"):
        return ClassPhrases(Own(root, split if split in splits(root) else None))
    if dataset == "phrasecut":
        return PhraseCut(root, split)
    return ClassPhrases(LVIS(root, split) if dataset == "lvis" else COCO(root, f"{split}2014"))


def train(
    run: str,
    root: Path,
    folder: Path,
    source: str = "mini",
    seed: int = 0,
    validate_on: int = 30,
    keep: Path | None = None,
    words: Words | None = None,
    tensorboard: bool = False,
    **budget,
):
    """Train a decoder for `run`, on the data in `root` (see `samples`), and save the model to `folder/model`. It is a
    fresh one, but for a run that says `start: source`.

    `source` gives CLIP, or whatever backbone the run's model has (its decoder is replaced). `budget` overrides settings
    of the run, as `Scale.budget` gives them. `keep`: a folder for what the frozen backbone makes of the pictures, where
    the run crops them once (`crop_once`); runs on the same backbone share it. Progress, curve and checkpoint are
    `loop.fit`'s, in `folder`: a killed run resumes exactly. `validate_on`: images of the val split in the curve.
    `words`: what held-out classes are called, for runs that leave some out. `tensorboard`: the curve, and the learning
    rate, go to `folder/logs` too. Returns the trained Segmenter. Raises InputError for an unknown run, for a source of
    another kind of model, and where TensorBoard is asked for and not installed.
    """
    if run not in experiments():
        raise InputError(f"unknown run '{run}': choose one of {', '.join(experiments())}")
    if tensorboard and not find_spec("tensorboard"):  # which accelerate would pass over in silence
        raise InputError("--tensorboard needs a package that is not here: pip install tensorboard, or leave it out")
    settings = experiments()[run] | budget | {"run": run, "seed": seed}
    settings = {key: value for key, value in settings.items() if key not in ("method", "tables")}
    steps = settings["iterations"]
    processes = PartialState()
    device = processes.device
    dtype = fast_dtype(device)
    precision, tracker = "bf16" if dtype == torch.bfloat16 else "no", "tensorboard" if tensorboard else None
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=folder)
    # this processor is saved as it is: tokenizing leaves its padding in the other
    model, untouched = untrained(settings, source)
    frozen, processor = untrained(settings, source)  # what no gradient reaches, as fast as can be
    frozen = frozen.to(device, dtype)
    model = model.to(device).requires_grad_(False)
    model.decoder.requires_grad_(True)
    wanted = settings["dataset"], root
    data = PhraseCutPlus(
        samples(*wanted, "train"),
        settings["negative"],
        tuple(settings["text_weight"]),
        visual=settings["visual"],
        phrases_per_image=settings["phrases_per_image"],
        crop_once=settings["crop_once"],
        recipe=settings["recipe"],
        remove=remover(settings["held_out"], words) if settings["held_out"] else None,
        seed=seed,
    )
    key = frozen_key(frozen, processor, data.dataset)
    keep = keep / key if keep and settings["crop_once"] else None
    layers, recipe = "-".join(map(str, frozen.config.extract_layers)), settings["recipe"]
    images = Kept(keep and keep / f"images, layers {layers}", len(data.dataset.by_image))
    examples = Kept(keep and keep / f"examples, {recipe}", len(data.dataset), np.float32)
    segmenter = Segmenter(model, processor, model.device, model.dtype)
    queries = encoded(segmenter, samples(*wanted, "val"), validate_on) if processes.is_main_process else []
    model.decoder.train()
    optimiser = torch.optim.AdamW(model.decoder.parameters(), lr=settings["learning_rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, settings["final_learning_rate"])
    crops, shares = settings["batch"] // settings["phrases_per_image"], processes.num_processes
    if crops % shares:
        raise InputError(f"a batch of {crops} crops cannot be shared by {shares} processes: start a divisor of it")
    row_of = {image: row for row, image in enumerate(data.dataset.by_image)}
    draws, collate = _Draws(data, steps * crops), _Collate(processor.image_processor, images, examples, row_of)

    def activations(batch: Batch) -> list[torch.Tensor]:
        return images.get(batch.queries, lambda pixels: encode(frozen, pixels.to(device, dtype)))

    def conditions(batch: Batch) -> torch.Tensor:
        shown = None
        if batch.supports:
            (shown,) = examples.get(batch.supports, lambda x: [embed_images(frozen, x.to(device, dtype)).float()])
        return mixed(embed_texts(frozen, processor, batch.texts).float(), shown, batch)

    if settings["film"] == "aligned" and settings["start"] == "fresh":
        batch = collate([draws[n] for n in range(ALIGN_ON)])
        *_, deepest = activations(batch)
        align_film(model, deepest.float().to(device), embed_texts(model, processor, batch.texts))

    def batches(first: int):
        return DataLoader(
            draws,
            crops // shares,
            sampler=range(first * crops + processes.process_index, steps * crops, shares),
            num_workers=loader_workers(),
            collate_fn=collate,
            prefetch_factor=4,
        )

    def step(_: int, batch: Batch) -> dict[str, torch.Tensor]:
        condition = conditions(batch)
        seen = [a.to(device, dtype) for a in activations(batch)]
        total = torch.zeros((), device=device)
        for part in torch.arange(len(condition)).split(AT_ONCE if device.type == "cpu" else len(condition)):
            rows = batch.rows[part].to(device)
            with accelerator.autocast():
                logits = decode(model, [a[rows] for a in seen], condition[part.to(device)])
            masks = batch.masks[part].to(device)
            loss = F.binary_cross_entropy_with_logits(logits.float(), masks, reduction="sum")
            loss = loss / (shares * batch.masks.numel())
            accelerator.backward(loss)
            total += loss.detach()
        if shares > 1:
            total = accelerator.reduce(total)
            for parameter in model.decoder.parameters():
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        return {"loss": total}

    def log(row: dict[str, float], step: int):
        accelerator.log(row | {"learning_rate": schedule.get_last_lr()[0]}, step)

    with writing(folder):
        accelerator.init_trackers("logs")
    with fast_attention(model.decoder):
        fit(
            run,
            Path(folder),
            batches,
            step,
            steps,
            {"decoder": model.decoder, "optimiser": optimiser, "schedule": schedule},
            settings,
            validate=lambda: validate(model.decoder, queries),
            every=min(250, -(-steps // 4)),  # quarters: a rest of two steps would be all noise
            log=log,
        )
    for tracker in accelerator.trackers:  # end_training would end the processes' group too, which other runs need
        tracker.finish()
    with writing(folder):
        if processes.is_main_process:
            model.eval().save_pretrained(Path(folder) / "model")
            untouched.save_pretrained(Path(folder) / "model")
    return segmenter


def untrained(settings: dict, source: str):
    """(model, processor) that a run of those settings starts from: its backbone from `source`, its decoder fresh."""
    model, processor = load_model(source, pretrained=settings["pretrained"])
    model.config.extract_layers = settings["layers"] or model.config.extract_layers
    model = adapted(model, settings["model"])
    if settings["start"] == "fresh":
        model.config.use_complex_transposed_convolution = settings["refined_head"]
        model = fresh_decoder(model, settings["reduce_dim"], settings["seed"])
    return model, processor


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


def encoded(segmenter: Segmenter, dataset: Samples, images: int) -> list[tuple[Segmenter, list[str], list[np.ndarray]]]:
    """Of the first `images` of a split: a Segmenter with the image set, which the frozen encoder then saw for all steps
    to come, its phrases and their masks."""
    made = []
    for indices in list(dataset.by_image.values())[:images]:
        samples = [dataset[i] for i in indices]
        own = copy(segmenter)
        own.set_image(samples[0].image)
        made.append((own, [s.phrase for s in samples], [s.mask for s in samples]))
    return made


@torch.no_grad()
def validate(decoder, queries: list[tuple[Segmenter, list[str], list[np.ndarray]]]) -> dict[str, float]:
    """mIoU, IoU_FG at the best threshold and AP of text prompts on `encoded` queries, whose decoder it is.

    In the exact convention: the released AP leaves out all recall below that at t = 0.98, and falls as maps get surer.
    """
    decoder.eval()
    metrics = SegmentationMetrics(convention="exact")
    for segmenter, phrases, masks in queries:
        metrics.update(segmenter.predict(phrases), masks)
    decoder.train()
    best = metrics.best()
    return {key: round(best[key], 4) for key in ("miou", "iou_fg", "ap")}
