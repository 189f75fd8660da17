"""Numbers in prose are those of results/, by name."""

import pandas as pd
import pytest

from clipseg_repro.errors import InputError
from clipseg_repro.study.numbers import filled, number


@pytest.fixture
def results(tmp_path):
    (tmp_path / "tables").mkdir()
    rows = [
        ("CLIPSeg (PC, D=128)", "miou", 48.2, 63.9),
        ("CLIPSeg (PC)", "miou", 46.1, None),
        ("CLIPSeg (PC)", "ap", 78.2, 76),
    ]
    frame = pd.DataFrame(rows, columns=["method", "metric", "paper", "mini"])
    frame.to_csv(tmp_path / "tables/table3.csv", index=False)
    return tmp_path


def test_a_text_is_filled_by_name(results):
    text = "{{table3; CLIPSeg (PC, D=128); mini}} and {{ table3; CLIPSeg (PC); ap; paper @ +.2f }}, {{#rows}}."
    blocks = {"rows": lambda folder: str(len(pd.read_csv(folder / "tables/table3.csv")))}
    assert filled(text, results, blocks) == "63.9 and +78.20, 3."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("table3; CLIPSeg (PC); mini", "of 2 rows"),
        ("table3; HulaNet; mini", "of 0 rows"),
        ("table3; CLIPSeg (PC); miou; maxi", "column 'maxi'"),
        ("table3; CLIPSeg (PC); miou; mini", "has not been measured"),
        ("table10; x; mini", "table10.csv', which is not there"),
    ],
)
def test_a_missing_number_stops_with_its_name(results, name, words):
    with pytest.raises(InputError, match=words) as error:
        number(results, name)
    assert name in str(error.value)
