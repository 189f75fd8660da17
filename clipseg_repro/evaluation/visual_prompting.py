"""Visual prompt engineering (paper, section 3 and Table 2): which way of pointing at an object does CLIP understand?"""

from pathlib import Path

import numpy as np
import pandas as pd
from torch.nn import functional as F

from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.per_image import measure
from clipseg_repro.prompts import RECIPES, TEST_TEMPLATE, VisualPrompt

FEWEST_NAMES = 3  # with fewer names to choose from, an image says little about a recipe: left out, as in the paper
LARGEST_SCALE = 100  # CLIP never lets its logit scale exceed this


def whole_image(image) -> VisualPrompt:
    """The image as it is, as a prompt: where all is object, a recipe that changes only the background does nothing."""
    height, width = image.shape[:2]
    return VisualPrompt(image, np.ones((height, width), bool), "BG intensity 0%")


def name_probabilities(segmenter, prompts, names) -> np.ndarray:
    """CLIP's zero-shot classification of K images, engineered by their recipes, over N names: (K, N), rows sum to 1.

    prompts: K VisualPrompts. names: N object names, put into "a photo of a {}.". Softmax of cosines times CLIP's own
    logit scale. Raises InputError for a model whose images and texts have no space in common (ViTSeg).
    """
    clip = segmenter.model.base_model
    if not hasattr(clip, "logit_scale"):
        raise InputError(
            f"a '{segmenter.model.config.model_type}' model cannot name images: give one with a whole CLIP"
        )
    images = F.normalize(segmenter.conditions(prompts), dim=-1)
    texts = F.normalize(segmenter.conditions([TEST_TEMPLATE.format(name) for name in names]), dim=-1)
    scale = clip.logit_scale.detach().float().exp().clamp(max=LARGEST_SCALE)
    return (scale * images @ texts.T).softmax(-1).cpu().numpy()


def visual_prompt_gain(
    segmenter, dataset, recipes=tuple(RECIPES), limit: int | None = None, seed: int = 0, keep: Path | None = None
) -> pd.DataFrame:
    """Table 2: CLIP's probability of an object's name before and after a recipe points at the object.

    One target per image, drawn with `seed` among the things named there (see `Samples.things`);
    images with fewer than three are skipped. `limit` takes the first images only; `keep`: as in `per_image.measure`.
    Returns a DataFrame, one row per image: image_id, target, names (how many), original, and a column per recipe,
    probabilities in [0, 1]. Table 2's figure is the mean of `recipe - original`, in percent.
    """

    def read(image_id):
        return image_id, dataset.things(image_id), dataset[dataset.by_image[image_id][0]].image

    def work(segmenter, image_id, things, image):
        if len(things) < FEWEST_NAMES:
            return [], None
        names = list(things)
        target = int(np.random.default_rng([seed, image_id]).integers(len(names)))
        prompts = [whole_image(image), *(VisualPrompt(image, things[names[target]], recipe) for recipe in recipes)]
        found = name_probabilities(segmenter, prompts, names)[:, target].tolist()
        row = {"image_id": image_id, "target": names[target], "names": len(names)}
        return [row | dict(zip(["original", *recipes], found, strict=True))], None

    settings = {"recipes": recipes, "seed": seed}
    images = list(dataset.by_image)[:limit]
    rows = measure(segmenter, dataset, images, read, work, "visual prompts", keep=keep, settings=settings)
    if not rows:
        raise InputError(f"no image has {FEWEST_NAMES} names: take another split or a larger `limit`")
    return pd.DataFrame(rows)
