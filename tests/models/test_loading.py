"""Loading from folders, the Hub and its cache."""

import os
import shutil
import subprocess
import sys

from clipseg_repro.models.loading import REVISIONS


def test_hub_models_come_from_the_cache_at_the_pinned_commit(tiny_folder, tmp_path):
    """Offline, in a process of its own: what is cached loads, what is not is one clear error."""
    pinned = "CIDAS/clipseg-rd64-refined"
    assert len(REVISIONS[pinned]) == 40
    shutil.copytree(tiny_folder, tmp_path / f"models--{pinned.replace('/', '--')}" / "snapshots" / REVISIONS[pinned])
    code = f"""
from clipseg_repro.errors import InputError
from clipseg_repro.models.loading import load_model
print(load_model({pinned!r})[0].config.reduce_dim)
try:
    load_model("CIDAS/clipseg-rd16")
except InputError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    width, error = done.stdout.splitlines()
    assert width == "64"
    assert all(word in error for word in ("'CIDAS/clipseg-rd16'", f"cache {tmp_path}", "'mini'")), error
