"""The command line, as its user sees it: files, messages, exit codes."""

import hashlib
import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config, tiny_processor
from PIL import Image
from transformers import AutoProcessor, CLIPSegForImageSegmentation
from typer.testing import CliRunner

from clipseg_repro import load_segmenter, verify
from clipseg_repro.cli import app
from clipseg_repro.models import released
from clipseg_repro.study.scales import SCALES


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPSEG_REPRO_RESULTS", raising=False)  # of `make test`: a folder with trained models
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path, picture, picture_mask):
    Image.fromarray(picture).save(tmp_path / "photo.png")
    Image.fromarray(picture_mask).save(tmp_path / "mask.png")
    return tmp_path


def fails(result, *words):
    """Exit code 2 and one line, on stderr, that contains the words."""
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    return True


def test_segment_writes_what_predict_gives(run, files, tiny_folder):
    options = ("--support", "photo.png", "--mask", "mask.png", "--out", "out", "--model", tiny_folder)
    result = run("segment", "photo.png", "a cat", *options, "--threshold", 0.4)
    assert result.exit_code == 0, result.output
    stems = ["photo_1_a-cat", "photo_2_like-photo"]
    kinds = ["mask", "overlay", "probability"]
    names = [*(f"{s}_{k}.png" for s in stems for k in kinds), "photo_segments.json"]
    assert sorted(p.name for p in (files / "out").iterdir()) == names

    segmenter = load_segmenter(tiny_folder, dtype="float32")
    segmenter.set_image("photo.png")
    expected = segmenter.predict("a cat")[0]
    probability = Image.open(files / "out/photo_1_a-cat_probability.png")
    assert probability.mode == "I;16"
    np.testing.assert_allclose(np.asarray(probability) / 65535, expected, atol=1 / 65535)
    mask = np.asarray(Image.open(files / "out/photo_1_a-cat_mask.png"))
    np.testing.assert_array_equal(mask, np.where(expected > 0.4, 255, 0))
    assert Image.open(files / "out/photo_1_a-cat_overlay.png").size == (140, 90)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png", "a cat"], ["no picture 'missing.png'"]),
        (["photo.png", "missing/photo", "a cat"], ["no picture 'missing/photo'", "--prompt"]),
        (["a cat"], ["no pictures"]),
        (["photo.png", "--prompt", "mask.png"], ["--prompt 'mask.png' is a picture"]),
        (["photo.png", "empty", "a cat"], ["no pictures in folder 'empty'"]),
        ([".", "a cat", "--out", "."], ["--out '.'", "give another"]),
        (["photo.png", "a \udcff cat"], ["'a \\udcff cat' is not valid Unicode"]),
        (["photo.png", "a cat", "--device", "none"], ["device 'none'", "try 'cpu'"]),
        (["photo.png", *["a cat"] * 256, "--labels"], ["256 prompts", "at most 255"]),
        (["broken.png", "a cat"], ["broken.png"]),
        (["photo.png"], ["nothing to look for", "--prompt"]),
        (["photo.png", " "], ["blank"]),
        (["photo.png", "--support", "photo.png"], ["--support and --mask belong together"]),
        (["photo.png", "a cat", "--support", "photo.png", "--mask", "empty.png"], ["mask"]),
        (["photo.png", "a cat", "--model", "nowhere"], ["unknown model 'nowhere'"]),
        (["photo.png", "a cat", "--out", "photo.png"], ["cannot write to 'photo.png'", "--out"]),
    ],
)
def test_segment_refuses_bad_input_and_writes_nothing(run, files, tiny_folder, arguments, words):
    (files / "broken.png").write_bytes((files / "photo.png").read_bytes()[:60])
    Image.new("L", (140, 90)).save(files / "empty.png")
    (files / "empty").mkdir()
    before = sorted(files.iterdir())
    model = [] if "--model" in arguments else ["--model", tiny_folder]
    assert fails(run("segment", *arguments, *model), *words)
    assert sorted(files.iterdir()) == before


def test_segment_names_bad_pictures_at_the_end_and_skips_what_is_done(run, files, tiny_folder):
    (files / "more").mkdir()
    for name in ("more/photo.png", "more/b.JPG", "more/.hidden.png"):
        Image.open(files / "photo.png").save(files / name)
    (files / "more/a.png").write_bytes(b"no picture")
    (files / "more/notes.txt").touch()
    command = ("segment", "photo.png", "more", "a cat", "--prompt", "a dog", "--model", tiny_folder)
    result = run(*command, "--background", "a tree")
    assert result.exit_code == 1
    assert "\nFailed: image 'more/a.png' is not an image" in result.stderr
    written = {path.name for path in (files / "segmented").glob("*_labels.png")}
    assert written == {f"{stem}_labels.png" for stem in ("b", "more-photo-png", f"{files.name}-photo-png")}
    assert len(result.stdout.splitlines()) == 3 * 2
    again = run(*command, "--background", "a tree", "--json")
    assert again.exit_code == 1
    assert "3 of 4 pictures were done before" in again.stderr
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    pictures = ["photo.png", "more/b.JPG", "more/photo.png"]
    assert [(x["picture"], x["prompt"]) for x in lines] == [(p, w) for p in pictures for w in ("a cat", "a dog")]


def test_other_commands_refuse_bad_input(run):
    assert fails(run("reproduce"), "no notebooks in")
    assert fails(run("data", "build", "--scale", "paper"), "no PhraseCut data in", "data/README.md")
    assert fails(
        run("train", "no-such-run"), "unknown run 'no-such-run'", "mini-clip, mini-resnet-clip, mini-vit, clipseg-pc+"
    )
    assert fails(run("train", "mini-clip", "--steps", 5), "own curriculum")
    assert fails(run("train", "vitseg-pc"), "training/mini-vit/model", "clipseg-repro train mini-vit")
    assert run("reproduce", "--scale", "large").exit_code == 2
    assert all(run("train", "clipseg-pc", "--seed", seed).exit_code == 2 for seed in (-1, 2**64))


def test_data_check(run, files, data, monkeypatch):
    """Of a build, and of the same files as if they were fetched: then the official counts are missed."""
    monkeypatch.setenv("CLIPSEG_REPRO_DATA", str(files))
    folder = files / "mini" / "PhraseCut" / "VGPhraseCut_v0"
    shutil.copytree(data / folder.name, folder)
    result = run("data", "check", "phrasecut")
    assert result.exit_code == 0, result.output
    assert "test: " in result.stdout
    assert "on 4 images\nNothing is wrong in " in result.stdout
    (folder / "images" / "3000001.jpg").unlink()
    (folder / "names.json").unlink()
    result = run("data", "check", "phrasecut")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-3:] == [
        f"3 problems in {folder}:",
        "file that is missing, or not as it was built (2): images/3000001.jpg, names.json",
        "missing picture: 3000001.jpg",
    ]
    shutil.rmtree(folder / "build")
    folder.parent.rename(files / "PhraseCut")
    result = run("data", "check", "phrasecut", "--scale", "paper")
    assert result.exit_code == 1
    assert "on 4 images, official 14354 phrases on 2545 images\n" in result.stdout
    assert "missing file: refer_miniv.json\n" in result.stdout
    assert fails(run("data", "check", "phrasecut"), "no PhraseCut data at", "clipseg-repro data build")


def test_a_failed_notebook_is_exit_code_1(run, monkeypatch):
    from clipseg_repro.study import runner

    def fail(*_):
        raise runner.NotebookFailed("03_text_prompts.ipynb, cell 4")

    monkeypatch.setattr(runner, "reproduce", fail)
    result = run("reproduce")
    assert result.exit_code == 1
    assert result.stderr == "Failed: 03_text_prompts.ipynb, cell 4\n"


def test_train_passes_on_the_scale_and_the_budget(run, files, monkeypatch):
    given = {}
    monkeypatch.delenv("CLIPSEG_REPRO_DATA", raising=False)
    monkeypatch.delenv("CLIPSEG_REPRO_RESULTS", raising=False)
    monkeypatch.setattr("clipseg_repro.study.scales.Scale.prepare", lambda self, *needed: None)
    monkeypatch.setattr("clipseg_repro.study.queue.train", lambda *a, **k: given.update(arguments=a, **k))
    assert run("train", "clipseg-pc", "--steps", 5, "--seed", 3, "--tensorboard").exit_code == 0
    folders = (files / "data/mini/PhraseCut/VGPhraseCut_v0", files / "results/training/clipseg-pc-seed3")
    asked = {"arguments": ("clipseg-pc", *folders), "source": "mini", "iterations": 5, "seed": 3}
    asked |= {"keep": files / "data/activations", "tensorboard": True}
    assert given.pop("words").lemmas("sofa")
    assert given == SCALES["mini"].training | asked


def test_train_takes_a_table_or_goes_on_from_a_model(run, files, monkeypatch):
    asked = []
    monkeypatch.setattr("clipseg_repro.study.scales.Scale.prepare", lambda self, *needed: None)
    monkeypatch.setattr("clipseg_repro.study.queue.train", lambda *a, **k: asked.append((a[0], k)))
    monkeypatch.setattr("clipseg_repro.study.queue.keep_decoder", lambda *a: None)
    monkeypatch.setattr("clipseg_repro.study.queue.load_file", lambda path: {})
    assert run("train", "--table", 6, "--seed", 1).exit_code == 2  # ViTSeg's backbone is not there
    monkeypatch.setattr("clipseg_repro.study.scales.Scale.source", lambda self, model: model)
    asked.clear()
    assert run("train", "--table", 6).exit_code == 0
    assert len(asked) == 16 and {k["source"] for _, k in asked} == {"clipseg", "clip-deconv", "vitseg"}
    assert {k["iterations"] for _, k in asked} == {840}
    assert run("train", "only-layer-3", "--from", "mine").exit_code == 0
    name, given = asked[-1]
    assert (name, given["source"], given["start"], given["layers"]) == ("only-layer-3", "mine", "source", [1])
    assert fails(run("train"), "name a run, as clipseg-pc+, or give --table")
    assert fails(run("train", "--table", 2), "Table 2 has no run")


def test_study_and_tables_of_a_run(run, files):
    result = run("study", "--status")
    assert result.exit_code == 0 and "clipseg-pc+-pascal-5i-3     0  left" in result.stdout, result.stdout
    assert fails(run("study", "clipseg-pcx"), "no table needs a run 'clipseg-pcx'")
    assert fails(
        run("evaluate", "clipseg-pc+", "--table", 5), "no decoder", "clipseg-repro train 'clipseg-pc+-pascal-5i-0'"
    )
    assert fails(run("evaluate", "d16", "--table", 5), "Table 5 has no run of 'd16'")


def test_data_weights_go_to_the_data_folder(run, files, monkeypatch):
    monkeypatch.setenv("CLIPSEG_REPRO_DATA", str(files / "elsewhere"))
    monkeypatch.setattr(released, "ARCHIVE", "http://127.0.0.1:9/download")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    kept = files / "elsewhere" / "weights" / "rd64-uni.pth"
    kept.parent.mkdir(parents=True)
    for name in released.FILES:
        kept.with_name(name).write_text(name)
        monkeypatch.setitem(released.FILES, name, hashlib.sha256(name.encode()).hexdigest())
    result = run("data", "weights")
    assert result.exit_code == 0, result.output
    assert str(kept) in result.stdout.splitlines()
    assert fails(run("data", "weights", "--out", "empty"), "cannot fetch", "127.0.0.1:9", "empty/weights.zip")


@pytest.fixture
def stand_in(tmp_path):
    """A folder of a model with the shape of the one whose answer is known: D = 64 and the refined head."""
    processor = tiny_processor()
    config = tiny_config(processor.tokenizer, use_complex_transposed_convolution=True)
    config.vision_config.patch_size = 16
    random_model(config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_verify_passes_on_the_known_answer_and_fails_on_another(run, files, stand_in, monkeypatch):
    """The documented call on the stand-in gives the answer to know; then one figure of it is changed."""
    picture = Image.open(files / "photo.png")
    processor = AutoProcessor.from_pretrained(stand_in)
    inputs = processor(text=list(verify.PROMPTS), images=[picture] * 3, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = CLIPSegForImageSegmentation.from_pretrained(stand_in).eval()(**inputs)
    corner = output.logits[0, :3, :3].tolist()
    known = {
        "conditional_embeddings[0, :3]": output.conditional_embeddings[0, :3].tolist(),
        "pooled_output[0, :3]": output.pooled_output[0, :3].tolist(),
        "logits[0, :3, :3]": corner,
        "Segmenter.logits[0, :3, :3]": corner,
    }
    assert known.keys() == verify.EXPECTED.keys()
    released_answer = dict(verify.EXPECTED)
    monkeypatch.setattr(verify, "EXPECTED", known)
    result = run("verify", stand_in, "--image", "photo.png")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["pass"] * 4

    known["pooled_output[0, :3]"][2] += 2e-3
    result = run("verify", stand_in, "--image", "photo.png")
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["pass", "FAIL", "pass", "pass"]
    assert "pooled_output[0, :3]: largest deviation 0.002 (tolerance 0.001)" in result.stdout

    known.update(released_answer)
    result = run("verify", stand_in, "--image", "photo.png")
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["FAIL"] * 4


def test_verify_says_whether_a_file_is_one_of_the_authors(run, files, stand_in, monkeypatch):
    (files / "renamed.pth").write_bytes(b"weights")
    model = verify.load_model(stand_in)
    monkeypatch.setattr(verify, "load_model", lambda _: model)
    first = [run("verify", "renamed.pth", "--image", "photo.png").stdout.splitlines()[0]]
    monkeypatch.setitem(released.FILES, "rd64-uni.pth", hashlib.sha256(b"weights").hexdigest())
    first.append(run("verify", "renamed.pth", "--image", "photo.png").stdout.splitlines()[0])
    assert first[0].startswith("-     SHA-256: none of the authors' files (rd64-uni.pth, ")
    assert first[1] == "pass  SHA-256: that of the authors' rd64-uni.pth"


def test_verify_leaves_open_what_is_not_known(run, files, tiny_folder, monkeypatch):
    result = run("verify", tiny_folder, "--image", "photo.png")  # not the refined head
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["FAIL", "FAIL", "-", "-"]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(verify, "IMAGE", "http://127.0.0.1:9/000000039769.jpg")
    assert fails(run("verify", tiny_folder), "cannot fetch http://127.0.0.1:9", "check the network")
    assert fails(run("verify", "nowhere", "--image", "photo.png"), "unknown model 'nowhere'")


@pytest.mark.parametrize("command", [["data", "build"], ["train", "clipseg-pc+"], ["reproduce"]])
def test_ctrl_c_says_how_to_go_on(run, monkeypatch, command):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("clipseg_repro.study.runner.reproduce", interrupt)
    monkeypatch.setattr("clipseg_repro.study.scales.Scale.prepare", interrupt)
    result = run(*command)
    assert result.exit_code == 130
    assert "Run the same command again" in result.stderr


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"clipseg-repro {version('clipseg-repro')}\n")


COMMANDS = [
    [],
    ["segment"],
    ["data", "build"],
    ["data", "check"],
    ["data", "weights"],
    ["train"],
    ["evaluate"],
    ["verify"],
    ["reproduce"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
