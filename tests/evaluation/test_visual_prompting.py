"""Table 2's protocol, against transformers' own CLIP forward pass and hand-made data."""

import numpy as np
import pytest
import torch

from clipseg_repro.datasets import Sample
from clipseg_repro.datasets.phrasecut import Samples
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.visual_prompting import name_probabilities, visual_prompt_gain, whole_image
from clipseg_repro.prompts import RECIPES, VisualPrompt, to_pixels


def library_probabilities(segmenter, image, names):
    """CLIP's zero-shot classification by transformers' own forward pass."""
    tokens = segmenter.processor.tokenizer(
        [f"a photo of a {name}." for name in names], padding=True, return_tensors="pt"
    )
    pixels = to_pixels([image], segmenter.processor.image_processor)
    with torch.no_grad():
        output = segmenter.model.clip(pixel_values=pixels, **tokens)
    return output.logits_per_image.softmax(-1)[0].numpy()


class Annotated(Samples):
    """A data set of one phrase per (image_id, image, name, mask)."""

    picture = mask = fingerprint = None  # asked for by training, or by measurements that are kept

    def __init__(self, *rows):
        self.rows = rows
        names = [name for _, _, name, _ in rows]
        structures = [{"name": name, "relation_descriptions": []} for name in names]
        super().__init__(names, structures, [image_id for image_id, *_ in rows], "rows")

    def check_pictures(self):
        pass

    def __getitem__(self, i):
        image_id, image, name, mask = self.rows[i]
        return Sample(image, mask.astype(np.uint8), name, image_id)


@pytest.fixture
def scene(picture, picture_mask):
    """Image 7 shows a cat, two dogs (one of them also called a hound) and a tree; image 8 two things."""
    left, right, below = (np.zeros_like(picture_mask) for _ in range(3))
    left[:, :30], right[20:60, 100:], below[80:, 40:] = True, True, True
    two = [(8, picture, "cat", picture_mask), (8, picture, "dog", left), (8, picture, "hound", left)]
    dogs = [(7, picture, "dog", left), (7, picture, "dog", right), (7, picture, "hound", right)]
    return Annotated(*two, *dogs, (7, picture, "tree", below), (7, picture, "cat", picture_mask))


def test_probabilities_of_the_image_itself_are_transformers(segmenter, picture):
    names = ["cat", "dog", "red car", "house"]
    (ours,) = name_probabilities(segmenter, [whole_image(picture)], names)
    np.testing.assert_allclose(ours, library_probabilities(segmenter, picture, names), atol=1e-5)


def test_a_mask_of_everything_changes_nothing(segmenter, picture):
    idle = [r for r, recipe in RECIPES.items() if not (recipe.tint or recipe.outline)]
    prompts = [VisualPrompt(picture, np.ones(picture.shape[:2], bool), recipe) for recipe in idle]
    found = name_probabilities(segmenter, prompts, ["cat", "dog", "tree"])
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-5)


def test_one_row_per_image_with_three_names(segmenter, scene, picture):
    table = visual_prompt_gain(segmenter, scene)
    assert list(table.columns) == ["image_id", "target", "names", "original", *RECIPES]
    (row,) = table.to_dict("records")
    assert (row["image_id"], row["names"]) == (7, 3)
    names = ["cat", "dog", "tree"]
    expected = library_probabilities(segmenter, picture, names)[names.index(row["target"])]
    assert row["original"] == pytest.approx(expected, abs=1e-5)


def test_a_name_means_all_that_is_called_so(scene, picture_mask):
    things = scene.things(7)
    assert list(things) == ["cat", "dog", "tree"]
    np.testing.assert_array_equal(things["cat"], picture_mask)
    np.testing.assert_array_equal(things["dog"], scene.rows[3][3] | scene.rows[4][3])


def test_the_recipe_is_applied_to_the_target(segmenter, scene, picture):
    recipe = "BG intensity 0%"
    (row,) = visual_prompt_gain(segmenter, scene, [recipe]).to_dict("records")
    prompt = VisualPrompt(picture, scene.things(7)[row["target"]], recipe)
    (found,) = name_probabilities(segmenter, [prompt], ["cat", "dog", "tree"])
    assert row[recipe] == pytest.approx(found[["cat", "dog", "tree"].index(row["target"])], abs=1e-6)


def test_same_seed_same_table(segmenter, scene):
    first, second = (visual_prompt_gain(segmenter, scene, ["crop"], seed=3) for _ in range(2))
    assert first.equals(second)


def test_no_image_with_three_names(segmenter, scene):
    with pytest.raises(InputError, match="no image has 3 names"):
        visual_prompt_gain(segmenter, scene, limit=1)  # image 8
