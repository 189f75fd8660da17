"""The segmenter and the pieces of the forward pass, held against transformers' CLIPSegForImageSegmentation.forward on a
tiny model."""

import io
import json
import shutil
from copy import deepcopy
from logging import CRITICAL

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config, tiny_processor
from huggingface_hub import utils as hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from PIL import Image
from transformers import AutoProcessor, CLIPSegForImageSegmentation
from transformers.utils import logging

from clipseg_repro import Segmenter, VisualPrompt, interpolate, load_segmenter
from clipseg_repro import segmenter as segmenter_module
from clipseg_repro.errors import InputError
from clipseg_repro.models import loading
from clipseg_repro.models.forward import decode, encode
from clipseg_repro.models.loading import load_model
from clipseg_repro.prompts import RECIPES, prepare, to_pixels

TEXTS = ["a cat", "a photo of a small red dog.", "something to sit on"]


def _library(model, processor, image, **condition):
    """The documented call: the image repeated once per prompt."""
    count = len(next(iter(condition.values())))
    pixels = to_pixels([image], processor.image_processor).repeat(count, 1, 1, 1)
    with torch.no_grad():
        return model(pixel_values=pixels, **condition).logits


def _tokens(processor, texts):
    return dict(processor.tokenizer(texts, padding=True, return_tensors="pt"))


def _assert_equal(ours, theirs):
    assert theirs.std() > 0.1  # the comparison means something
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


VARIANTS = {
    "plain": ({}, 112),
    "film in the second block": ({"conditional_layer": 1}, 112),
    "other layers": ({"extract_layers": [0, 2, 3]}, 112),
    "larger input": ({}, 144),
    "refined head": ({"use_complex_transposed_convolution": True}, 112),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    changes, size = VARIANTS[request.param]
    processor = tiny_processor(size)
    config = tiny_config(processor.tokenizer)
    for name, value in changes.items():
        setattr(config, name, value)
    if config.use_complex_transposed_convolution:
        config.vision_config.patch_size = 16  # the library's head upsamples by 16
    return random_model(config), processor


def test_text_prompts_equal_the_library(variant, picture):
    ours = Segmenter(*variant, device="cpu")
    ours.set_image(picture)
    _assert_equal(ours.logits(TEXTS), _library(*variant, picture, **_tokens(variant[1], TEXTS)))


def test_condition_tensors_equal_the_library(tiny_model, segmenter, picture):
    segmenter.set_image(picture)
    conditions = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    _assert_equal(segmenter.logits(conditions), _library(*tiny_model, picture, conditional_embeddings=conditions))
    _assert_equal(segmenter.logits(list(conditions)), segmenter.logits(conditions))


def test_visual_prompts_equal_the_library(tiny_model, segmenter, picture, picture_mask):
    segmenter.set_image(picture[::-1])
    prompts = [VisualPrompt(picture, picture_mask, name) for name, recipe in RECIPES.items() if not recipe.attention]
    pixels = torch.stack([prepare(prompt, tiny_model[1].image_processor)[0] for prompt in prompts])
    expected = _library(*tiny_model, picture[::-1], conditional_pixel_values=pixels)
    _assert_equal(segmenter.logits(prompts), expected)


def test_attention_recipes_have_their_own_condition(segmenter, picture, picture_mask):
    prompts = [VisualPrompt(picture, picture_mask, name) for name, recipe in RECIPES.items() if recipe.attention]
    together = segmenter.conditions(prompts)
    alone = torch.cat([segmenter.conditions(prompt) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert torch.pdist(together).min() > 1e-3


def test_interpolation_is_linear_between_the_two(tiny_model, segmenter, picture, picture_mask):
    visual = VisualPrompt(picture, picture_mask)
    t, s = segmenter.conditions(["a cat", visual])
    mixes = segmenter.conditions([interpolate("a cat", visual, a) for a in (0, 0.25, 1)])
    torch.testing.assert_close(mixes, torch.stack([t, 0.25 * s + 0.75 * t, s]), atol=1e-6, rtol=0)
    torch.testing.assert_close(segmenter.conditions(interpolate(t, s, 0.25))[0], mixes[1], atol=1e-6, rtol=0)


def test_rows_of_images_and_conditions(tiny_model, picture):
    """B images with B conditions, and with one condition for all."""
    model, processor = tiny_model
    pixels = to_pixels([picture, picture[::-1], picture[:, ::-1]], processor.image_processor)
    conditions = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = decode(model, encode(model, pixels), conditions)
        shared = decode(model, encode(model, pixels), conditions[:1])
        _assert_equal(ours, model(pixel_values=pixels, conditional_embeddings=conditions).logits)
        _assert_equal(shared, model(pixel_values=pixels, conditional_embeddings=conditions[:1].repeat(3, 1)).logits)


def test_gradients_reach_the_decoder_only(picture):
    processor = tiny_processor()
    model = random_model(tiny_config(processor.tokenizer))
    pixels = to_pixels([picture], processor.image_processor)
    decode(model, encode(model, pixels), torch.randn(2, 48)).sum().backward()
    assert all(p.grad is None for p in model.clip.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_the_encoder_runs_once_and_stops_at_the_deepest_layer(tiny_model, segmenter, picture):
    calls = []
    blocks = tiny_model[0].clip.vision_model.encoder.layers
    hooks = [block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(blocks)]
    try:
        segmenter.set_image(picture)
        segmenter.predict(TEXTS)
        segmenter.predict(["a house"])
        segmenter.label_map(TEXTS)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == [0, 1, 2]  # of four blocks


def test_predict(segmenter, picture, monkeypatch):
    segmenter.set_image(picture)
    maps = segmenter.predict(TEXTS)
    assert (maps.shape, maps.dtype) == ((3, 90, 140), np.float32)
    assert maps.min() >= 0
    assert maps.max() <= 1
    (logits,) = segmenter.logits(TEXTS[1])
    # aligned corners: the outermost samples fall on each other
    np.testing.assert_allclose(
        maps[1][[0, 0, -1, -1], [0, -1, 0, -1]], logits.sigmoid()[[0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-4
    )
    assert segmenter.predict("a cat").shape == (1, 90, 140)
    monkeypatch.setattr(segmenter_module, "PROMPT_BATCH", 2)
    np.testing.assert_allclose(segmenter.predict(TEXTS), maps, atol=1e-6)


def test_maps_are_those_of_predict(segmenter, picture):
    segmenter.set_image(picture)
    np.testing.assert_allclose(list(segmenter.maps(TEXTS)), segmenter.predict(TEXTS), atol=1e-6)
    with pytest.raises(InputError, match="no prompts"):
        segmenter.maps([])


def test_text_embeddings_are_cached_and_bounded(segmenter, monkeypatch):
    seen = []
    embed = segmenter_module.embed_texts
    monkeypatch.setattr(segmenter_module, "embed_texts", lambda m, p, texts: seen.extend(texts) or embed(m, p, texts))
    monkeypatch.setattr(segmenter_module, "CACHED_TEXTS", 2)
    first = segmenter.conditions(["a cat", "a dog", "a cat"])
    assert seen == ["a cat", "a dog"]
    torch.testing.assert_close(segmenter.conditions(["a dog", "a cat", "a tree"])[:2], first[[1, 0]])
    assert seen == ["a cat", "a dog", "a tree"]
    assert list(segmenter._texts) == ["a dog", "a tree"]


def test_label_map(segmenter, picture):
    segmenter.set_image(picture)
    maps = segmenter.predict([*TEXTS, "a house"])
    best, label = maps[:3].max(0), maps[:3].argmax(0) + 1
    np.testing.assert_array_equal(segmenter.label_map(TEXTS), np.where(best > 0.5, label, 0))
    np.testing.assert_array_equal(segmenter.label_map(TEXTS, threshold=0.3), np.where(best > 0.3, label, 0))
    by_prompt = segmenter.label_map(TEXTS, background="a house")
    np.testing.assert_array_equal(by_prompt, np.where(best > maps[3], label, 0))
    assert len(np.unique(by_prompt)) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_reduced_precision_is_close(tiny_folder, picture, picture_mask, dtype):
    prompts = ["a cat", VisualPrompt(picture, picture_mask), VisualPrompt(picture, picture_mask, next(iter(RECIPES)))]
    full, reduced = (load_segmenter(tiny_folder, "cpu", d) for d in ("float32", dtype))
    for segmenter in (full, reduced):  # another size than CLIP's own, so that positions are interpolated
        segmenter.processor.image_processor.size = {"height": 144, "width": 144}
    full.set_image(picture)
    reduced.set_image(picture)
    maps = reduced.predict(prompts)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, full.predict(prompts), atol=0.05)


# Bad input to the segmenter


def test_segmenter_refuses(segmenter, picture, picture_mask):
    for call in (segmenter.predict, segmenter.logits, segmenter.label_map):
        with pytest.raises(InputError, match="set_image"):
            call(["a cat"])
    segmenter.set_image(picture)
    for prompts, reason in (
        ([], "no prompts"),
        ([""], "blank"),
        (["a cat", "  "], "blank"),
        (["cat " * 60], r"'cat cat .*' has 62 tokens.* 48"),
        (torch.zeros(2, 512), r"\(512,\).*\(48,\)"),
        ([torch.zeros(1, 48)], r"\(1, 48\)"),
        ([picture], "ndarray"),
        ([None], "NoneType"),
        (None, "NoneType"),
        (5, "int"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.full((48,), torch.nan), "finite"),
        (torch.zeros(48, device="meta"), "finite"),
        (torch.zeros(48).to_sparse(), "finite"),
        ("a \ud800", "Unicode"),
        ([VisualPrompt(picture, ~picture_mask[1:])], "shape"),
    ):
        with pytest.raises(InputError, match=reason):
            segmenter.predict(prompts)
    with pytest.raises(InputError, match="no prompts"):
        segmenter.label_map([])
    with pytest.raises(InputError, match=r"threshold 1.5: give a number in \[0, 1\]"):
        segmenter.label_map("a cat", threshold=1.5)


def test_a_refused_image_leaves_the_last_one(segmenter, picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    segmenter.set_image(picture)
    with pytest.raises(InputError, match="truncated"):
        segmenter.set_image(Image.open(io.BytesIO(file.getvalue()[:9000])))
    assert segmenter.predict("a cat").shape == (1, 90, 140)


def _closed(mode):
    picture = Image.new(mode, (4, 4))
    picture.close()
    return picture


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
PICTURES = arrays(scalar_dtypes(), array_shapes(min_dims=0, max_dims=4, max_side=5)) | st.one_of(
    st.builds(Image.new, st.sampled_from(Image.MODES), st.tuples(*[st.integers(0, 5)] * 2)),
    st.builds(_closed, st.sampled_from(["L", "P", "RGBA"])),
)
TENSORS = st.builds(
    lambda shape, value, dtype: torch.full(shape, value).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 48]), max_size=3).map(tuple),
    st.sampled_from([0.0, 1.0, -1e30, torch.nan, torch.inf]),
    st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int8, torch.bool]),
)
ODD = SCALARS | PICTURES | TENSORS
PROMPTS = ODD | st.lists(ODD, max_size=3) | st.dictionaries(st.text(), ODD, max_size=2)
CALLS = {
    "set_image": lambda s, a, b, c: s.set_image(a),
    "predict": lambda s, a, b, c: s.predict(a),
    "logits": lambda s, a, b, c: s.logits(a),
    "conditions": lambda s, a, b, c: s.conditions(a),
    "label_map": lambda s, a, b, c: s.label_map("a cat", a, c),
    "interpolate": lambda s, a, b, c: s.predict(interpolate(a, b, c)),
    "weight": lambda s, a, b, c: s.predict(interpolate("a cat", torch.ones(48), c)),
    "VisualPrompt": lambda s, a, b, c: s.predict(VisualPrompt(a, b)),
    "mask": lambda s, a, b, c: s.predict(VisualPrompt(np.zeros((4, 4, 3), np.uint8), a)),
    "recipe": lambda s, a, b, c: VisualPrompt(a, b, c),
}


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=st.sampled_from(list(CALLS)), a=PROMPTS, b=ODD, c=ODD)
def test_odd_values_work_or_are_refused_in_one_line(call, segmenter, a, b, c):
    segmenter.set_image(np.zeros((8, 8, 3), np.uint8))
    try:
        CALLS[call](segmenter, a, b, c)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


def test_decode_refuses(tiny_model):
    activations = [torch.zeros(2, 197, 64)] * 3
    for conditions, reason in ((torch.zeros(3, 48), "2 images and 3"), (torch.zeros(2, 47), r"\(K, 48\)")):
        with pytest.raises(InputError, match=reason):
            decode(tiny_model[0], activations, conditions)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (112, 120)])
def test_encode_refuses_other_than_squares_of_whole_patches(tiny_model, height, width):
    with pytest.raises(InputError, match=f"{height} x {width} px.*multiple of its patch size 8"):
        encode(tiny_model[0], torch.zeros(1, 3, height, width))


def test_a_dtype_that_the_device_lacks_is_refused(tiny_folder, monkeypatch):
    def lacking(*_, **__):
        raise RuntimeError("\"conv\" not implemented for 'Half'\nC++ frames follow")

    monkeypatch.setattr(segmenter_module.F, "conv2d", lacking)
    with pytest.raises(InputError, match=r"dtype 'float16' does not work on device 'cpu' .*: use float32$"):
        load_segmenter(tiny_folder, "cpu", "float16")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"device": "toaster"}, "toaster"), ({"dtype": "float8"}, "float8"), ({"dtype": torch.int8}, "int8")],
)
def test_load_segmenter_refuses(options, reason, tiny_folder):
    with pytest.raises(InputError, match=reason):
        load_segmenter(tiny_folder, **options)


# Loading


def test_transformers_loads_the_folder_too(tiny_folder, picture):
    model = CLIPSegForImageSegmentation.from_pretrained(tiny_folder)
    inputs = AutoProcessor.from_pretrained(tiny_folder)(
        text=TEXTS, images=[picture] * 3, padding=True, return_tensors="pt"
    )
    ours = load_segmenter(str(tiny_folder), device="cpu", dtype="float32")
    ours.set_image(picture)
    with torch.no_grad():
        _assert_equal(ours.logits(TEXTS), model(**inputs).logits)


def test_weights_are_loaded_in_float32(tiny_model, tmp_path):
    model, processor = tiny_model
    CLIPSegForImageSegmentation(deepcopy(model.config)).to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path)[0].parameters()} == {torch.float32}


def _no_config(folder):
    (folder / "config.json").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text("{")


def _foreign(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))


def _truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def _other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"reduce_dim": 32}))


def _without_decoder(folder):
    model = CLIPSegForImageSegmentation.from_pretrained(folder)
    shutil.rmtree(folder / "model", ignore_errors=True)
    model.clip.save_pretrained(folder)


def _odd_size(folder):
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["size"] = {"height": 100, "width": 100}
    (folder / "processor_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_no_config, "no config.json"),
        (_broken_config, "damaged config.json"),
        (_foreign, "'clip' model"),
        (_truncated, "damaged or incomplete"),
        (_no_weights, "damaged or incomplete"),
        (_no_tokenizer, "tokenizer files are missing"),
        (_other_shape, "damaged or incomplete"),
        (_without_decoder, "weights missing"),
        (_odd_size, "no multiple of the patch size 8"),
    ],
)
def test_damaged_folders_are_refused(damage, reason, tiny_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises(InputError, match=reason) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("disabled", [False, True])
def test_loading_is_quiet_but_for_downloads(disabled):
    """The Hub's retries are not logged; its bars stay, unless the caller disabled them; then all is as before."""

    def state():
        return hub.logging.get_verbosity(), hub.are_progress_bars_disabled(), logging.is_progress_bar_enabled()

    hub.disable_progress_bars() if disabled else hub.enable_progress_bars()
    try:
        before = state()
        with loading._quiet():
            assert state() == (CRITICAL, disabled, False)
        assert state() == before
    finally:
        hub.enable_progress_bars()


def test_unknown_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'nobody/clipseg-none'.*cache .*'mini'"):
        load_model("nobody/clipseg-none")
    with pytest.raises(InputError, match="unknown model 'mimi'"):
        load_model("mimi")
    monkeypatch.setattr(loading, "MINI", tmp_path)
    with pytest.raises(InputError, match="weights are missing"):
        load_model("mini")
