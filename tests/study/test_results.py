"""Results as files: tables, figures and their provenance."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipseg_repro.datasets.catalogue import CATALOGUE
from clipseg_repro.errors import InputError
from clipseg_repro.files import sha256
from clipseg_repro.models.loading import MINI
from clipseg_repro.study.results import provenance, record, recorded, save_table, show_figure
from clipseg_repro.study.scales import SCALES, get_scale


@pytest.fixture
def scale(tmp_path, tiny_folder):
    root = tmp_path / "data" / "PhraseCut" / "VGPhraseCut_v0"
    root.mkdir(parents=True)
    (root / "refer_test.json").write_text("[]")
    return replace(SCALES["mini"], model=str(tiny_folder), data=tmp_path / "data", results=tmp_path / "results")


def test_table(scale):
    frame = pd.DataFrame({"a|b": ["x", "y"], "miou": [0.43449, np.nan], "n": [3, 4]}).set_index("a|b")
    saved = save_table(frame, "table3", "PhraseCut.", scale)
    path = scale.results / "tables/table3.csv"
    assert path.read_bytes() == b"a|b,miou,n\nx,0.434,3\ny,,4\n"
    pd.testing.assert_frame_equal(pd.read_csv(path), saved)
    assert path.with_suffix(".md").read_text().splitlines() == [
        "PhraseCut.",
        "",
        r"| a\|b | miou | n |",
        "| :--- | ---: | ---: |",
        "| x | 0.434 | 3 |",
        "| y |  | 4 |",
    ]


def test_records_of_several_writers_are_all_kept(scale):
    """Of processes that write at once; threads, whose lock files are theirs alone too, stand for them."""
    files = [scale.results / f"{n}.csv" for n in range(12)]
    scale.results.mkdir()
    for path in files:
        path.touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: record(path, scale), files))
    assert set(recorded(scale)) == {path.name for path in files}


def test_provenance_holds_for_every_file_and_stays_while_the_file_does(scale, tiny_folder):
    book = scale.results / "provenance.json"
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", scale)
    entry = json.loads(book.read_text())["tables/one.csv"]
    assert entry["sha256"] == hashlib.sha256((scale.results / "tables/one.csv").read_bytes()).hexdigest()
    assert entry["model"]["sha256"] == hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert entry["caption"] == "One."
    assert len(entry["data"]) == 64
    assert set(provenance(scale)) >= {"version", "commit", "dirty", "seed", "time", "python", "torch", "machine"}

    entry["time"] = "then"
    book.write_text(json.dumps({"tables/one.csv": entry}))
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", scale)
    assert recorded(scale)["tables/one.csv"] == entry
    save_table(pd.DataFrame({"a": [2]}), "one", "One.", scale)
    assert recorded(scale)["tables/one.csv"]["time"] != "then"
    curve = scale.results / "training" / "curve.csv"
    curve.parent.mkdir()
    curve.write_text("step\n")
    record(curve, scale)
    assert set(recorded(scale)) == {"tables/one.csv", "training/curve.csv"}
    (scale.results / "tables/one.csv").unlink()
    save_table(pd.DataFrame({"a": [1]}), "two", "Two.", scale)
    assert set(recorded(scale)) == {"tables/two.csv", "training/curve.csv"}


def other_weights(scale, folder):
    shutil.copytree(scale.model, folder / "other")
    weights = folder / "other/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    return {"model": str(folder / "other")}


def other_data(scale, folder):
    shutil.copytree(scale.data, folder / "other")
    (folder / "other/PhraseCut/VGPhraseCut_v0/refer_test.json").write_text("[{}]")
    return {"data": folder / "other"}


@pytest.mark.parametrize("change", [other_weights, other_data, lambda *_: {"seed": 7}], ids=["model", "data", "seed"])
def test_the_same_file_made_from_something_else_is_recorded_anew(scale, tmp_path, change):
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", scale)
    before = recorded(scale)["tables/one.csv"]
    other = replace(scale, **change(scale, tmp_path))
    save_table(pd.DataFrame({"a": [1]}), "one", "One.", other)
    after = recorded(scale)["tables/one.csv"]
    assert after["sha256"] == before["sha256"]
    made_from = ("seed", "model", "data")
    assert [after[key] for key in made_from] == [provenance(other)[key] for key in made_from]
    assert [after[key] for key in made_from] != [before[key] for key in made_from]


@pytest.mark.parametrize("content", ["", '{"a": {}, ', "[]", '{"a": 1}', "\xff"])
def test_damaged_provenance(scale, content):
    scale.results.mkdir()
    book = scale.results / "provenance.json"
    book.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"provenance.json' is damaged \(.+\): restore it, or remove it and run"):
        save_table(pd.DataFrame({"a": [1]}), "one", "One.", scale)
    assert book.read_bytes() == content.encode("latin-1")


def test_committed_results_are_the_shipped_models():
    """After a change of weights, of the mini world or of a notebook: make reproduce, clipseg-repro bench, and
    commit."""
    results = Path(__file__).parents[2] / "results"
    entries = recorded(replace(SCALES["mini"], results=results))
    made = [path for kind in ("tables/*.csv", "figures/*.png", "measured/*.*", "demo.*") for path in results.glob(kind)]
    assert set(entries) == {path.relative_to(results).as_posix() for path in made}
    assert [name for name, entry in entries.items() if sha256(results / name) != entry["sha256"]] == []
    shipped = {"source": "mini", "sha256": sha256(MINI / "model.safetensors")}
    assert [name for name, entry in entries.items() if entry["model"] != shipped] == []
    data = get_scale("mini").data  # which `make test` builds
    known = {s.open(data / s.folder, s.splits[0]).fingerprint() for s in CATALOGUE.values()}
    # the film needs none
    assert {part for entry in entries.values() for part in (entry["data"] or "").split()} == known


def test_figure_is_the_same_bytes_each_time(scale):
    written = []
    for _ in range(2):
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.plot([0, 1])
        show_figure(figure, "line", scale)
        plt.close(figure)
        written.append((scale.results / "figures/line.png").read_bytes())
    assert written[0] == written[1]
    assert "Software" not in Image.open(scale.results / "figures/line.png").info
    with pytest.raises(InputError, match=r"result name '\.\./x'"):
        show_figure(figure, "../x", scale)
