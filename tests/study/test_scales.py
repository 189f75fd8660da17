"""Scales: paths and budgets."""

import pytest

from clipseg_repro.errors import InputError
from clipseg_repro.study.scales import SCALES, get_scale, project_root


def test_scales(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "clipseg-repro"\n')
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("CLIPSEG_REPRO_DATA", raising=False)
    monkeypatch.setenv("CLIPSEG_REPRO_RESULTS", "elsewhere")
    assert project_root() == tmp_path
    assert get_scale("mini").phrasecut == tmp_path / "data/mini/PhraseCut/VGPhraseCut_v0"
    assert get_scale("paper").results == tmp_path / "elsewhere/paper"
    assert len({get_scale(name).results for name in SCALES}) == len(SCALES), "one scale would overwrite the other's"
    with pytest.raises(InputError, match="unknown scale 'large': choose one of mini, paper"):
        get_scale("large")
    (tmp_path / "data/PhraseCut/VGPhraseCut_v0/images").mkdir(parents=True)
    present = {"images/1.jpg": "images/<image_id>", "refer_test.json": "refer_", "image_data_split.json": "split3000"}
    for file, named in present.items():  # data of one split are enough
        with pytest.raises(InputError, match=rf"no PhraseCut data in .*missing: .*{named}.*data/README.md"):
            get_scale("paper").prepare("phrasecut")
        (tmp_path / "data/PhraseCut/VGPhraseCut_v0" / file).touch()
    get_scale("paper").prepare("phrasecut")
