"""The one table that maps a scale to its paths and budgets. Nothing else may ask which scale it is."""

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipseg_repro.errors import InputError


def _build_mini(root: Path, seed: int):
    from clipseg_repro.mini import export, replicas  # late: only who builds the mini world needs the renderer

    export.build(root / "PhraseCut", seed=seed)
    replicas.build(root, seed=seed)


def _mini_words():
    from clipseg_repro.mini.vocabulary import MiniWords

    return MiniWords()


def _wordnet():
    from clipseg_repro.datasets.held_out import WordNet

    return WordNet(data_root() / "nltk_data")


@dataclass(frozen=True)
class Scale:
    """Where a scale's model, data and results are, and what it may spend.

    In SCALES the paths are relative to the data and results folders (`sources` to the latter); `get_scale` gives
    absolute ones.
    """

    name: str
    model: str  # what `load_segmenter` takes
    data: Path  # the folder of the data sets, each in its own (datasets.catalogue)
    results: Path
    live: dict  # what changes besides `training` in the run that a notebook shows live: seconds on a laptop
    training: dict = field(default_factory=dict)  # what this scale's budget changes in every run of experiments.yaml
    pace: float = 1.0  # share of a run's iterations that the budget allows
    layers: dict[int, int] = field(default_factory=dict)  # which of this scale's layers stand for which of the paper's
    # What a run starts from whose model is not made from `model`'s CLIP: a Hub id, or a folder that another run makes.
    sources: dict[str, str | Path] = field(default_factory=dict)
    episodes: int = 1000  # of each fold of COCO-20i
    images: int | None = None  # of PhraseCut's test split, for the tables; all if none
    seed: int = 0
    build: Callable[[Path, int], None] | None = None  # writes all data sets into `data`; None: the user fetches them

    words: Callable = _wordnet  # () -> what held-out classes are called: `datasets.held_out.Words`

    @property
    def phrasecut(self) -> Path:
        return self.data / "PhraseCut" / "VGPhraseCut_v0"

    @property
    def column(self) -> str:
        """Of this scale's figures in a table that has the paper's own in the column "paper"."""
        return "measured" if self.name == "paper" else self.name

    @property
    def unfinished(self) -> Path:
        """Where measurements keep what they have counted until they are through (`evaluation.per_image.measure`)."""
        return self.results / "unfinished"

    def prepare(self, *needed: str):
        """Generate the data sets where the scale can (idempotent, resumes after a kill, repairs what is damaged), and
        see that those that are `needed` (by their names in `datasets.catalogue`) are there.

        Raises InputError where they must be fetched. What is there is not checked: `data check` does.
        """
        from clipseg_repro.datasets.catalogue import CATALOGUE  # late: slow to import

        if self.build:
            self.build(self.data, self.seed)
        for name in needed:
            if missing := CATALOGUE[name].missing(self.data):
                raise InputError(
                    f"no {CATALOGUE[name].title} data in '{self.data / CATALOGUE[name].folder}' (missing: "
                    f"{', '.join(missing)}): fetch them with clipseg-repro data fetch {name} --scale {self.name} or as "
                    "data/README.md says, or set CLIPSEG_REPRO_DATA to the folder that holds them; then check them: "
                    f"clipseg-repro data check {name} --scale {self.name}"
                )

    def budget(self, settings: dict, steps: int | None = None) -> dict:
        """What this scale changes in a run of those settings (`training.experiments`); `steps` instead of its own."""
        changed = self.training | {"iterations": steps or round(self.pace * settings["iterations"])}
        if settings["layers"]:
            changed["layers"] = [self.layers.get(layer, layer) for layer in settings["layers"]]
        return changed

    def run_folder(self, run: str, seed: int = 0) -> Path:
        """Where a training run's checkpoint, curve and model are."""
        return self.results / "training" / (f"{run}-seed{seed}" if seed else run)

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
        data=Path("mini"),
        results=Path("."),
        live={"iterations": 120, "batch": 4, "visual": False},
        episodes=20,
        images=200,
        pace=0.12,
        layers={3: 1, 6: 3, 7: 4, 9: 5},  # of 6
        training={
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
        words=_mini_words,
    ),
    "paper": Scale(
        name="paper",
        model="CIDAS/clipseg-rd64-refined",
        data=Path("."),
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
    return replace(scale, data=data_root() / scale.data, results=results, sources=sources)


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
