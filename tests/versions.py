"""CLIPSeg's logits under old and new transformers: `make versions` writes the table results/tables/versions.

Each version is installed into a folder that is thrown away, in front of what the environment has; the fixed model and
inputs are those of models/full_size.py.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from packaging.requirements import Requirement

from clipseg_repro.study.results import save_table
from clipseg_repro.study.scales import get_scale

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "models"))
from full_size import figures  # noqa: E402

OLD = ("4.25.1", "4.45.2", "4.46.0", "4.46.3", "4.47.0")  # the first with CLIPSeg; those around 4.46, that broke it
HEADS = ("plain", "refined")
SAME = 1e-5  # of logits between -2 and 2: what another order of sums may change
SHOWN = 4  # logits of a sample


def measured(name: str) -> dict[str, torch.Tensor] | str:
    """Logits (352, 352) by head under a version of transformers ("": the installed one), or the error in its place."""
    with tempfile.TemporaryDirectory() as folder:
        found, out = Path(folder) / "packages", Path(folder) / "logits.pt"
        commands = [[sys.executable, HERE / "models" / "full_size.py", out]]
        if name:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
            commands.insert(0, [*install, "--only-binary=:all:", "--target", found, f"transformers=={name}"])
        for command in commands:
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": str(found)}, stderr=subprocess.PIPE, text=True
            )
            if done.returncode:
                return done.stderr.strip().splitlines()[-1]
        return torch.load(out, weights_only=True)


def row(name: str, support: str, found: dict[str, torch.Tensor] | str, pinned: dict[str, torch.Tensor]) -> dict:
    own = {"transformers": name, "support": support}
    if isinstance(found, str):
        return own | {"what happened": found}
    apart = {head: float((found[head] - pinned[head]).abs().max()) for head in HEADS}
    own["what happened"] = "the same logits" if max(apart.values()) < SAME else "other logits"
    own |= {f"largest difference, {head} head": f"{value:.0e}" if value else "0" for head, value in apart.items()}
    samples = {head: figures(found[head])["logits"][:SHOWN] for head in HEADS}
    return own | {f"logits, {head} head": " ".join(f"{v:.5f}" for v in sample) for head, sample in samples.items()}


def main():
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = (each for each in map(Requirement, project["dependencies"]) if each.name == "transformers")
    (floor,) = (each.version for each in needed.specifier if each.operator == ">=")
    pinned = measured("")
    assert not isinstance(pinned, str), pinned
    rows = [row(name, "no", measured(name), pinned) for name in OLD]
    rows.append(row(floor, "the oldest", measured(floor), pinned))
    rows.append(row(version("transformers"), "pinned", pinned, pinned))
    caption = (
        "One call of CLIPSegForImageSegmentation, ViT-B/16 of the released size with fixed random weights, a phrase in "
        "a picture of 352 px, under several versions of transformers: how far the logits are from the pinned version's"
    )
    table = save_table(pd.DataFrame(rows), "versions", caption, get_scale(), command="make versions")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
