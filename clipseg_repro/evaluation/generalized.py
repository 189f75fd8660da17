"""Generalized prompts on LVIS: objects asked for by what they are good for, can do or have (paper, Table 8)."""

from pathlib import Path

import numpy as np
import pandas as pd

from clipseg_repro.datasets.lvis import LVIS
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.by_class import ClassResult
from clipseg_repro.evaluation.metrics import SegmentationMetrics
from clipseg_repro.evaluation.per_image import measure

SIT = (
    *("armchair", "sofa", "loveseat", "deck chair", "rocking chair", "highchair", "folding chair", "chair", "recliner"),
    "wheelchair",
)
BIRDS = ("eagle", "bird", "duck", "gull", "owl", "seabird", "pigeon", "goose", "parakeet")
# Family of Table 8: prompt -> the objects that it means (paper, appendix).
PROMPTS = {
    "affordances": {
        "sit on": SIT,
        "drink from": ("bottle", "beer bottle", "water bottle", "wine bottle", "thermos bottle"),
        "ride on": ("horse", "pony", "motorcycle"),
    },
    "attributes": {
        "can fly": ("jet plane", "airplane", "fighter jet", *BIRDS),
        "can be driven": ("minivan", "bus", "cab", "jeep", "ambulance", "car"),
        "can swim": ("duck", "duckling", "water scooter", "penguin", "boat", "kayak", "canoe"),
    },
    "meronymy": {
        "has wheels": (
            *("dirt bike", "car", "wheelchair", "motorcycle", "bicycle", "cab", "minivan", "bus", "jeep", "ambulance"),
        ),
        "has legs": (
            *(*SIT, "horse", "pony", *BIRDS, "dog", "cat", "flamingo", "penguin", "cow", "puppy", "sheep"),
            *("black sheep", "ostrich", "ram", "chicken", "person"),
        ),
    },
}


def generalized(segmenter, data: LVIS, limit: int | None = None, keep: Path | None = None) -> ClassResult:
    """Every annotated object of a picture that a prompt means, asked for by that prompt: families are the folds,
    prompts the classes. `limit` takes so many pictures, `keep`: as in `per_image.measure`."""
    place = {words: c for c, words in enumerate(data.prompts)}
    prompts = [
        (family, prompt, {place[name] for name in names if name in place})
        for family, own in PROMPTS.items()
        for prompt, names in own.items()
    ]
    shown = {i: [n for n, (*_, meant) in enumerate(prompts) if meant & data.labelled(i)] for i in range(len(data))}
    pictures = [i for i, asked in shown.items() if asked][:limit]
    if not pictures:
        raise InputError(f"no picture of {data.title} shows what a prompt of Table 8 means: use more data")
    samples = [(i, n) for i in pictures for n in shown[i]]
    place_of = {sample: k for k, sample in enumerate(samples)}
    metrics = SegmentationMetrics(num_groups=len(samples))

    def read(i):
        objects = {n: prompts[n][2] & data.labelled(i) for n in shown[i]}
        masks = [np.any([data.mask(i, c) == 1 for c in own], 0).astype(np.uint8) for own in objects.values()]
        return data.image(i), [prompts[n][1] for n in shown[i]], masks, [place_of[i, n] for n in shown[i]]

    def work(segmenter, image, asked, masks, places):
        segmenter.set_image(image)
        return [], (segmenter.predict(asked), masks, places)

    measure(segmenter, data, pictures, read, work, f"{data.title}: generalized prompts", metrics, keep, {})
    rows = [{"fold": prompts[n][0], "picture": data.ids[i], "class": prompts[n][1]} for i, n in samples]
    return ClassResult(pd.DataFrame(rows), metrics.counts.numpy())
