"""The evaluation protocols of the paper's tables, one function each."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.metrics import KEYS, SegmentationMetrics, bootstrap
from clipseg_repro.evaluation.per_image import measure
from clipseg_repro.prompts import DEFAULT_RECIPE, IMAGENET_MEAN, VisualPrompt, interpolate

# An image of zeros to the model, which the released code shows for a phrase that occurs once (datasets/phrasecut.py).
NO_EXAMPLE = VisualPrompt(np.full((8, 8, 3), np.round(255 * np.array(IMAGENET_MEAN)), np.uint8), np.ones((8, 8), bool))
SIZE_BINS = {"small": (0.0, 0.04), "medium": (0.04, 0.12), "large": (0.12, 1.01)}  # share of the image's pixels


@dataclass
class PhraseCutResult:
    """Outcome of `phrasecut`. `samples`: one row per phrase (columns below); `exact`: the metric, a group per phrase.

    Columns of `samples`: index (in the data set), image_id, phrase, category (category, attribute or relation), area
    (share of the image), on_target and on_others (mean probability on the prompted object and on the image's other
    annotated objects; NaN where there are none).
    """

    prompts: str
    samples: pd.DataFrame
    exact: SegmentationMetrics = field(repr=False)

    @property
    def counts(self) -> np.ndarray:
        """(N, 49, 4): the `threshold_counts` of every phrase."""
        return self.exact.counts.numpy()

    @property
    def released(self) -> SegmentationMetrics:
        return SegmentationMetrics.from_counts(self.counts)

    def best(self, convention: str = "released") -> dict[str, float]:
        """miou, iou_fg, iou_bin, ap at the threshold of the best mIoU."""
        return getattr(self, convention).best("miou")

    def selectivity(self) -> float:
        """Mean probability on the prompted objects over that on the images' other objects."""
        both = self.samples.dropna(subset=["on_target", "on_others"])
        return float(both.on_target.mean() / both.on_others.mean())

    def table(self, threshold: float | None = None) -> pd.DataFrame:
        """Figures with 95% bootstrap intervals (images resampled): all phrases, per category, per object size.

        `threshold` None takes the best mIoU's, over all phrases. Released convention."""
        threshold = self.best()["threshold"] if threshold is None else threshold
        rows = []
        for name, chosen in self.groups().items():
            metrics = SegmentationMetrics.from_counts(self.counts[chosen])
            figures = metrics.at(threshold)
            intervals = bootstrap(self.counts[chosen], self.samples.image_id.to_numpy()[chosen], threshold)
            row = {"phrases": name, "samples": int(chosen.sum()), "threshold": threshold}
            for key in KEYS:
                row |= {key: figures[key], f"{key}_low": intervals[key][0], f"{key}_high": intervals[key][1]}
            rows.append(row)
        return pd.DataFrame(rows)

    def groups(self) -> dict[str, np.ndarray]:
        """Masks (N,) over the samples: all, each category of phrase, each object size."""
        s = self.samples
        chosen = {"all": np.ones(len(s), bool)}
        chosen |= {f"{c} phrases": (s.category == c).to_numpy() for c in ("category", "attribute", "relation")}
        chosen |= {f"{n} objects": s.area.between(*b, inclusive="left").to_numpy() for n, b in SIZE_BINS.items()}
        return {name: mask for name, mask in chosen.items() if mask.any()}


def phrasecut(
    segmenter,
    dataset,
    prompts: str = "text",
    recipe: str = DEFAULT_RECIPE,
    weight: float = 0.5,
    template: str = "{}",
    limit: int | None = None,
    seed: int = 0,
    keep: Path | None = None,
) -> PhraseCutResult:
    """Table 3 (and Table 9): every phrase of a PhraseCut split on its whole image.

    `prompts`: "text" (the bare phrase, put into `template`), "visual" (another sample of the same phrase, drawn with
    `seed`, as a visual prompt of `recipe`; phrases that occur once are left out), "mixed" (`weight` of the visual) or
    "unique" (the phrases left out, by NO_EXAMPLE).
    `limit` takes the first images only. `keep`, and what bad images do: as in `per_image.measure`.
    """
    if prompts not in ("text", "visual", "mixed", "unique"):
        raise InputError(f"unknown prompts '{prompts}': choose text, visual, mixed or unique")
    images, chosen = list(dataset.by_image)[:limit], set(dataset.supported)
    if prompts in ("text", "unique"):
        chosen = set(range(len(dataset))) - (chosen if prompts == "unique" else set())
    asked = {image: [i for i in dataset.by_image[image] if i in chosen] for image in images}
    place = {i: n for n, i in enumerate(i for own in asked.values() for i in own)}
    if not place:
        raise InputError("no phrase to evaluate: the split is empty or, for visual prompts, no phrase occurs twice")
    exact = SegmentationMetrics(num_groups=len(place), convention="exact")

    def prompt(i):
        text = template.format(dataset.phrases[i])
        if prompts in ("text", "unique"):
            return text if prompts == "text" else NO_EXAMPLE
        support = dataset.visual_support(i, np.random.default_rng([seed, i]))
        visual = VisualPrompt(support.image, support.mask == 1, recipe)
        return visual if prompts == "visual" else interpolate(text, visual, weight)

    def read(image_id):
        samples = {i: dataset[i] for i in dataset.by_image[image_id]} if asked[image_id] else {}
        return samples, {i: prompt(i) for i in asked[image_id]}

    def work(segmenter, samples, given):
        if not given:
            return [], None
        masks = {i: sample.mask == 1 for i, sample in samples.items()}
        objects = np.any(list(masks.values()), axis=0)
        segmenter.set_image(next(iter(samples.values())).image)
        probabilities = segmenter.predict(list(given.values()))
        rows = []
        for i, probability in zip(given, probabilities, strict=True):
            mask, others = masks[i], objects & ~masks[i]
            rows.append(
                {
                    "index": i,
                    "image_id": samples[i].image_id,
                    "phrase": samples[i].phrase,
                    "category": _category(dataset.structures[i]),
                    "area": float(mask.mean()),
                    "on_target": float(probability[mask].mean()) if mask.any() else np.nan,
                    "on_others": float(probability[others].mean()) if others.any() else np.nan,
                }
            )
        return rows, (probabilities, [samples[i].mask for i in given], [place[i] for i in given])

    settings = {"recipe": recipe, "weight": weight, "template": template, "seed": seed}
    label = f"PhraseCut, {prompts} prompts"
    rows = measure(segmenter, dataset, images, read, work, label, exact, keep, settings)
    return PhraseCutResult(prompts, pd.DataFrame(rows), exact)


def _category(structure: dict) -> str:
    """The most specific part of a PhraseCut phrase: relation, attribute or category."""
    if structure["relation_descriptions"]:
        return "relation"
    return "attribute" if structure["attributes"] else "category"


def absent_phrases(
    segmenter, dataset, per_image: int = 3, limit: int | None = None, seed: int = 0, keep: Path | None = None
) -> pd.DataFrame:
    """Prompts for objects that are not there: the mean area at t = 0.5 should be zero (section 3.3, negatives).

    Draws names from the phrases about other images that nothing here goes by (`PhraseCut.may_show`). `limit` and `keep`
    as in `phrasecut`.
    Columns: image_id, phrase, area (share of the image with p > 0.5), highest (largest probability).
    """
    names = sorted({structure["name"] for structure in dataset.structures})

    def read(image_id):
        absent = [name for name in names if not dataset.may_show(image_id, name)]
        chosen = np.random.default_rng([seed, image_id]).choice(absent, min(per_image, len(absent)), replace=False)
        return image_id, dataset[dataset.by_image[image_id][0]].image, [str(name) for name in chosen]

    def work(segmenter, image_id, image, phrases):
        segmenter.set_image(image)
        rows = []
        for phrase, probability in zip(phrases, segmenter.predict(phrases), strict=True):
            area = float((probability > 0.5).mean())
            rows.append({"image_id": image_id, "phrase": phrase, "area": area, "highest": float(probability.max())})
        return rows, None

    images = list(dataset.by_image)[:limit]
    settings = {"per_image": per_image, "seed": seed}
    rows = measure(segmenter, dataset, images, read, work, "PhraseCut, absent", keep=keep, settings=settings)
    return pd.DataFrame(rows)
