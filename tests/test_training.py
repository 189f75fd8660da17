"""The training loop, decoder training and CLIP pre-training: exact resume, refusals, and that something is learned."""

import numpy as np
import pandas as pd
import pytest
import torch

from clipseg_repro.datasets.phrasecut import PhraseCut
from clipseg_repro.errors import InputError
from clipseg_repro.loop import fast_attention, fit
from clipseg_repro.metrics import threshold_counts
from clipseg_repro.mini import pretrain as mini
from clipseg_repro.mini.curriculum import CYCLES, truth
from clipseg_repro.mini.export import build
from clipseg_repro.mini.phrases import Phrase
from clipseg_repro.models import embed_images, embed_texts, encode, load_model
from clipseg_repro.protocols import absent_phrases, phrasecut
from clipseg_repro.segmenter import load_segmenter
from clipseg_repro.training import Batch, align_film, conditions, experiments, fresh_decoder, train


class Killed(Exception):
    pass


def run_fit(folder, steps=12, stop=None, settings=None):
    """Fit a line by SGD with momentum; `stop` kills the run before that step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def batches(first):
        return (torch.from_numpy(np.random.default_rng(i).normal(size=(8, 3))).float() for i in range(first, steps))

    def step(i, x):
        if i == stop:
            raise Killed
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return {"loss": loss}

    state = {"model": model, "optimiser": optimiser}
    curve = fit("line", folder, batches, step, steps, state, settings or {"seed": 0}, every=3)
    return model, curve


def test_killed_run_resumes_to_the_same_weights_and_curve(tmp_path):
    whole, curve = run_fit(tmp_path / "whole")
    with pytest.raises(Killed):
        run_fit(tmp_path / "killed", stop=7)
    resumed, resumed_curve = run_fit(tmp_path / "killed")
    assert torch.equal(whole.weight, resumed.weight)
    columns = ["step", "loss"]
    assert resumed_curve[columns].equals(curve[columns])
    assert curve.loss.iloc[-1] < curve.loss.iloc[0]
    assert not list((tmp_path / "killed").glob(".*"))  # no half-written file is left


def test_folder_of_another_run_is_refused(tmp_path):
    run_fit(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        run_fit(tmp_path, settings={"seed": 1})


def test_fast_attention_equals_the_library_and_is_undone(tiny_model):
    model, _ = tiny_model
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    before = model.clip.vision_model(pixels).last_hidden_state
    with fast_attention(model):
        inside = model.clip.vision_model(pixels).last_hidden_state
    after = model.clip.vision_model(pixels).last_hidden_state
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)
    torch.testing.assert_close(before, inside, atol=0.05, rtol=0.05)


def test_experiments_are_the_papers():
    runs = experiments()
    assert runs["clipseg-pc+"]["visual"] and runs["clipseg-pc+"]["negative"] == 0.2
    assert all(run["iterations"] == 20_000 and run["batch"] == 64 for run in runs.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phrasecut")
    build(folder, splits={"train": 24, "val": 4, "test": 4}, workers=1)
    return folder


@pytest.fixture
def one_thread():
    """Exact equality is a property of our state, not of how several threads split a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder(folder):
    return torch.cat([p.flatten() for p in load_segmenter(str(folder), dtype="float32").model.decoder.parameters()])


def test_decoder_training_resumes_exactly_and_leaves_clip_alone(tiny_folder, data, tmp_path, monkeypatch, one_thread):
    budget = {"iterations": 8, "batch": 8, "phrases_per_image": 2, "validate_on": 2, "source": str(tiny_folder)}
    train("clipseg-pc+", data, tmp_path / "whole", **budget)
    with monkeypatch.context() as patch:
        calls = []

        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == 6:
                raise Killed
            return real(*args, **kwargs)

        from clipseg_repro import training

        real = training.decode
        patch.setattr(training, "decode", dies)
        with pytest.raises(Killed):
            train("clipseg-pc+", data, tmp_path / "killed", **budget)
    train("clipseg-pc+", data, tmp_path / "killed", **budget)
    assert torch.equal(decoder(tmp_path / "whole" / "model"), decoder(tmp_path / "killed" / "model"))
    trained, source = (load_segmenter(str(f), dtype="float32") for f in (tmp_path / "whole" / "model", tiny_folder))
    for ours, theirs in zip(trained.model.clip.parameters(), source.model.clip.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(decoder(tmp_path / "whole" / "model"), decoder(tiny_folder))


def test_aligned_film_starts_at_clips_own_similarity(tiny_folder):
    """The tiny model's joint space (48) fits the decoder (64) whole, so the signed sum of products is the similarity."""
    model = fresh_decoder(load_model(str(tiny_folder))[0], 64, seed=0)
    activations, texts = torch.randn(5, 7, 64) + 1, torch.randn(90, 48) - 2
    align_film(model, activations, texts)
    decoder, clip = model.decoder, model.clip
    shape = clip.visual_projection.weight * clip.vision_model.post_layernorm.weight
    seen, asked = (activations - activations.mean((0, 1))) @ shape.T, texts - texts.mean(0)
    signs = ((decoder.film_mul.weight @ shape) * decoder.reduces[0].weight).sum(1).sign()
    with torch.no_grad():
        patches, conditions = decoder.reduces[0](activations).flatten(0, 1), decoder.film_mul(texts) * signs
        found, similarity = patches @ conditions.T, seen.flatten(0, 1) @ asked.T
        assert np.corrcoef(found.flatten(), similarity.flatten())[0, 1] > 0.9999
        assert torch.equal(decoder.film_add(texts), torch.zeros(90, 64))


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


def test_conditions_are_mixed_by_the_text_weight(tiny_model):
    """text * w + visual * (1 - w); a sample without support is its text alone."""
    model, processor = tiny_model
    supports = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    texts, weights = ["a cat", "a dog", "a tree"], torch.tensor([0.25, 1.0, 0.5])
    batch = Batch(None, None, texts, supports, torch.tensor([0, 2]), weights, None)
    text, visual = embed_texts(model, processor, texts), embed_images(model, supports)
    expected = [0.25 * text[0] + 0.75 * visual[0], text[1], 0.5 * text[2] + 0.5 * visual[1]]
    torch.testing.assert_close(conditions(model, processor, batch), torch.stack(expected))


def test_unknown_run_is_named(data, tmp_path):
    with pytest.raises(InputError, match="unknown run 'clipseg-pcx'"):
        train("clipseg-pcx", data, tmp_path)


def test_pretraining_runs_and_saves_a_loadable_folder(tmp_path):
    mini.pretrain(tmp_path, budget=1e-6)  # one batch of every stage
    segmenter = load_segmenter(str(tmp_path / "model"))
    assert segmenter.model.config.vision_config.patch_size == 8
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert list(curve) == ["step", "image", "patch", "top1", "patch_top1", "seconds"]
    assert curve.step.tolist() == np.cumsum([len(cycle.stages) for cycle in CYCLES]).tolist()  # one row a cycle
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
    targets = torch.arange(2)
    clip = (torch.nn.functional.cross_entropy(similarity, targets)
            + torch.nn.functional.cross_entropy(similarity.T, targets)) / 2  # fmt: skip
    torch.testing.assert_close(mini.contrast(similarity, torch.eye(2, dtype=torch.bool), nothing), clip)
    both = torch.tensor([[True, True], [False, True]])
    by_row = torch.tensor([0.0, 0.0, np.log1p(np.exp(-2.0))], dtype=torch.float32)  # pairs (0,0), (0,1), (1,1)
    by_column = torch.tensor([np.log1p(np.exp(-3.0)), 0.0, 0.0], dtype=torch.float32)
    torch.testing.assert_close(
        mini.contrast(similarity, both, nothing), (by_row.mean() + by_column.mean()) / 2, atol=1e-5, rtol=1e-4
    )


def test_evaluation_counts_every_phrase_once(tiny_folder, data):
    segmenter, dataset = load_segmenter(str(tiny_folder), dtype="float32"), PhraseCut(data, "test")
    threads = torch.get_num_threads()
    result = phrasecut(segmenter, dataset)
    assert torch.get_num_threads() == threads
    assert result.samples["index"].tolist() == list(range(len(dataset)))
    for i, counts in enumerate(result.counts):  # as when one image waits for the other
        segmenter.set_image(dataset[i].image)
        (probability,) = segmenter.predict(dataset.phrases[i])
        alone = threshold_counts(probability, dataset[i].mask).numpy()
        assert np.abs(counts - alone).max() <= 2  # other sums in float32, so a pixel may pass a threshold
    table = result.table()
    groups = table[table.phrases.str.endswith(" phrases")].samples.sum()
    assert groups == table[table.phrases == "all"].samples.item() == len(dataset)
    assert (table.miou_low <= table.miou).all() and (table.miou <= table.miou_high).all()


def test_absent_phrases_are_absent(tiny_folder, data):
    dataset = PhraseCut(data, "test")
    rows = absent_phrases(load_segmenter(str(tiny_folder)), dataset)
    assert len(rows) == 3 * len(dataset.by_image)
    assert not any(dataset.may_show(row.image_id, row.phrase) for row in rows.itertuples())
