"""Backbones and baselines: equal to timm, open_clip and the authors' classes on small sizes; saved, loaded, driven,
trained.

data/backbones.json holds the figures of those three; data/make_backbones.py made them from the inputs here and says
how.
"""

import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import spread, tiny_config, tiny_processor
from full_size import figures, image, set_random_weights
from safetensors.torch import save_file
from transformers import CLIPSegForImageSegmentation

from clipseg_repro import Segmenter, VisualPrompt, interpolate, load_segmenter
from clipseg_repro.datasets.phrasecut import PhraseCut, PhraseCutPlus
from clipseg_repro.errors import InputError
from clipseg_repro.evaluation.visual_prompting import name_probabilities
from clipseg_repro.mini import pretrain, pretrain_backbones
from clipseg_repro.models import loading
from clipseg_repro.models.forward import decode, embed_images, embed_texts, encode
from clipseg_repro.models.loading import load_model
from clipseg_repro.models.towers import FILES, read_tower
from clipseg_repro.models.variants import MODELS, ClipDeconv, ClipDeconvDecoder, ViTSegDecoder, adapted, backbone
from clipseg_repro.study.scales import SCALES, get_scale
from clipseg_repro.training.decoders import experiments, fresh_decoder, train

STORED = Path(__file__).parents[1] / "data" / "backbones.json"
TOKENS = [[298, 5, 17, 299], [298, 200, 299, 0]]  # of 300 words, the last of which ends a text
GRID, DECODER_SIDE = 6, 88  # of the decoders' patches, and what ViTSeg's 96 px are resized to
DECODERS = {"clip-deconv": ClipDeconvDecoder, "vitseg": ViTSegDecoder}


def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))


def published_weights(shapes):
    """Random weights by the names and shapes that the publishers use, the same on every machine."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = (torch.rand(shape, generator=generator) - 0.5) * 12**0.5
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.long)
        elif len(shape) > 1 and "embed" not in name and "token" not in name:
            inputs = shape[0] if name == "text_projection" else values[0].numel()  # which is stored transposed
            state[name] = values * inputs**-0.5
        else:
            ones = re.search(r"((norm|bn|ln_)\w*|downsample\.1)\.(weight|running_var)$|norm\d?\.weight$", name)
            state[name] = values * 0.1 + (1.0 if ones else 0.0)
    return state


def decoder_inputs(kind):
    """(activations, conditions) of two images: smooth random numbers, the same on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
    layers = 1 if kind == "clip-deconv" else 3
    activations = [torch.rand((2, 1 + GRID**2, 768), generator=generator) * 2 - 1 for _ in range(layers)]
    return activations, torch.rand((2, 512), generator=generator) * 2 - 1


def decoder_config(kind):
    """The config of a paper-scale model, as far as its decoder needs it, for the inputs above."""
    options = {"extract_layers": [9]} if kind == "clip-deconv" else {"input_size": DECODER_SIDE}
    return MODELS[kind].config_class(vision_config={"patch_size": 16}, **options)


def check(found, expected):
    tolerance = 1e-5 * expected["range"]
    for key, value in figures(found).items():
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=tolerance, err_msg=key)


def tower(name, tmp_path, **options):
    """Our model of a small published file with random weights, through read_tower."""
    save_file(published_weights(stored()[name]["shapes"]), tmp_path / "model.safetensors")
    kind, sizes, tensors = read_tower(tmp_path / "model.safetensors")
    sizes.setdefault("text_config", {"num_hidden_layers": 1})["eos_token_id"] = TOKENS[0][-1]
    model = MODELS[kind](MODELS[kind].config_class(**sizes | options)).eval()
    left = model.backbone.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys
    own = r"projection\.|text_" if kind == "vitseg" else r".*num_batches_tracked"
    assert all(re.match(own, key) for key in left.missing_keys)
    return model


def test_vit_equals_timm(tmp_path):
    model = tower("timm vit", tmp_path, extract_layers=[0, 1], input_size=80)
    expected, pixels = stored()["timm vit"], image("query", 80)  # resized to 64, as released
    for layer, activation in enumerate(encode(model, pixels)):
        check(activation, expected[f"block {layer}"])
    with torch.no_grad():
        cls = model.backbone.vit.layernorm(encode(model, pixels)[-1][:, 0])
        check(cls, expected["cls"])
        torch.testing.assert_close(embed_images(model, pixels), model.backbone.projection(cls))


def test_resnet_clip_equals_open_clip(tmp_path):
    model = tower("open_clip resnet", tmp_path)
    expected, pixels, tokens = stored()["open_clip resnet"], image("query", 64), torch.tensor(TOKENS)
    with torch.no_grad():
        for i, stage in enumerate(model.backbone.visual.stages(pixels)):
            check(stage, expected[f"stage {i}"])
        check(embed_images(model, pixels), expected["image"])
        check(backbone(model).embed_texts(tokens, torch.ones_like(tokens)), expected["text"])


def test_stages_become_one_grid_with_their_mean_in_front(tmp_path):
    """At 96 px: stages of 12, 6 and 3 places a side on a grid of 6. Shrinking by two averages fours, growing keeps the
    mean."""
    model = tower("open_clip resnet", tmp_path)
    found = encode(model, image("query", 96))
    with torch.no_grad():
        stages = list(model.backbone.visual.stages(image("query", 96)))[1:]
    assert [tuple(a.shape) for a in found] == [(1, 37, stage.shape[1]) for stage in stages]
    for activation in found:
        torch.testing.assert_close(activation[:, 0], activation[:, 1:].mean(1))
    halved = torch.nn.functional.avg_pool2d(stages[0], 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[0][:, 1:], halved)
    torch.testing.assert_close(found[1][:, 1:], stages[1].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kind", DECODERS)
def test_baselines_decoders_equal_the_authors(kind):
    config = decoder_config(kind)
    decoder = DECODERS[kind](config).eval()
    set_random_weights(decoder, "decoder")
    activations, conditions = decoder_inputs(kind)
    with torch.no_grad():
        logits = decode(SimpleNamespace(decoder=decoder, config=config), activations, conditions)
    assert logits.shape[-1] == (DECODER_SIDE if kind == "vitseg" else 16 * GRID)
    for row, expected in zip(logits, stored()[kind], strict=True):
        check(row, expected)


def test_decoder_parameters_by_hand():
    d, p = 64, 512
    film, deconvolution = 2 * (p * d + d), d * 16 * 16 + 1
    block = 4 * (d * d + d) + 2 * 2 * d + (d * 2048 + 2048) + (2048 * d + d)
    mlp = 2 * (d * d + d)
    count = {
        kind: sum(parameter.numel() for parameter in DECODERS[kind](decoder_config(kind)).parameters())
        for kind in DECODERS
    }
    assert count["clip-deconv"] == (768 * d + d) + film + mlp + deconvolution
    assert count["vitseg"] == 3 * (768 * d + d) + film + 3 * block + deconvolution == 1_073_153  # CLIPSeg's


def tiny(kind, processor):
    """An untrained model of a kind for 112 px, with the sizes of the shared tiny CLIPSeg."""
    base = tiny_config(processor.tokenizer)
    vision = base.vision_config.to_dict()
    if kind == "clip-deconv":
        return adapted(CLIPSegForImageSegmentation(base), kind)
    options = {"text_config": base.text_config.to_dict(), "projection_dim": 48, "extract_layers": [0, 1, 2]}
    options["decoder_intermediate_size"] = 128
    if kind == "vitseg":  # the ViT's own size is smaller, as in the paper it is larger
        options |= {"vision_config": vision | {"image_size": 64, "patch_size": 16}, "input_size": 112}
    else:
        sizes = {"stages": [1, 1, 1], "strides": [1, 2, 1], "width": 8, "hidden_size": 128, "num_attention_heads": 4}
        options["vision_config"] = sizes | {"image_size": 64, "patch_size": 8}
    return MODELS[kind](MODELS[kind].config_class(**options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> save_pretrained folder of a tiny model with random weights."""
    folder, processor = tmp_path_factory.mktemp("variants"), tiny_processor()
    torch.manual_seed(0)
    for kind in VARIANTS:
        spread(tiny(kind, processor)).save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in VARIANTS}


VARIANTS = [kind for kind in MODELS if kind != "clipseg"]
TOKENS_AND_WIDTHS = {  # of 112 px: 14 x 14 patches of 8; the ViT's 4 x 4 of 16 in 64 px
    "clip-deconv": [(197, 64)],
    "vitseg": [(17, 64)] * 3,
    "clipseg-resnet": [(197, 32), (197, 64), (197, 128)],
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_saved_models_load_and_are_driven_by_every_prompt(kind, folders, tmp_path, picture, picture_mask):
    segmenter = load_segmenter(folders[kind], device="cpu", dtype="float32")
    assert isinstance(segmenter.model, MODELS[kind])
    activations = encode(segmenter.model, torch.zeros(2, 3, 112, 112))
    assert [tuple(a.shape) for a in activations] == [(2, *shape) for shape in TOKENS_AND_WIDTHS[kind]]
    visual = VisualPrompt(picture, picture_mask)
    prompts = ["a cat", visual, interpolate("a dog", visual, 0.3)]
    segmenter.set_image(picture)
    maps = segmenter.predict(prompts)
    assert maps.shape == (3, 90, 140)
    assert segmenter.logits(prompts).shape == (3, 112, 112)
    assert min(np.abs(maps[0] - maps[1]).max(), np.abs(maps[0] - maps[2]).max()) > 1e-3
    segmenter.model.save_pretrained(tmp_path)
    segmenter.processor.save_pretrained(tmp_path)
    again = load_segmenter(tmp_path, device="cpu", dtype="float32")
    again.set_image(picture)
    np.testing.assert_array_equal(again.predict(prompts), maps)


def test_clip_deconv_reads_the_deepest_layer_of_the_same_clip(tiny_model):
    model, _ = tiny_model
    made = adapted(model, "clip-deconv")
    pixels = torch.randn(1, 3, 112, 112)
    (found,) = encode(made, pixels)
    assert torch.equal(found, encode(model, pixels)[-1])
    assert model.config.extract_layers == [0, 1, 2] and isinstance(made, ClipDeconv)


def test_random_clip_is_another_and_always_the_same(tiny_folder, tiny_model):
    (first, processor), (second, _) = (load_model(tiny_folder, pretrained=False) for _ in range(2))
    one, two, trained = (embed_texts(m, processor, ["a cat"]) for m in (first, second, tiny_model[0]))
    assert torch.equal(one, two) and not torch.allclose(one, trained, atol=0.1)
    assert first.config.to_dict() == tiny_model[0].config.to_dict()


@pytest.fixture
def published(tmp_path):
    """The small ViT of ten equal blocks, as deep as CLIPSeg's layers need, as a file of timm's."""
    two = stored()["timm vit"]["shapes"]
    ten = {re.sub(r"blocks\.0", f"blocks.{i}", k): v for i in range(10) for k, v in two.items() if "blocks.1" not in k}
    state = published_weights(ten)
    save_file(state, tmp_path / "model.safetensors")
    return state, tmp_path / "model.safetensors"


def test_published_vit_becomes_a_vitseg(published, tiny_clip, tmp_path, monkeypatch, picture):
    """From a file, and from its Hub id: text tower and tokenizer of the CLIP, and the same random linear layer each
    time."""
    _, path = published
    model, processor = load_model(path, clip=tiny_clip)
    (name,) = [name for name in FILES if "vit" in name]
    monkeypatch.setattr(loading, "fetched", lambda source, part: path.parent if source == name else None)
    same, _ = load_model(name, clip=tiny_clip)
    assert torch.equal(model.backbone.projection.weight, same.backbone.projection.weight)
    clip, _ = loading._over_clip(tiny_clip)
    assert torch.equal(embed_texts(model, processor, ["a cat"]), embed_texts(clip, processor, ["a cat"]))
    segmenter = Segmenter(model, processor, device="cpu", dtype="float32")
    segmenter.set_image(picture)
    assert segmenter.logits("a cat").shape == (1, 352, 352)


def test_published_files_must_be_complete_and_ours(published, tiny_clip, tmp_path):
    state, path = published
    renamed = {k.replace("blocks.3.norm1", "blocks.3.norm9"): v for k, v in state.items()}
    save_file(renamed, path)
    with pytest.raises(InputError, match=r"missing blocks\.3\.norm1\.bias.*unexpected blocks\.3\.norm9\.bias"):
        load_model(path, clip=tiny_clip)
    save_file(state | {"norm.weight": torch.ones(3)}, path)
    with pytest.raises(InputError, match=r"do not fit together .*vit\.layernorm\.weight.*\[3\].*\[128\]"):
        load_model(path, clip=tiny_clip)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="neither a ViT of timm nor a CLIP ResNet of open_clip"):
        load_model(path, clip=tiny_clip)
    save_file(state | {"norm.weight": state["norm.weight"].int()}, path)
    with pytest.raises(InputError, match=r"another model's: norm\.weight is a tensor of torch\.int32"):
        load_model(path, clip=tiny_clip)
    save_file(state | {"norm.weight": torch.full_like(state["norm.weight"], torch.nan)}, path)
    with pytest.raises(InputError, match=r"NaN or infinite numbers \['backbone\.vit\.layernorm\.weight'\]"):
        load_model(path, clip=tiny_clip)
    save_file(state | {"cls_token": torch.ones(())}, path)
    with pytest.raises(InputError, match="incomplete: they lack what tells the sizes"):
        load_model(path, clip=tiny_clip)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"\(a Git LFS pointer.*give the Hub id"):
        load_model(path, clip=tiny_clip)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="damaged or no safetensors file"):
        load_model(path, clip=tiny_clip)


def test_what_a_model_cannot_do_is_said(folders, tiny_folder):
    vitseg, processor = load_model(folders["vitseg"])
    with pytest.raises(InputError, match="96 x 96 px: this model takes 112 x 112"):
        encode(vitseg, torch.zeros(1, 3, 96, 96))
    with pytest.raises(InputError, match="squares of a multiple of its patch size 8"):
        encode(load_model(folders["clipseg-resnet"])[0], torch.zeros(1, 3, 100, 100))
    with pytest.raises(InputError, match="masks the attention of CLIP's ViT"):
        embed_images(vitseg, torch.zeros(1, 3, 112, 112), torch.ones(1, 112, 112), ("cls", "last"))
    with pytest.raises(InputError, match="source is a 'clipseg' model, and this run trains a 'vitseg'"):
        adapted(load_model(tiny_folder)[0], "vitseg")
    with pytest.raises(InputError, match="a 'vitseg' model cannot name images"):
        name_probabilities(Segmenter(vitseg, processor, device="cpu", dtype="float32"), [], ["cat"])
    processor.image_processor.size = {"height": 128, "width": 128}
    processor.save_pretrained(folders["vitseg"])
    with pytest.raises(InputError, match="makes images of 128 px, the model takes 112"):
        load_model(folders["vitseg"])
    tiny_processor().save_pretrained(folders["vitseg"])


def test_every_run_has_a_source_or_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPSEG_REPRO_RESULTS", str(tmp_path))
    scale = get_scale("mini")
    for model, maker in {"vitseg": "mini-vit", "clipseg-resnet": "mini-resnet-clip"}.items():
        with pytest.raises(InputError, match=f"clipseg-repro train {maker}$"):
            scale.source(model)
        folder = tmp_path / "training" / maker / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        assert scale.source(model) == str(folder)
        assert maker in pretrain_backbones.PRETRAINING and SCALES["paper"].source(model) in FILES
    assert scale.source("clip-deconv") == scale.source("clipseg") == "mini"


@pytest.mark.parametrize("run", ["clip-deconv", "vitseg-pc+", "vitseg-pc", "clipseg-rn50x4-pc+", "no-clip-pretraining"])
def test_runs_train_the_decoder_alone(run, folders, tiny_folder, data, tmp_path):
    """By the mini scale's settings, but few steps; the loss of the last is below that of the first."""
    kind = experiments()[run]["model"]
    source = tiny_folder if kind in ("clipseg", "clip-deconv") else folders[kind]
    budget = SCALES["mini"].training | {"iterations": 8, "batch": 8, "learning_rate": 3e-3, "validate_on": 1}
    trained = train(run, data, tmp_path, source=str(source), **budget).model
    before, _ = load_model(source, pretrained=experiments()[run]["pretrained"])
    after, _ = load_model(tmp_path / "model")
    for ours, theirs in zip(
        after.base_model.state_dict().values(), before.base_model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(after.decoder.film_mul.weight, trained.decoder.film_mul.weight)
    untrained = fresh_decoder(adapted(before, kind), 64, seed=0).decoder
    changed = {n for n, p in after.decoder.named_parameters() if not torch.equal(p, untrained.state_dict()[n])}
    assert {n.split(".")[0] for n in changed} == {n.split(".")[0] for n, _ in untrained.named_parameters()}
    losses = [float(line.split(",")[1]) for line in (tmp_path / "curve.csv").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0]


def test_examples_alone_leave_out_what_has_none(data):
    """A text weight of (0, 0), as the released only_visual: unique phrases are neither samples nor negatives."""
    dataset = PhraseCut(data, "train")
    alone = PhraseCutPlus(dataset, 0.5, (0.0, 0.0), phrases_per_image=2)
    assert len(alone) == len(dataset.supported) < len(dataset)
    assert {alone.key(n)[1] for n in range(len(alone))} == set(dataset.supported)
    drawn = [sample for n in range(20) for sample in alone[alone.key(n)]]
    assert all(len(dataset.by_phrase[sample.phrase]) > 1 for sample in drawn)
    assert len(PhraseCutPlus(dataset)) == len(dataset)


@pytest.mark.parametrize("name", ["mini-resnet-clip", "mini-vit"])
def test_mini_towers_are_made_and_segment(name, tmp_path, picture, short_curriculum):
    """One batch of every stage, the last at the paper's geometry."""
    pretrain_backbones.PRETRAINING[name](tmp_path, budget=1e-6)
    segmenter = load_segmenter(tmp_path / "model", device="cpu", dtype="float32")
    segmenter.set_image(picture)
    assert segmenter.logits("a cat").shape == (1, 352, 352)
    (wanted,) = [model for model, source in SCALES["mini"].sources.items() if source.parent.name == name]
    assert segmenter.model.config.model_type == wanted
    if wanted == "vitseg":  # as the mini CLIP's; batch norm does it for the ResNet
        *_, deepest = encode(segmenter.model, pretrain.probe_scenes(segmenter.model, 8)[0])
        assert deepest.std().item() == pytest.approx(1, abs=0.01)
    rows = (tmp_path / "small" / "curve.csv").read_text().splitlines()
    assert len(rows) == 1 + len(short_curriculum)


@pytest.mark.parametrize("kind", ["clip-deconv", "vitseg", "clipseg-resnet"])
def test_paper_sizes(kind):
    """Full-size architectures: parameters counted without their memory, and 352 px in and out of the decoder."""
    options = {"vision_config": {"patch_size": 16}} if kind == "clip-deconv" else {}
    if kind == "vitseg":
        options["vision_config"] = {"patch_size": 16, "image_size": 384}
    if kind == "clipseg-resnet":
        options["text_config"] = {"hidden_size": 640, "intermediate_size": 2560, "num_attention_heads": 10}
    config = MODELS[kind].config_class(**options)
    with torch.device("meta"):
        model = MODELS[kind](config).eval()
        logits = decode(model, encode(model, torch.empty(1, 3, 352, 352)), torch.empty(2, config.projection_dim))
        embedding = embed_images(model, torch.empty(1, 3, 352, 352))
    assert logits.shape == (2, 352, 352)
    assert embedding.shape == (1, {"clipseg-resnet": 640}.get(kind, 512))
    if kind == "clipseg-resnet":  # OpenAI's RN50x4 has 178 million parameters in all, 87 of them in the image tower
        assert round(sum(p.numel() for p in model.backbone.parameters()) / 1e6) == 178
        assert round(sum(p.numel() for p in model.backbone.visual.parameters()) / 1e6) == 87
