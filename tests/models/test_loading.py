"""Loading from folders, the Hub and its cache."""

import json
import subprocess
import sys
from pathlib import Path

import hub_stand_in

from clipseg_repro.models.hub import REVISIONS


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
