"""The files around the package agree with each other and with what the package imports."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rocrate.rocrate import ROCrate

from clipseg_repro.errors import InputError
from clipseg_repro.files import sha256
from clipseg_repro.study import tables
from clipseg_repro.study.crate import NAME, write_crate
from clipseg_repro.study.front_page import with_front_page
from clipseg_repro.study.results import recorded
from clipseg_repro.study.scales import SCALES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = {canonicalize_name(Requirement(line).name): line for line in PROJECT["dependencies"]}
EXTRAS = PROJECT["optional-dependencies"]
DEV = {canonicalize_name(Requirement(line).name): line for line in EXTRAS["dev"]}
BROWSER = {canonicalize_name(Requirement(line).name): line for line in EXTRAS["browser"]}
BOOK = {canonicalize_name(Requirement(line).name): line for line in EXTRAS["book"]}


def test_conda_environment_lists_the_direct_dependencies():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    listed = [line.removeprefix("      - ") for line in lines if line.startswith("      - ")]
    assert listed == ["--editable .[dev]", *PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert f"  - python{PROJECT['requires-python']}" in lines


def test_requirements_pin_every_direct_dependency_within_its_range():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.]+(; .+)?", line) for line in lines), "plain name==version lines"
    pins = {requirement.name: str(requirement.specifier)[2:] for requirement in map(Requirement, lines)}
    assert "clipseg-repro" not in pins
    for name, line in (RUNTIME | DEV).items():
        assert Requirement(line).specifier.contains(pins[name]), f"{line}, pinned {pins[name]}"


@pytest.mark.parametrize(
    ("folder", "declared"),
    [("clipseg_repro", RUNTIME), ("tests", RUNTIME | DEV | BROWSER), ("presentation", RUNTIME | DEV | BOOK)],
)
def test_what_is_imported_is_declared(folder, declared):
    imported = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    ours = {"clipseg_repro"} | {path.stem for room in ("tests", "presentation") for path in (ROOT / room).rglob("*.py")}
    known = packages_distributions()
    for module in imported - ours - set(sys.stdlib_module_names):
        names = {canonicalize_name(name) for name in known.get(module, [module])}
        assert names & set(declared), f"{module} is imported in {folder} but not declared in pyproject.toml"


FLOORS = """
cli
bench verify batch check playground
study
mini
training
segmenter
models
evaluation
datasets plotting
prompts
downloads pictures
strips devices video
files errors __init__
""".split("\n")[1:-1]


def test_imports_point_downwards():
    """A room imports from itself and from the floors below."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    package = ROOT / "clipseg_repro"
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipseg_repro."):
                room = node.module.split(".")[1]
                assert room == own or floor[room] > floor[own], f"{path} imports {node.module}"


def listed(*options: str) -> list[Path]:
    """The files that `git ls-files` lists."""
    found = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git clone")
    return [ROOT / name for name in found.stdout.split("\0") if (ROOT / name).is_file()]


def test_no_file_names_a_package_registry():
    # in pieces, so that this file passes too
    hosts = ["pypi" + ".org", "python" + "hosted.", "download.pytorch" + ".org", "anaconda" + ".org", "npmjs" + "."]
    hosts += ["conda-forge" + ".org", "extra-index" + "-url", "--index" + "-url"]
    for path in listed("--cached", "--others", "--exclude-standard"):
        if b"\0" not in (content := path.read_bytes())[:8000]:
            text = content.decode("utf-8", errors="replace")
            assert not [host for host in hosts if host in text], f"{path} names a package registry"


def test_citation_and_codemeta_agree_with_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    meta = json.loads((ROOT / "codemeta.json").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    assert cited["version"] == meta["version"] == PROJECT["version"]
    assert cited["license"] == meta["license"].rpartition("/")[2] == PROJECT["license"]
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in meta["author"]]
    assert meta["referencePublication"]["name"] == paper["title"]
    assert meta["referencePublication"]["identifier"] == paper["identifiers"][0]["value"]
    for key in ("name", "description", "keywords"):
        assert meta[key] == PROJECT[key]
    assert meta["runtimePlatform"] == f"Python {PROJECT['requires-python']}"
    assert meta["codeRepository"] == PROJECT["urls"]["Repository"]


def test_notebooks_have_parameters():
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert any("parameters" in cell["metadata"].get("tags", []) for cell in cells), path.name


def test_notebooks_are_stored_as_they_ran():
    """All code cells ran, without error, and are short. No widgets: they show nothing without a kernel (Makefile)."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in notebook["metadata"], path.name
        for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
            where = f"{path.name}, {cell['id']}"
            assert cell["execution_count"], f"{where}: not executed"
            assert len(cell["source"]) <= 25, f"{where}: long"
            for output in cell["outputs"]:
                assert output["output_type"] != "error", where
                assert not any("widget" in kind for kind in output.get("data", {})), where


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        assert f"`{path.stem}`" in readme


def test_the_crate_is_current(tmp_path):
    """What the provenance gives; its files are kept, as it says, and a reader of the standard finds its way. After new
    results: make readme."""
    results = ROOT / "results"
    for name in ("provenance.json", "decoders"):
        (tmp_path / name).symlink_to(results / name)
    write_crate(replace(SCALES["mini"], results=tmp_path))
    assert (results / NAME).read_bytes() == (tmp_path / NAME).read_bytes()
    crate = ROCrate(results)
    assert crate.root_dataset["citation"]["author"][1]["name"] == "Alexander Ecker"
    files = {unquote(each.id): each["sha256"] for each in crate.data_entities if each.type == "File"}
    assert {path: sha256(results / path) for path in files} == files
    made = {unquote(each["result"].id): each for each in crate.root_dataset["mentions"]}
    assert set(made) == set(recorded(replace(SCALES["mini"], results=results)))
    action = made["measured/clipseg-pc+.npz"]
    entry = recorded(replace(SCALES["mini"], results=results))["measured/clipseg-pc+.npz"]
    assert entry["commit"] in action["instrument"]["name"] and action["endTime"] == entry["time"]
    assert "decoders/clipseg-pc+.safetensors" in [each.id for each in action["object"]]
    unkept = [each["name"] for each in made["measured/clipseg-pc+-seed1.npz"]["object"]]
    assert "decoder of the run clipseg-pc+, seed 1, in half precision" in unkept
    assert {results / path for path in files} <= set(listed("results"))


def test_every_result_was_made_by_a_commit_of_this_history():
    """After results of a changed clone: commit, then clipseg-repro reproduce makes them again."""
    entries = recorded(replace(SCALES["mini"], results=ROOT / "results"))
    assert [path for path, entry in entries.items() if entry["dirty"] is not False] == []
    log = subprocess.run(["git", "rev-list", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if log.returncode or (ROOT / ".git/shallow").exists():
        pytest.skip("no whole history here")
    assert {entry["commit"] for entry in entries.values()} <= set(log.stdout.split())


def test_decoders_are_kept_of_all_rows_of_the_paper():
    kept = listed("results/decoders")
    theirs = tables.reported()
    for table in range(3, 10):
        asked = theirs[theirs.table == table]
        for row in tables.rows(table):
            if (row.method, row.setting) in set(zip(asked.method, asked.setting)):
                assert set(row.runs) <= {path.stem for path in kept}
    assert sum(path.stat().st_size for path in kept) <= 30e6


def test_the_readmes_table_is_current():
    """After new results: make readme."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_front_page(readme, ROOT / "results") == readme
    with pytest.raises(InputError, match="lacks the marks"):
        with_front_page("no marks", ROOT / "results")
