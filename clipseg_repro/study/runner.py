"""The study: run the notebooks in order, headlessly, and go on where a killed run stopped."""

import hashlib
import json
import re
import tempfile
from functools import lru_cache
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from nbclient.exceptions import DeadKernelError
from tqdm.auto import tqdm

from clipseg_repro.errors import InputError
from clipseg_repro.files import sha256, sweep
from clipseg_repro.study.crate import write_crate
from clipseg_repro.study.results import PACKAGE, recorded
from clipseg_repro.study.scales import get_scale, project_root


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error. The message names notebook, cell and error."""


def notebooks(only=()) -> list[Path]:
    """The project's notebooks (notebooks/NN_name.ipynb) in order, or those that `only` names ("03", "03_text_prompts").

    Raises InputError for a name that fits none.
    """
    folder = project_root() / "notebooks"
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise InputError(f"no notebooks in '{folder}': run this inside a clone of the repository")
    chosen = set()
    for name in only:
        fitting = {path for path in found if name in (path.stem, path.name, path.stem[:2])}
        if not fitting:
            raise InputError(f"unknown notebook '{name}': choose from {', '.join(path.stem for path in found)}")
        chosen |= fitting
    return sorted(chosen) or found


def reproduce(only=(), scale: str = "mini", resume: bool = True, limit: int | None = None) -> list[Path]:
    """Run the notebooks (all, or those that `only` names) and return their executed copies.

    Notebooks write tables and figures to results/ themselves; here executed copies go to results/executed, what they
    print to results/logs, and at the end the crate that describes the results is made anew. With `resume`, a notebook
    that has run is not run again unless it, the package, the scale or the study's runs have changed since, or one
    of its tables or figures is no longer there as it was written and recorded. The kernel is this interpreter's,
    whatever kernels are installed. `limit`: of those notebooks that have such a parameter, for a quick pass. Raises
    NotebookFailed, or InputError if results/ cannot be written or its provenance.json is damaged.
    """
    chosen, scale = notebooks(only), get_scale(scale)
    executed, logs = scale.results / "executed", scale.results / "logs"
    try:
        for folder in (executed, logs):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # fail before the first notebook, not after it
        sweep(scale.results)
        entries = recorded(scale)
        scale.prepare()
        runs, copies = _runs(scale, entries), []
        for number, path in enumerate(chosen, start=1):
            parameters = {"SCALE": scale.name} | ({"LIMIT": limit} if limit and _takes_limit(path) else {})
            copy, key = executed / path.name, _key(path, parameters, runs)
            label = f"[{number}/{len(chosen)}] {path.stem}"
            if resume and _finished(copy, key, scale, entries):
                tqdm.write(f"{label}: already done")
            else:
                _run(path, copy, logs / f"{path.stem}.log", scale, parameters, key, label)
            copies.append(copy)
        write_crate(scale)
    except OSError as error:
        raise InputError(
            f"cannot write '{error.filename or scale.results}' ({error.strerror or error}): free disk space, make the "
            "folder writable, or set CLIPSEG_REPRO_RESULTS (results) and CLIPSEG_REPRO_DATA (data) to other folders"
        ) from error
    return copies


def _takes_limit(path: Path) -> bool:
    cells = nbformat.read(path, as_version=4).cells
    return any("parameters" in cell.metadata.get("tags", ()) and "LIMIT" in cell.source for cell in cells)


def _run(path, copy, log, scale, parameters, key, label):
    """Execute one notebook in its folder; its copy appears under its name only when it is complete."""
    from papermill import execute_notebook  # slow to import
    from papermill.exceptions import PapermillExecutionError

    partial, before = copy.with_suffix(".partial.ipynb"), _written(scale)
    try:
        with open(log, "w", encoding="utf-8") as output:

            class Kernel(AsyncKernelManager):
                @property
                def kernel_spec(self):  # not what Jupyter finds under that name in its folders
                    return KernelSpecManager(kernel_dirs=[]).get_kernel_spec(NATIVE_KERNEL_NAME)

                async def start_kernel(self, **options):  # what it says itself, as on Ctrl-C, goes to the log too
                    return await super().start_kernel(stdout=output, stderr=output, **options)

            notebook = execute_notebook(
                path,
                partial,
                parameters=parameters,
                kernel_name=NATIVE_KERNEL_NAME,
                language="python",
                kernel_manager_class=Kernel,
                cwd=path.parent,
                progress_bar={"desc": label},
                stdout_file=output,
                stderr_file=output,
            )
    except PapermillExecutionError as error:
        raise NotebookFailed(
            f"{path.name}, {_cell(path, error.source)}: {error.ename}: {error.evalue}\n"
            f"What had run is in {partial}; mend the cause and run the same command to go on from this notebook."
        ) from error
    except DeadKernelError as error:
        raise NotebookFailed(
            f"{path.name}: its kernel died, as when memory runs out. What had run is in {partial}; "
            "close other programs and run the same command to go on from this notebook."
        ) from error
    made = (path for path, time in _written(scale).items() if before.get(path) != time)
    results = {path.relative_to(scale.results).as_posix(): sha256(path) for path in made}
    notebook.metadata["clipseg_repro"] = {"key": key, "results": results}
    nbformat.write(notebook, partial)
    partial.replace(copy)


def _cell(path, source):
    """The failing cell as its reader sees it: counted from 1 in the notebook as written, with its first line."""
    first = next((line.strip() for line in source.splitlines() if line.strip()), "")
    cells = nbformat.read(path, as_version=4).cells
    index = next((i for i, cell in enumerate(cells, start=1) if cell.source == source), None)
    return f"cell {index} of {len(cells)} ({first})" if index else f"the cell of parameters ({first})"


def _key(path: Path, parameters: dict, runs: list) -> str:
    """Changes when a re-run could give something else: with the notebook's cells, its parameters, the package, or the
    study's runs."""
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells]
    return hashlib.sha256(json.dumps([cells, parameters, _package_checksum(), runs]).encode()).hexdigest()


def _runs(scale, entries):
    """Of each run of the study, the decoder that was measured, and on which parts."""
    from clipseg_repro.study.measured import key, measured, parts  # slow to import
    from clipseg_repro.study.queue import queue

    def known(run, seed):
        entry = entries.get(f"measured/{key(run, seed)}.npz", {})
        return entry.get("decoder"), sorted({*parts(run)} & {*measured(run, seed, scale)})

    return [known(run, seed) for run, seed in queue()]


@lru_cache
def _package_checksum():
    files = sorted(p for p in PACKAGE.rglob("*") if p.is_file() and not re.search(r"__pycache__|\.tmp$", str(p)))
    return hashlib.sha256("".join(f"{p.relative_to(PACKAGE)} {sha256(p)}\n" for p in files).encode()).hexdigest()


def _written(scale):
    """When every table and figure was written last: what changes while a notebook runs is its work."""
    files = [*(scale.results / "tables").glob("[!.]*"), *(scale.results / "figures").glob("[!.]*")]
    return {path: path.stat().st_mtime_ns for path in files}


def _finished(copy, key, scale, entries):
    """Whether a copy was completed under that key, and its results are there as they were written and recorded."""
    try:
        done = nbformat.read(copy, as_version=4).metadata["clipseg_repro"]
        return done["key"] == key and all(
            sha256(scale.results / name) == checksum
            and (name.endswith(".md") or entries[name]["sha256"] == checksum)  # recorded by its CSV
            for name, checksum in done["results"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):  # no copy, or a half one; a file or its entry is gone
        return False
