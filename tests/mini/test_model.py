"""The shipped mini model: loads as transformers has it, is small, and chooses by the prompt."""

import numpy as np
import torch
from transformers import AutoProcessor, CLIPSegForImageSegmentation

from clipseg_repro import load_segmenter
from clipseg_repro.mini.scenes import SceneRules, compose
from clipseg_repro.mini.vocabulary import load_vocabulary
from clipseg_repro.models.loading import MINI

RULES = SceneRules(sizes=((320, 320),), objects=(2, 2), scale=(0.35, 0.5), repeat=0.0)


def scenes(count=24):
    for seed in range(count):
        scene = compose(np.random.default_rng([77, seed]), RULES)
        yield scene, [load_vocabulary()[thing.kind].name for thing in scene.objects]


def test_folder_is_small_and_loads_with_transformers_alone():
    assert sum(f.stat().st_size for f in MINI.iterdir()) <= 10_000_000
    model = CLIPSegForImageSegmentation.from_pretrained(MINI, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MINI)
    scene, names = next(scenes())
    inputs = processor(text=names, images=[scene.image] * len(names), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    segmenter = load_segmenter(device="cpu", dtype="float32")
    segmenter.set_image(scene.image)
    torch.testing.assert_close(segmenter.logits(names), logits, atol=1e-4, rtol=1e-5)


def test_a_word_lights_up_its_object_and_neither_the_other_nor_the_background():
    segmenter = load_segmenter(device="cpu", dtype="float32")
    own, other, background = [], [], []
    for scene, names in scenes():
        segmenter.set_image(scene.image)
        masks = [thing.mask for thing in scene.objects]
        for (mine, theirs), probability in zip((masks, masks[::-1]), segmenter.predict(names), strict=True):
            own.append(probability[mine].mean())
            other.append(probability[theirs].mean())
            background.append(probability[~(mine | theirs)].mean())
    assert np.mean(np.array(own) > np.array(other)) > 0.8
    assert np.mean(own) > 3 * np.mean(other) > 3 * np.mean(background)
