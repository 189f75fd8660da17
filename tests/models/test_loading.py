"""Loading from folders, the Hub and its cache."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipseg_repro.errors import InputError
from clipseg_repro.models.hub import REVISIONS
from clipseg_repro.models.loading import load_model


def test_the_hub_from_first_fetch_to_no_network(tiny_folder, tmp_path):
    """On a stand-in of the Hub, in a process of its own, which reads HF_ENDPOINT as huggingface_hub is imported."""
    command = [sys.executable, hub_stand_in.__file__, tiny_folder, tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {row.pop("case"): row for row in map(json.loads, done.stdout.splitlines())}
    commit = REVISIONS[hub_stand_in.PINNED]
    small = {file.name for file in Path(tiny_folder).glob("*.json")}

    def gets(case):
        return [
            (Path(path).name, part)
            for method, path, part in found[case]["asked"]
            if method == "GET" and "resolve" in path
        ]

    assert found["pinned"]["mark"] == 1
    assert all(commit in path for _, path, _ in found["pinned"]["asked"] if hub_stand_in.PINNED in path)
    assert {name for name, _ in gets("pinned")} == {"model.safetensors", *small}  # no README, no weights twice
    (resumed,) = [part for _, part in gets("pinned") if part]
    assert resumed.startswith("bytes=") and resumed != "bytes=0-"
    assert found["pinned again"]["mark"] == 1 and not found["pinned again"]["asked"]
    assert found["half-finished"]["mark"] == 1 and gets("half-finished") == [("model.safetensors", None)]
    assert found["unpinned"]["mark"] == 3
    assert found["the Hub moved on"]["mark"] == 3 and not found["the Hub moved on"]["asked"]
    assert found["offline"]["mark"] == 1
    assert found["its folder"]["mark"] == 2

    cache, snapshots = tmp_path / "cache", "models--CIDAS--clipseg-rd64-refined/snapshots"
    words = {
        "unknown": ["'nobody/clipseg'", "RepositoryNotFoundError", "check the name"],
        "offline, not cached": [f"not in the cache {cache}", "check the network", "'mini'"],
        "offline, half-finished": [f"only partly in the cache ('{cache / snapshots / commit}')", "check the network"],
        "offline, another commit": [
            f"at commit {'b' * 40}, not at {commit}",
            f"the folder '{cache / snapshots / ('b' * 40)}'",
        ],
    }
    for case, parts in words.items():
        assert all(part in found[case]["error"] for part in parts), found[case]["error"]
        assert "\n" not in found[case]["error"]
        assert found[case]["seconds"] < 10  # not the minutes of huggingface_hub's retries


def _config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def _processor(**changes):
    def damage(folder):
        config = json.loads((folder / "processor_config.json").read_text())
        config["image_processor"] |= changes
        (folder / "processor_config.json").write_text(json.dumps(config))

    return damage


def _weights(change, binary=False):
    """change(the tensor of the first FiLM bias) takes its place, in safetensors or in torch's format."""

    def damage(folder):
        path, name = folder / "model.safetensors", "decoder.film_mul.bias"
        weights = load_file(path)
        weights[name] = change(weights[name])
        save_file(weights, path, {"format": "pt"})
        if binary:
            path.unlink()
            torch.save(weights, folder / "pytorch_model.bin")

    return damage


def _filled(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([3]), value)


def _file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4306645\n"
PAGE = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_weights(_filled(torch.nan)), r"1 of its weights hold NaN or infinite numbers \['decoder.film_mul.bias'\]"),
        (_weights(_filled(-torch.inf)), "NaN or infinite"),
        (
            _weights(torch.Tensor.int),
            r"stores 1 weights as integers or the like \['decoder.film_mul.bias \(I32\)'\]",
        ),
        (_weights(torch.Tensor.bool), "integers or the like .*BOOL"),
        (_weights(torch.Tensor.long, binary=True), "integers or the like .*int64"),
        (_weights(lambda tensor: tensor[:0]), "damaged or incomplete"),
        (_config(conditional_layer=3), "conditional_layer 3 is none of its decoder's 3 layers"),
        (_config(conditional_layer=-1), "conditional_layer -1"),
        (_config(extract_layers=[0, 1, 4]), r"extract_layers \[0, 1, 4\] are not all among its 4 layers"),
        (_config(extract_layers=[-1, 1, 2]), r"extract_layers \[-1, 1, 2\]"),
        (_config(reduce_dim=0), "damaged or incomplete"),
        (_config(decoder_num_attention_heads=0), "damaged or incomplete"),
        (_processor(size={"height": 0, "width": 0}), "input size 0"),
        (_processor(size=-112), "input size -112"),
        (_processor(size={"height": "112", "width": "112"}), "input size 112 is no"),
        (_processor(size=None), "input size 0"),
        (_processor(image_mean=[0.5]), r"image_mean \(0.5,\)"),
        (_processor(image_mean=None), "image_mean None"),
        (_processor(image_std=[1, 1, 0]), r"image_std \(1, 1, 0\)"),
        (_processor(image_std=[1, 1, "x"]), "image_std"),
        (_file("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer; `git lfs pull`"),
        (_file("tokenizer.json", PAGE), "tokenizer.json is a web page"),
        (_file("config.json", PAGE), r"damaged config.json \(a web page"),
        (_file("model.safetensors", b""), "model.safetensors is empty"),
    ],
)
def test_models_that_are_not_sound_are_refused(damage, reason, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(InputError, match=reason) as caught:
        load_model(tmp_path / "copy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
def test_folders_of_older_transformers_are_read(key, tiny_folder, tiny_model, tmp_path, picture):
    """They have a file for the image processor alone, of a class that is no more, and one number for its size."""
    shutil.copytree(tiny_folder, tmp_path / "old")
    (tmp_path / "old" / "processor_config.json").unlink()
    old = tiny_model[1].image_processor.to_dict() | {"size": 112}
    del old["image_processor_type"]
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(old | {key: "ViTFeatureExtractor"}))
    _, processor = load_model(tmp_path / "old")
    pixels = [p.image_processor(picture, return_tensors="pt").pixel_values for p in (processor, tiny_model[1])]
    torch.testing.assert_close(*pixels, rtol=0, atol=0)
    assert processor.tokenizer("a cat") == tiny_model[1].tokenizer("a cat")


@pytest.mark.parametrize("name", ["x" * 5000, f"{'x' * 300}/{'y' * 300}", "a\0b"])
def test_impossible_names_are_one_clear_error(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="unknown model") as caught:
        load_model(name)
    assert len(str(caught.value)) < 400
