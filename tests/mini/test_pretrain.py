"""Pre-training of the mini CLIP: its loss and its truth by hand, and that it makes a model."""

import numpy as np
import pandas as pd
import pytest
import torch

from clipseg_repro.mini import pretrain as mini
from clipseg_repro.mini.curriculum import truth
from clipseg_repro.mini.phrases import Phrase
from clipseg_repro.models.forward import embed_images, encode
from clipseg_repro.models.loading import load_model
from clipseg_repro.segmenter import load_segmenter


def test_rescaling_leaves_clip_as_it_is(tiny_folder):
    model, _ = load_model(str(tiny_folder))
    pixels = torch.randn(3, 3, 112, 112)
    *_, before = encode(model, pixels)
    embedded = embed_images(model, pixels)
    mini.rescale(model, pixels)
    *_, after = encode(model, pixels)
    assert after.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(after, before / before.std(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embed_images(model, pixels), embedded, atol=2e-3, rtol=1e-3)  # layer norm's epsilon


def test_pretraining_runs_and_saves_a_loadable_folder(tmp_path, short_curriculum):
    mini.pretrain(tmp_path, budget=1e-6)  # one batch of every stage
    segmenter = load_segmenter(str(tmp_path / "model"))
    assert segmenter.model.config.vision_config.patch_size == 8
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert list(curve) == ["step", "image", "patch", "top1", "patch_top1", "seconds"]
    assert (
        curve.step.tolist() == np.cumsum([len(cycle.stages) for cycle in short_curriculum]).tolist()
    )  # one row a cycle
    assert curve.seconds.is_monotonic_increasing


def test_truth_by_hand():
    """Two images, three phrases, one said of each image and one of neither."""
    cat, dog = 0, 1
    objects = np.array([[cat, 1, 0], [dog, 0, 2], [cat, 0, 0]])  # a red cat and a large dog; a cat
    owners = np.array([0, 0, 1])
    phrases = [
        Phrase("red cat", frozenset([cat]), "cat", "red"),
        Phrase("cat", frozenset([cat]), "cat"),
        Phrase("cat left of the dog", frozenset([cat]), "cat", relation="left of", other=frozenset([dog])),
        Phrase("large dog", frozenset([dog]), "dog", size="large"),
    ]
    true, unknown = truth(objects, owners, phrases, [0, 1, 0, -1], 2)
    assert true.tolist() == [[True, True, True, True], [False, True, False, False]]
    assert unknown.tolist() == [[False] * 4, [False, False, True, False]]


def test_contrast_by_hand():
    """With one true pair per row and column it is CLIP's loss; a further true pair is no negative."""
    similarity = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    sides = [torch.nn.functional.cross_entropy(side, torch.arange(2)) for side in (similarity, similarity.T)]
    clip = sum(sides) / 2
    torch.testing.assert_close(mini.contrast(similarity, torch.eye(2, dtype=torch.bool), nothing), clip)
    both = torch.tensor([[True, True], [False, True]])
    by_row = torch.tensor([0.0, 0.0, np.log1p(np.exp(-2.0))], dtype=torch.float32)  # pairs (0,0), (0,1), (1,1)
    by_column = torch.tensor([np.log1p(np.exp(-3.0)), 0.0, 0.0], dtype=torch.float32)
    torch.testing.assert_close(
        mini.contrast(similarity, both, nothing), (by_row.mean() + by_column.mean()) / 2, atol=1e-5, rtol=1e-4
    )
