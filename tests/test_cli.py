"""The command line, as its user sees it: files, messages, exit codes."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipseg_repro import load_segmenter
from clipseg_repro.cli import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    assert sorted(p.name for p in (files / "out").iterdir()) == [f"{s}_{k}.png" for s in stems for k in kinds]

    segmenter = load_segmenter(tiny_folder)
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
        (["missing.png", "a cat"], ["missing.png"]),
        (["broken.png", "a cat"], ["broken.png"]),
        (["photo.png"], ["no prompts"]),
        (["photo.png", " "], ["blank"]),
        (["photo.png", "--support", "photo.png"], ["--support and --mask belong together"]),
        (["photo.png", "a cat", "--support", "photo.png", "--mask", "empty.png"], ["mask"]),
        (["photo.png", "a cat", "--model", "nowhere"], ["unknown model 'nowhere'"]),
        (["photo.png", "a cat", "--out", "photo.png"], ["cannot write 'photo.png", "--out"]),
    ],
)
def test_segment_refuses_bad_input_and_writes_nothing(run, files, tiny_folder, arguments, words):
    (files / "broken.png").write_bytes((files / "photo.png").read_bytes()[:60])
    Image.new("L", (140, 90)).save(files / "empty.png")
    before = sorted(files.iterdir())
    model = [] if "--model" in arguments else ["--model", tiny_folder]
    assert fails(run("segment", *arguments, *model), *words)
    assert sorted(files.iterdir()) == before


def test_other_commands_refuse_bad_input(run):
    assert fails(run("reproduce"), "no notebooks in")
    assert fails(run("data", "build", "--scale", "paper"), "no PhraseCut data in", "data/README.md")
    assert fails(run("train", "no-such-run"), "unknown run 'no-such-run'", "mini-clip, clipseg-pc+")
    assert fails(run("train", "mini-clip", "--steps", 5), "own curriculum")
    assert run("reproduce", "--scale", "large").exit_code == 2


def test_a_failed_notebook_is_exit_code_1(run, monkeypatch):
    from clipseg_repro import study

    def fail(*_):
        raise study.NotebookFailed("03_text_prompts.ipynb, cell 4")

    monkeypatch.setattr(study, "reproduce", fail)
    result = run("reproduce")
    assert result.exit_code == 1
    assert result.stderr == "Failed: 03_text_prompts.ipynb, cell 4\n"


def test_train_passes_on_the_scale_and_the_budget(run, files, monkeypatch):
    given = {}
    monkeypatch.delenv("CLIPSEG_REPRO_DATA", raising=False)
    monkeypatch.delenv("CLIPSEG_REPRO_RESULTS", raising=False)
    monkeypatch.setattr("clipseg_repro.scales.Scale.prepare", lambda self: None)
    monkeypatch.setattr("clipseg_repro.training.train", lambda *a, **k: given.update(arguments=a, **k))
    assert run("train", "clipseg-pc", "--steps", 5, "--seed", 3).exit_code == 0
    folders = (files / "data/mini/PhraseCut/VGPhraseCut_v0", files / "results/training/clipseg-pc")
    assert given == {
        "arguments": ("clipseg-pc", *folders),
        "source": "mini",
        "phrases_per_image": 4,
        "iterations": 5,
        "seed": 3,
    }


@pytest.mark.parametrize("command", [["data", "build"], ["train", "clipseg-pc+"], ["reproduce"]])
def test_ctrl_c_says_how_to_go_on(run, monkeypatch, command):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("clipseg_repro.study.reproduce", interrupt)
    monkeypatch.setattr("clipseg_repro.scales.Scale.prepare", interrupt)
    result = run(*command)
    assert result.exit_code == 130
    assert "Run the same command again" in result.stderr


@pytest.mark.parametrize("command", [[], ["segment"], ["data", "build"], ["train"], ["evaluate"], ["reproduce"]])
def test_help(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
