"""The one table that maps a scale to its paths and budgets. Nothing else may ask which scale it is."""

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipseg_repro.errors import InputError


def _build_mini(root: Path, seed: int):
    from clipseg_repro.mini.export import build  # late: only who builds the mini world needs the renderer

    build(root, seed=seed)


@dataclass(frozen=True)
class Scale:
    """Where a scale's model, data and results are, and what it may spend.

    In SCALES the paths are relative to the data and results folders (`sources` to the latter); `get_scale` gives
    absolute ones.
    """

    name: str
    model: str  # what `load_segmenter` takes
    phrasecut: Path  # the VGPhraseCut_v0 folder
    results: Path
    live: dict  # what changes besides `training` in the run that a notebook shows live: seconds on a laptop
    training: dict = field(default_factory=dict)  # what this scale's budget changes in every run of experiments.yaml
    # What a run starts from whose model is not made from `model`'s CLIP: a Hub id, or a folder that another run makes.
    sources: dict[str, str | Path] = field(default_factory=dict)
    seed: int = 0
    build: Callable[[Path, int], None] | None = None  # writes VGPhraseCut_v0 into a folder; None: the user fetches it

    @property
    def unfinished(self) -> Path:
        """Where measurements keep what they have counted until they are through (`evaluation.per_image.measure`)."""
        return self.results / "unfinished"

    def prepare(self):
        """Make sure that the data are there: generate them where the scale can (idempotent, resumes after a kill,
        repairs what is damaged).

        Raises InputError where they must be fetched and are not there. What is there is not checked: `data check` does.
        """
        from clipseg_repro.datasets.phrasecut_files import missing_parts  # late: slow to import

        if self.build:
            self.build(self.phrasecut.parent, self.seed)
        elif missing := missing_parts(self.phrasecut):
            raise InputError(
                f"no PhraseCut data in '{self.phrasecut}' (missing: {', '.join(missing)}): fetch them as "
                "data/README.md says, or set CLIPSEG_REPRO_DATA to the folder that holds them; then check them with "
                f"clipseg-repro data check phrasecut --scale {self.name}"
            )

    def source(self, model: str) -> str:
        """What `training.train` starts a run of that `model` from (the key of experiments.yaml).

        Raises InputError with the command that makes it if it is not there yet."""
        found = self.sources.get(model, self.model)
        if isinstance(found, Path) and not (found / "config.json").is_file():
            raise InputError(
                f"a '{model}' run starts from '{found}', which is not there: make it with "
                f"clipseg-repro train {found.parent.name}"
            )
        return str(found)


SCALES = {
    "mini": Scale(
        name="mini",
        model="mini",
        phrasecut=Path("mini/PhraseCut/VGPhraseCut_v0"),
        results=Path("."),
        live={"iterations": 250, "batch": 4, "visual": False},
        training={
            "iterations": 7200,
            "batch": 12,
            "final_learning_rate": 0.0,
            "phrases_per_image": 4,
            "crop_once": True,
            "film": "aligned",
        },
        sources={
            "vitseg": Path("training/mini-vit/model"),
            "clipseg-resnet": Path("training/mini-resnet-clip/model"),
        },
        build=_build_mini,
    ),
    "paper": Scale(
        name="paper",
        model="CIDAS/clipseg-rd64-refined",
        phrasecut=Path("PhraseCut/VGPhraseCut_v0"),
        results=Path("paper"),
        live={"iterations": 1000},
        sources={
            "vitseg": "timm/vit_base_patch16_384.augreg_in21k_ft_in1k",
            "clipseg-resnet": "timm/resnet50x4_clip.openai",
        },
    ),
}


def get_scale(name: str = "mini") -> Scale:
    """The scale of that name with absolute paths; InputError if there is none.

    Data are in data/ and results in results/ of the project (see `project_root`); the environment variables
    CLIPSEG_REPRO_DATA and CLIPSEG_REPRO_RESULTS name other folders.
    """
    if name not in SCALES:
        raise InputError(f"unknown scale '{name}': choose one of {', '.join(SCALES)}")
    scale = SCALES[name]
    results = project_root() / os.environ.get("CLIPSEG_REPRO_RESULTS", "results") / scale.results
    sources = {k: results / v if isinstance(v, Path) else v for k, v in scale.sources.items()}
    return replace(scale, phrasecut=data_root() / scale.phrasecut, results=results, sources=sources)


def data_root() -> Path:
    """The folder of the data sets and weights: data/ of the project, or what CLIPSEG_REPRO_DATA names."""
    return project_root() / os.environ.get("CLIPSEG_REPRO_DATA", "data")


def project_root() -> Path:
    """The clone that the working folder is in (notebooks run in notebooks/), else the working folder itself."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        try:
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
        except (OSError, ValueError, KeyError):
            continue
        if project == "clipseg-repro":
            return folder
    return here
