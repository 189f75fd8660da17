"""Exercises of the notebooks: their solutions pass their checks, and the cell as it stands does not."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipseg_repro import check

SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", re.DOTALL)
# As the notebooks' `check`, but its functions raise.
STRICT = SimpleNamespace(**{name: f.__wrapped__ for name, f in vars(check).items() if hasattr(f, "__wrapped__")})


def exercises():
    """(notebook, cell to fill in, check, solution) of every exercise: three cells, the first tagged "exercise"."""
    for path in sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for n, cell in enumerate(cells):
            if "exercise" in cell["metadata"].get("tags", []):
                code, checked, told = ("".join(c["source"]) for c in cells[n : n + 3])
                yield pytest.param(code, checked, told, id=f"{path.stem}, {cell['id']}")


@pytest.mark.parametrize(("code", "checked", "told"), exercises())
def test_exercise(code, checked, told):
    open_, solved = {"check": STRICT}, {"check": STRICT}
    exec(code, open_)
    with pytest.raises(AssertionError, match="fill in the cell above"):
        exec(checked, open_)
    exec(SOLUTION.search(told)[1], solved)
    exec(checked, solved)


def test_a_check_tells_what_is_wrong_and_lets_the_notebook_go_on(capsys):
    check.resampled_mean(lambda values, drawn: values[drawn].sum(1))
    check.resampled_mean(lambda values, drawn: values(drawn))
    check.resampled_mean(lambda values, drawn: values[drawn].mean(1))
    wrong, stopped, right = capsys.readouterr().out.splitlines()
    assert wrong.startswith("Not yet: take the values")
    assert stopped.startswith("Not yet: it stops with TypeError")
    assert right == "Right."
