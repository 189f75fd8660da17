"""A dress rehearsal of the paper scale: every notebook at SCALE = "paper", to its end, against stand-ins.

    make rehearsal                              # small: the mini model under the released name; some images of each
    .venv/bin/python tests/rehearsal.py --full-size --limit 40 --only 06     # the released size, random weights

The Hub is a cache that holds a model of the released architecture under the released id, at the pinned commit; the
data are the mini world's, in the layouts and places that data/README.md names. The network is not asked for anything.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from clipseg_repro.bench import full_size
from clipseg_repro.errors import InputError
from clipseg_repro.files import written_whole
from clipseg_repro.models.hub import REVISIONS
from clipseg_repro.models.loading import MINI
from clipseg_repro.study.scales import SCALES, get_scale, project_root


def stand_in(cache: Path, full: bool):
    """Put a model into the Hub's cache under the id of the paper scale's."""
    name = SCALES["paper"].model
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISIONS[name]
    shutil.rmtree(folder, ignore_errors=True)
    if full:
        model, processor = full_size()
        model.save_pretrained(snapshot)
        processor.save_pretrained(snapshot)
    else:
        shutil.copytree(MINI, snapshot)
    with written_whole(folder / "refs" / "main") as temporary:
        temporary.write_text(REVISIONS[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="a model of the released size, random weights")
    parser.add_argument("--limit", type=int, default=4, help="images, episodes or steps of what takes long")
    parser.add_argument("--only", action="append", default=[], help="only this notebook, as 06; may be repeated")
    asked = parser.parse_args()
    get_scale("mini").prepare()
    place = project_root() / ".cache" / "rehearsal"
    shutil.rmtree(place / "results", ignore_errors=True)
    stand_in(place / "hub", asked.full_size)
    measured = place / "results" / SCALES["paper"].results / "tables"
    measured.mkdir(parents=True)
    for name in ("speed", "speed_prompts"):  # ten minutes of the clock, the same at both scales: `bench`
        for suffix in (".csv", ".md"):
            shutil.copy(project_root() / "results" / "tables" / f"{name}{suffix}", measured)
    known = {"HF_HUB_CACHE": place / "hub", "CLIPSEG_REPRO_RESULTS": place / "results"}
    known |= {"CLIPSEG_REPRO_DATA": get_scale("mini").data, "HF_HUB_OFFLINE": 1, "TRANSFORMERS_OFFLINE": 1}
    command = [sys.executable, "-m", "clipseg_repro.cli", "reproduce", "--scale", "paper", "--restart"]
    command += ["--limit", str(asked.limit), *(part for name in asked.only for part in ("--only", name))]
    started = time.monotonic()
    code = subprocess.run(command, env=os.environ | {key: str(value) for key, value in known.items()}).returncode
    print(f"{'through' if code == 0 else 'FAILED'} after {time.monotonic() - started:.0f} s; results are in {place}")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"Error: {error}")
