"""What the study's models got on every sample: measured once, stored compactly, and read by tables, claims and checks.

    results/measured/<run>[-seed<n>].npz        counts, an array for each part
    results/measured/<part>.csv                 the samples that all runs were measured on, a row each

A part is one pass of one benchmark (PARTS). Counts are `threshold_counts`; of part voc, `SemanticResult.areas`.
"""

import lzma
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from safetensors.torch import load_file, save_file

from clipseg_repro.datasets import episodes
from clipseg_repro.datasets.catalogue import CATALOGUE
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.generalized import generalized
from clipseg_repro.evaluation.metrics import THRESHOLDS
from clipseg_repro.evaluation.one_shot import one_shot
from clipseg_repro.evaluation.referring import absent_phrases, phrasecut
from clipseg_repro.evaluation.semantic import semantic
from clipseg_repro.files import sha256, written_whole
from clipseg_repro.segmenter import Segmenter
from clipseg_repro.study.results import record
from clipseg_repro.study.scales import Scale
from clipseg_repro.training import experiments, untrained

# The parts that a table needs.
TABLES = {
    3: ("phrasecut-text",),
    4: ("voc",),
    5: ("pascal-5i-visual",),
    6: ("coco-20i-visual",),
    7: ("pascal-5i-text",),
    8: ("lvis-properties",),
    9: ("phrasecut-text", "phrasecut-visual", "phrasecut-absent"),
}


def parts(run: str) -> tuple[str, ...]:
    """What a run of experiments.yaml is measured on."""
    return tuple(dict.fromkeys(part for table in experiments()[run]["tables"] for part in TABLES[table]))


def measure(segmenter, run: str, part: str, scale: Scale, limit: int | None = None) -> tuple[pd.DataFrame, np.ndarray]:
    """(samples, counts) of a part. `limit`: the first pictures only, or so many episodes of a fold."""
    settings = experiments()[run]
    benchmark, _, prompts = part.rpartition("-")
    data, budget = _opened(part, scale.data), {"limit": limit, "keep": scale.unfinished}
    if benchmark == "phrasecut":
        budget |= {"limit": limit or scale.images, "seed": scale.seed}
        if prompts == "absent":
            found = absent_phrases(segmenter, data, **budget)
            return found[["image_id", "phrase"]], (found.area.to_numpy() * 1e6).round().astype(np.int64)[:, None]
        result = phrasecut(segmenter, data, prompts, settings["recipe"], **budget)
        return result.samples[["image_id", "phrase", "category"]], result.counts
    if part == "voc":
        result = semantic(segmenter, data, **budget)
        return pd.DataFrame({"picture": data.ids[: len(result.areas)]}), result.areas
    if part == "lvis-properties":
        result = generalized(segmenter, data, **budget)
        return result.samples, result.counts
    fold = int(settings["held_out"][-1])
    if benchmark == "pascal-5i":
        drawn = episodes.episode_per_picture(data, episodes.pascal_fold(fold), seed=scale.seed)
    else:
        drawn = episodes.random_episodes(data, episodes.coco_fold(fold), scale.episodes, seed=scale.seed)
    result = one_shot(segmenter, data, {fold: drawn}, prompts, **budget)
    return result.samples, result.counts


@lru_cache(8)
def _opened(part: str, root: Path):
    names = {"voc": "voc", "pascal": "voc", "phrasecut": "phrasecut", "coco": "coco", "lvis": "lvis"}
    source = CATALOGUE[names[part.split("-")[0]]]
    return source.open(root / source.folder, source.splits[0])


def key(run: str, seed: int = 0) -> str:
    """What files of a run and seed are called."""
    return f"{run}-seed{seed}" if seed else run


def decoder_file(run: str, seed: int, scale: Scale) -> Path:
    return scale.results / "decoders" / f"{key(run, seed)}.safetensors"


def keep_decoder(run: str, seed: int, scale: Scale, weights: dict):
    """Store the decoder among a model's `weights`, in half precision."""
    path = decoder_file(run, seed, scale)
    with written_whole(path) as temporary:
        save_file(
            {name: w.half().contiguous() for name, w in weights.items() if name.startswith("decoder.")}, temporary
        )


def load_run(run: str, seed: int, scale: Scale) -> Segmenter:
    """The Segmenter of a run whose decoder is stored. Raises InputError where it is not."""
    path = decoder_file(run, seed, scale)
    if not path.exists():
        raise InputError(f"no decoder '{path}': train it with clipseg-repro train '{run}' --seed {seed}")
    settings = experiments()[run]
    settings = settings | scale.budget(settings) | {"seed": seed}
    model, processor = untrained(settings, scale.source(settings["model"]))
    left = model.load_state_dict({name: w.float() for name, w in load_file(path).items()}, strict=False)
    if left.unexpected_keys or any(name.startswith("decoder.") for name in left.missing_keys):
        raise InputError(f"'{path}' is no decoder of '{run}': remove it, and train the run again")
    return Segmenter(model.eval(), processor)


def store(run: str, seed: int, part: str, samples: pd.DataFrame, counts: np.ndarray, scale: Scale):
    """Add a part to what is stored of a run. Raises InputError if other runs were measured on other samples."""
    listed, path = _folder(scale) / f"{part}.csv", _folder(scale) / f"{key(run, seed)}.npz"
    samples = samples.astype(str)
    with FileLock(scale.unfinished / f"{part}.lock"):  # several processes may be at the study
        known = pd.read_csv(listed, dtype=str) if listed.exists() else samples[:0]
        one_fold = "fold" in samples and samples.fold.nunique() == 1
        own = known[known.fold.isin(samples.fold)] if one_fold else known
        if own.empty:  # the first run, or the first of a fold
            every = pd.concat([known, samples])
            every = every.sort_values("fold", kind="stable") if one_fold else every
            with written_whole(listed) as temporary:
                every.to_csv(temporary, index=False, lineterminator="\n")
            record(listed, scale, data=_opened(part, scale.data).fingerprint(), command="clipseg-repro study")
        elif not own.reset_index(drop=True).equals(samples.reset_index(drop=True)):
            raise InputError(
                f"'{listed}' lists other samples than '{run}' was measured on now: remove '{listed.parent}'"
            )
    kept = dict(np.load(path)) if path.exists() else {}
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **kept | {part: np.frombuffer(packed(counts), np.uint8)})
    data = {_opened(each, scale.data).fingerprint() for each in (*kept, part)}
    origin = {"run": run, "run_seed": seed, "decoder": sha256(decoder_file(run, seed, scale))}
    origin["command"] = f"clipseg-repro study '{run}'"
    record(path, scale, data=" ".join(sorted(data)), **origin)


def stored(run: str, seed: int, part: str, scale: Scale) -> tuple[pd.DataFrame, np.ndarray]:
    """(samples, counts) of a part, as `measure` gave them. Raises InputError where the run was not measured."""
    path = _folder(scale) / f"{key(run, seed)}.npz"
    if part not in measured(run, seed, scale):
        raise InputError(f"'{path}' has no '{part}': measure the run with clipseg-repro study")
    samples = pd.read_csv(path.with_name(f"{part}.csv"))
    held = experiments()[run]["held_out"] or ""
    if "fold" in samples and held[-1:].isdigit():
        samples = samples[samples.fold == int(held[-1])].reset_index(drop=True)
    return samples, unpacked(np.load(path)[part].tobytes())


def measured(run: str, seed: int, scale: Scale) -> list[str]:
    """The parts that are stored of a run."""
    path = _folder(scale) / f"{key(run, seed)}.npz"
    return list(np.load(path)) if path.exists() else []


def _folder(scale: Scale) -> Path:
    return scale.results / "measured"


def packed(counts: np.ndarray) -> bytes:
    """(N, K, C) or (N, K) whole numbers below 2**31, small: `threshold_counts` fall slowly along the thresholds, so
    differences are kept, and of the four counts only those two that a sample's size and object do not give."""
    shape, kept = counts.shape, counts
    if shape[1:] == (len(THRESHOLDS), 4):
        whole = np.stack([counts[:, :1, 0] + counts[:, :1, 2], counts[:, :1].sum(2)], 2)
        kept = np.concatenate([whole, counts[..., :2]], 1)
    kept = np.diff(kept.astype(np.int32), axis=1, prepend=np.int32(0)).astype("<i4")
    header = np.array([len(shape), *shape], "<i4").tobytes()
    return header + lzma.compress(np.frombuffer(kept.tobytes(), np.uint8).reshape(-1, 4).T.tobytes(), preset=9)


def unpacked(content: bytes) -> np.ndarray:
    dimensions = int(np.frombuffer(content[:4], "<i4")[0])
    shape = np.frombuffer(content[4 : 4 + 4 * dimensions], "<i4").tolist()
    short = shape[1:] == [len(THRESHOLDS), 4]
    planes = np.frombuffer(lzma.decompress(content[4 + 4 * dimensions :]), np.uint8)
    kept = np.frombuffer(np.ascontiguousarray(planes.reshape(4, -1).T).tobytes(), "<i4")
    kept = kept.reshape([shape[0], shape[1] + 1, 2] if short else shape).cumsum(1)
    if not short:
        return kept
    (positive, pixels), (tp, fp) = kept[:, :1].transpose(2, 0, 1), kept[:, 1:].transpose(2, 0, 1)
    return np.stack([tp, fp, positive - tp, pixels - positive - fp], 2)


def differences(run: str, seed: int, part: str, scale: Scale, limit: int) -> float:
    """The largest share of a sample's pixels that are counted otherwise now than stored, over the first `limit`."""
    samples, counts = stored(run, seed, part, scale)
    now, found = measure(load_run(run, seed, scale), run, part, scale, limit)
    merged = now.astype(str).reset_index(drop=True)
    index = samples.astype(str).reset_index().merge(merged.reset_index(), on=list(merged), suffixes=("_then", "_now"))
    if set(index.index_now) != set(range(len(now))):
        raise InputError(f"'{run}' was measured on other samples of {part} than there are now: remove results/measured")
    index = index.drop_duplicates("index_now")
    then, found = counts[index.index_then], found[index.index_now]
    return float((np.abs(then - found).max(tuple(range(1, then.ndim))) / found.reshape(len(found), -1).max(1)).max())
