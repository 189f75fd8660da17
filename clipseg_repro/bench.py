"""Speed, as ratios: `clipseg-repro bench`, whose tables notebook 11 reads.

Two contestants do the same work on the same inputs in the same run, taking turns; figures are medians. The model of the
first four measurements has the size of the released one and random weights: speed does not depend on them, and nothing
need be fetched.
"""

import time
from collections.abc import Callable
from statistics import median

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor

from clipseg_repro.datasets.phrasecut import PhraseCut
from clipseg_repro.evaluation.metrics import THRESHOLDS, SegmentationMetrics
from clipseg_repro.evaluation.referring import phrasecut
from clipseg_repro.mini.vocabulary import load_vocabulary
from clipseg_repro.models.forward import decode, encode
from clipseg_repro.models.loading import load_model, released_pixels
from clipseg_repro.prompts import RELEASED_SIZE, to_pixels
from clipseg_repro.segmenter import Segmenter, load_segmenter
from clipseg_repro.study.results import save_table
from clipseg_repro.study.scales import Scale

# What we promise: prompts on one image -> times faster than the documented call; the last is for the default dtype.
PROMPT_GOALS = {1: 1.15, 5: 5, 20: 15, 80: 30}
DEFAULT_DTYPE_GOAL = (20, 35)
IMAGES = 100  # of the test split, in the end-to-end measurement


def bench(scale: Scale, repeats: int = 5) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure everything below and write the tables `speed_prompts` and `speed` of the scale's results.

    `repeats`: timed runs of each contestant, after one that is not timed. On CUDA where there is one, else on the CPU.
    """
    scale.prepare("phrasecut")
    default = load_segmenter("mini").model  # on the device, and in the dtype, that a user gets unasked
    model, processor = full_size()
    model.to(default.device)
    tables = (
        prompts_table(model, processor, default.dtype, repeats),
        parts_table(model, processor, scale, default.dtype, repeats),
    )
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    captions = (
        f"K prompts on one image of {RELEASED_SIZE} px, ViT-B/16, from uint8 pixels to logits: `Segmenter` against the "
        f"documented call of CLIPSegForImageSegmentation. Medians of {repeats}; {machine}",
        f"The other measurements of speed. Medians of {repeats}; {machine}",
    )
    for name, table, caption in zip(("speed_prompts", "speed"), tables, captions, strict=True):
        save_table(table, name, caption, scale, command="clipseg-repro bench")
    return tables


def full_size() -> tuple[CLIPSegForImageSegmentation, CLIPSegProcessor]:
    """A model of rd64-refined's size (but for the table of tokens) with random weights, in eval mode, and a processor
    with the mini tokenizer."""
    _, mini = load_model("mini")
    torch.manual_seed(0)
    words = {key: getattr(mini.tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    towers = {
        "vision_config": {"patch_size": 16},
        "text_config": {"vocab_size": len(mini.tokenizer)} | words,
        "extract_layers": [3, 6, 9],
        "reduce_dim": 64,
    }
    model = CLIPSegForImageSegmentation(CLIPSegConfig(**towers, use_complex_transposed_convolution=True)).eval()
    return model, CLIPSegProcessor(released_pixels(), mini.tokenizer)


@torch.no_grad()
def documented(model, processor, image: np.ndarray, texts: list[str]) -> torch.Tensor:
    """Logits (K, S, S) as the model's documentation gets them: the image is repeated for every text."""
    inputs = processor(text=texts, images=[image] * len(texts), padding=True, return_tensors="pt").to(model.device)
    return model(**inputs).logits.reshape(len(texts), *inputs["pixel_values"].shape[-2:])


def prompts_table(model, processor, default: torch.dtype, repeats: int) -> pd.DataFrame:
    """One row per number of prompts and dtype of ours, float32 and the device's `default`. The documented call is in
    float32; `difference_percent`: the largest difference of the logits, in percent of the largest logit. Every run of
    ours starts without cached texts; neither side's time includes setting the model up.
    """
    image = np.random.default_rng(0).integers(0, 256, (RELEASED_SIZE, RELEASED_SIZE, 3), dtype=np.uint8)
    names = [kind.name for kind in load_vocabulary()]
    segmenter = Segmenter(model, processor)
    rows = []
    for prompts, goal in tqdm(PROMPT_GOALS.items(), desc="prompts", unit="count"):
        texts = names[:prompts]

        def ours(texts=texts):
            segmenter._texts.clear()
            segmenter.set_image(image)
            return segmenter.logits(texts)

        def peer(texts=texts):
            return documented(model, processor, image, texts)

        model.float()
        expected = peer()
        row = {"difference_percent": _percent(ours(), expected)}
        seconds = medians({"ours": ours, "documented": peer}, repeats)
        rows.append(_row(prompts, "float32", seconds, goal) | row)
        if default != torch.float32:
            model.to(default)
            row = {"difference_percent": _percent(ours(), expected)}
            seconds |= medians({"ours": ours}, repeats)
            goal = DEFAULT_DTYPE_GOAL[1] if prompts == DEFAULT_DTYPE_GOAL[0] else np.nan
            rows.append(_row(prompts, str(default).split(".")[1], seconds, goal) | row)
    return pd.DataFrame(rows)


def _percent(ours, expected):
    return 100 * float((ours - expected).abs().max() / expected.abs().max())


def _row(prompts, dtype, seconds, goal):
    ours, peer = (seconds[k] * 1e3 for k in ("ours", "documented"))
    return {
        "prompts": prompts,
        "dtype": dtype,
        "ours_ms": ours,
        "documented_ms": peer,
        "ratio": peer / ours,
        "goal": goal,
    }


def parts_table(model, processor, scale: Scale, default: torch.dtype, repeats: int) -> pd.DataFrame:
    """One row per measurement: ours and the peer in `unit`, their relation `figure`, and the goal for it."""
    rows = []
    for dtype in dict.fromkeys((torch.float32, default)):
        model.to(dtype)
        rows += [encoder_row(model, repeats), extra_prompt_row(model, processor, repeats)]
    rows += [metrics_row(repeats), end_to_end_row(scale, repeats)]
    if default != torch.float32:
        rows.append(agreement_row(scale, default))
    return pd.DataFrame(rows)


def _measured(measurement, dtype, ours, peer, unit, figure, goal, at_most=False):
    row = {"measurement": measurement, "dtype": str(dtype).removeprefix("torch."), "ours": ours, "peer": peer}
    return row | {
        "unit": unit,
        "figure": figure,
        "goal": goal,
        "reached": (figure <= goal) if at_most else (figure >= goal),
    }


@torch.no_grad()
def encoder_row(model, repeats: int) -> dict:
    """FLOP/s of encoding one image against the best of square matrix products, in the same dtype."""
    pixels = torch.randn(1, 3, RELEASED_SIZE, RELEASED_SIZE).to(model.device, model.dtype)
    work = flops(lambda: encode(model, pixels))
    contestants = {"encode": lambda: encode(model, pixels)}
    for side in (1024, 2048, 4096):
        a, b = torch.randn(2, side, side).to(model.device, model.dtype)
        contestants[side] = lambda a=a, b=b: a @ b
    seconds = medians(contestants, repeats)
    best = max(2 * side**3 / s for side, s in seconds.items() if side != "encode")
    ours = work / seconds["encode"]
    name = "FLOP/s of the image encoder over the best matrix product"
    return _measured(name, model.dtype, ours / 1e9, best / 1e9, "GFLOP/s", ours / best, 0.7)


@torch.no_grad()
def extra_prompt_row(model, processor, repeats: int, few: int = 20, many: int = 80) -> dict:
    """What one more prompt costs, its text known, over encoding the image: the slope from `few` to `many` prompts."""
    segmenter = Segmenter(model, processor)
    segmenter.set_image(np.zeros((RELEASED_SIZE, RELEASED_SIZE, 3), np.uint8))
    pixels = torch.randn(1, 3, RELEASED_SIZE, RELEASED_SIZE).to(model.device, model.dtype)
    conditions = torch.randn(many, model.config.projection_dim, device=model.device)
    contestants = {n: (lambda n=n: segmenter.logits(conditions[:n])) for n in (few, many)}
    seconds = medians(contestants | {"encode": lambda: encode(model, pixels)}, repeats)
    slope, once = (seconds[many] - seconds[few]) / (many - few), seconds["encode"]
    name = "cost of one more prompt over one image encoding"
    return _measured(name, model.dtype, slope * 1e3, once * 1e3, "ms", slope / once, 0.03, at_most=True)


def metrics_row(repeats: int, maps: int = 20) -> dict:
    """`SegmentationMetrics` against a sort and a scan per threshold, the way of the released FixedIntervalMetrics."""
    rng = np.random.default_rng(0)
    shape = (maps, RELEASED_SIZE, RELEASED_SIZE)
    smooth = np.stack([cv2.GaussianBlur(m, (0, 0), 20) for m in rng.normal(size=shape).astype(np.float32)])
    probabilities = torch.from_numpy(smooth / smooth.std() * 3 - 2).sigmoid()
    targets = torch.from_numpy(smooth > smooth.std()).to(torch.uint8)
    floats = targets.float()  # as the released loaders give them
    seconds = medians(
        {
            "ours": lambda: SegmentationMetrics().update(probabilities, targets),
            "scan": lambda: [sorted_scan(p, t) for p, t in zip(probabilities, floats, strict=True)],
        },
        repeats,
    )
    ours, scan = (seconds[k] / maps * 1e3 for k in ("ours", "scan"))
    return _measured(
        "metrics of one map against a scan per threshold", torch.float32, ours, scan, "ms", scan / ours, 30
    )


def sorted_scan(probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What `metrics.threshold_counts` gives, (49, 4), from sorted pixels and one pass over them per threshold."""
    p, order = probabilities.flatten().sort()
    g = target.flatten()[order]
    rows = []
    for threshold in THRESHOLDS.tolist():
        passing = torch.where(p > threshold)[0]
        n = int(passing[0]) if len(passing) else len(g)
        fn, tp = int(g[:n].sum()), int(g[n:].sum())
        rows.append((tp, len(g) - n - tp, fn, n - fn))
    return torch.tensor(rows)


def end_to_end_row(scale: Scale, repeats: int) -> dict:
    """Wall time of evaluating test images over that of the model's passes alone, on pixels that are already there.

    The passes take one image after the other, on all cores; on a CPU, the evaluation takes one image per core.
    """
    first, dataset = load_segmenter(scale.model, dtype="float32"), PhraseCut(scale.phrasecut, "test")
    model, processor = first.model, first.processor
    prepared = [
        (to_pixels([dataset[indices[0]].image], processor.image_processor), [dataset.phrases[i] for i in indices])
        for indices in list(dataset.by_image.values())[:IMAGES]
    ]

    def evaluate():
        phrasecut(Segmenter(model, processor, dtype="float32"), dataset, limit=IMAGES)

    @torch.no_grad()
    def passes():
        segmenter = Segmenter(model, processor, dtype="float32")
        for pixels, phrases in prepared:
            decode(model, encode(model, pixels.to(model.device)), segmenter.conditions(phrases))

    seconds = medians({"ours": evaluate, "passes": passes}, repeats)
    ours, alone = seconds["ours"], seconds["passes"]
    name = f"evaluation of {len(prepared)} images over the model's passes alone"
    return _measured(name, model.dtype, ours, alone, "s", ours / alone, 1.2, at_most=True)


def agreement_row(scale: Scale, dtype: torch.dtype) -> dict:
    """IoU of the masks (p > 0.5) that the scale's model draws in `dtype` and in float32, all pixels of test images."""
    full, reduced = (load_segmenter(scale.model, dtype=d) for d in (torch.float32, dtype))
    dataset = PhraseCut(scale.phrasecut, "test")
    pixels = np.zeros(4, np.int64)
    for indices in list(dataset.by_image.values())[:IMAGES]:
        maps = []
        for segmenter in (full, reduced):
            segmenter.set_image(dataset[indices[0]].image)
            maps.append(segmenter.predict([dataset.phrases[i] for i in indices]) > 0.5)
        exact, rough = maps
        pixels += [exact.sum(), rough.sum(), (exact & rough).sum(), (exact | rough).sum()]
    peer, ours, both, either = (int(n) for n in pixels)
    return _measured("IoU of the masks with those in float32", dtype, ours, peer, "px", both / either, 0.99)


def flops(call: Callable[[], object]) -> int:
    """Floating point operations of the matrix products, convolutions and attentions in a call."""

    def attention(query, key, value, *_, **__):
        return sdpa_flop_count(query, key, value)

    uncounted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # by torch itself
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def medians(contestants: dict, repeats: int) -> dict:
    """Median seconds of each call, {name: s}: one run of each that is not timed, then `repeats` rounds in turn."""
    taken = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(repeats):
        for name, call in contestants.items():
            taken[name].append(_seconds(call))
    return {name: median(values) for name, values in taken.items()}


def _seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
