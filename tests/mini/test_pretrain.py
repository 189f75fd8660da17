"""Pre-training of the mini CLIP: its loss and its truth by hand, and that it makes a model."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clipseg_repro.mini import pretrain as mini
from clipseg_repro.mini import pretrain_backbones
from clipseg_repro.mini.curriculum import truth
from clipseg_repro.mini.phrases import Phrase, contrary, describe
from clipseg_repro.mini.scenes import SceneRules, compose
from clipseg_repro.models.forward import embed_images, encode
from clipseg_repro.models.loading import load_model
from clipseg_repro.models.variants import ViTSeg, ViTSegConfig
from clipseg_repro.segmenter import load_segmenter

VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
VISION |= {"image_size": 112, "patch_size": 8}


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
    """One batch of every stage, at 112 px and then at the paper's geometry; or only the latter, from a source."""
    mini.pretrain(tmp_path, budget=1e-6)
    mini.pretrain(tmp_path / "again", budget=1e-6, source=tmp_path / "small" / "model")
    for folder, size, patch, cycles in (
        (tmp_path / "small", 112, 8, short_curriculum),
        (tmp_path, 352, 16, mini.FINE),
        (tmp_path / "again", 352, 16, mini.FINE),
    ):
        segmenter = load_segmenter(str(folder / "model"))
        vision = segmenter.model.config.vision_config
        assert (vision.image_size, vision.patch_size) == (size, patch)
        assert segmenter.processor.image_processor.size["height"] == size
        curve = pd.read_csv(folder / "curve.csv")
        assert list(curve) == ["step", "image", "patch", "head", "top1", "patch_top1", "seconds", "device"]
        assert curve.step.tolist() == np.cumsum([len(cycle.stages) for cycle in cycles]).tolist()  # one row a cycle
        assert curve.seconds.is_monotonic_increasing
    once, again = (load_model(f / "model")[0].clip.state_dict() for f in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    ends = [torch.load(tmp_path / f"cycle-{n}" / "checkpoint.pt", weights_only=True)["state"]["model"] for n in (1, 2)]
    seen, said = (f"clip.{tower}_model.encoder.layers.0.self_attn.q_proj.weight" for tower in ("vision", "text"))
    torch.testing.assert_close(once[seen.removeprefix("clip.")], (ends[0][seen] + ends[1][seen]) / 2)
    assert torch.equal(once[said.removeprefix("clip.")], ends[1][said])
    assert not torch.equal(ends[0][said], ends[1][said])


@pytest.mark.parametrize("kind", ["clipseg", "vitseg", "clipseg-resnet"])
def test_a_larger_geometry_sees_enlarged_pictures_as_before(kind, tiny_model):
    """Every pixel repeated 2 x 2: the first kernel's outputs are the same. Positions that are all equal stay so."""
    model = {
        "clipseg": lambda: deepcopy(tiny_model[0]),
        "vitseg": lambda: ViTSeg(ViTSegConfig(vision_config=VISION, extract_layers=[0, 1], input_size=112)),
        "clipseg-resnet": lambda: pretrain_backbones.build_resnet(tiny_model[1].tokenizer),
    }[kind]().eval()
    picture = torch.randn(1, 3, 176, 176)
    larger = mini.enlarged(model).eval()
    first, positions = {
        "clipseg": (
            "clip.vision_model.embeddings.patch_embedding",
            "clip.vision_model.embeddings.position_embedding.weight",
        ),
        "vitseg": (
            "backbone.vit.embeddings.patch_embeddings.projection",
            "backbone.vit.embeddings.position_embeddings",
        ),
        "clipseg-resnet": ("backbone.visual.conv1", "backbone.visual.attnpool.positional_embedding"),
    }[kind]
    before = model.get_submodule(first)(picture)
    after = larger.get_submodule(first)(picture.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    torch.nn.init.constant_(model.get_parameter(positions), 3.0)
    placed = mini.enlarged(model).get_parameter(positions)
    assert placed.shape[-2] == 485
    torch.testing.assert_close(placed, torch.full_like(placed, 3.0))
    assert encode(larger, torch.zeros(1, 3, 352, 352))[-1].shape[1] == 485


def test_near_misses_are_false():
    """Every relation and attribute phrase of some scenes has one that differs in a word and names nothing there."""
    rng = np.random.default_rng(3)
    scenes = [compose(np.random.default_rng([4, i]), SceneRules(objects=(3, 5))) for i in range(20)]
    seen = set()
    for scene in scenes:
        for category in ("attribute", "relation"):
            for index in range(len(scene.objects)):
                phrase = describe(rng, scene, index, category)
                if phrase:
                    miss = contrary(rng, phrase)
                    changed = {k for k, v in vars(phrase).items() if v != vars(miss)[k]} - {"text"}
                    assert len(changed) == 1
                    assert len(set(phrase.text.split()) ^ set(miss.text.split())) == 2
                    seen |= changed
        assert contrary(rng, describe(rng, scene, 0, "category")) is None
    assert seen == {"colour", "size", "relation"}


def test_truth_by_hand():
    """Two images; four phrases are said of them, one to be false, and one of neither."""
    cat, dog = 0, 1
    objects = np.array([[cat, 1, 0], [dog, 0, 2], [cat, 0, 0]])  # a red cat and a large dog; a cat
    owners = np.array([0, 0, 1])
    phrases = [
        Phrase("red cat", frozenset([cat]), "cat", "red"),
        Phrase("cat", frozenset([cat]), "cat"),
        Phrase("cat left of the dog", frozenset([cat]), "cat", relation="left of", other=frozenset([dog])),
        Phrase("large dog", frozenset([dog]), "dog", size="large"),
    ]
    phrases.append(replace(phrases[2], text="cat right of the dog", relation="right of"))  # said not to be true
    true, unknown = truth(objects, owners, phrases, [0, 1, 0, -1, 0], [True, True, True, False, False], 2)
    assert true.tolist() == [[True, True, True, True, False], [False, True, False, False, False]]
    assert unknown.tolist() == [[False] * 5, [False, False, True, False, True]]


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
