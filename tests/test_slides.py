"""The slides say what the results say."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from clipseg_repro.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "presentation"))
import slides  # noqa: E402

# Names that hold a digit; every other number on a slide has to be one of the results.
NAMES = re.compile(
    r"Tables? \d( and \d)?|\bC\d+(, C\d+)*|CVPR \d+|ViT-B/16|ViT-S/16|RN101|-[45]i\b|-20i\b|rd64|unseen-\d+|D ?= ?\d+"
    r"|layer 3|layer 11|intensity \d+%|\d+ / 20$"
)


@pytest.fixture(scope="module")
def deck():
    return slides.build(ROOT / "results")


def sources(slide):
    """Name and value of every source that a slide's notes name."""
    _, _, said = slide.notes_slide.notes_text_frame.text.partition("Sources (results/tables):")
    return dict(line.rsplit(" = ", 1) for line in said.strip().splitlines())


def cell(name):
    """A cell of results/tables, found in another way than `number` does: line by line."""
    table, *keys, column = name.split("; ")
    frame = pd.read_csv(ROOT / "results" / "tables" / f"{table}.csv", dtype=str, keep_default_na=False)
    lines = [row for row in frame.to_dict("records") if set(keys) <= set(row.values())]
    assert len(lines) == 1, name
    return lines[0][column]


def same(first, second):
    try:
        return float(first) == pytest.approx(float(second), rel=1e-5)  # as the notes round
    except ValueError:
        return first == second


def test_sources_are_what_results_have(deck):
    named = {name: value for slide in deck.slides for name, value in sources(slide).items()}
    assert len(named) > 200
    wrong = {n: v for n, v in named.items() if not n.startswith("#") and not same(v, cell(n))}
    assert not wrong


def test_every_number_on_a_slide_has_a_source(deck):
    typed = {}
    for page, slide in enumerate(deck.slides, 1):
        said = " ".join(f"{name} {value}" for name, value in sources(slide).items())
        known = [float(n) for n in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", said)]
        for text in slides.texts(slide):
            for token in re.findall(r"[-−]?\d[\d,]*\.?\d*", NAMES.sub("", text)):
                digits = len(token.partition(".")[2])
                value = float(token.replace("−", "-").replace(",", "").rstrip("."))
                if not any(abs(abs(value) - abs(own)) <= 0.5001 * 10**-digits for own in known):
                    typed[page] = [*typed.get(page, []), (token, text)]
    assert not typed


def test_no_slide_is_too_full(deck):
    """Nothing begins or ends outside of a page, no text is smaller than a back row can read, and the talk is a talk."""
    assert 15 <= len(deck.slides) <= 20
    sizes = set()
    for slide in deck.slides:
        for shape in slide.shapes:
            assert shape.left >= 0 and shape.left + shape.width <= deck.slide_width
            assert shape.top >= 0 and shape.top + shape.height <= deck.slide_height
            frames = [shape.text_frame] if shape.has_text_frame else []
            if shape.has_table:
                frames += [cell.text_frame for row in shape.table.rows for cell in row.cells]
            sizes |= {run.font.size.pt for f in frames for p in f.paragraphs for run in p.runs}
    assert min(sizes) >= 14


def test_a_missing_number_stops_it_with_its_name(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "figures").symlink_to(ROOT / "results" / "figures")
    with pytest.raises(InputError, match="'decoder_parameters; sum; D = 64' needs"):
        slides.build(tmp_path)


def test_the_pdf_is_of_these_slides(deck):
    """After new results: make presentation, where LibreOffice is installed."""
    keywords = "".join(f"{ord(letter):04X}" for letter in slides.digest(deck))
    assert keywords.encode() in (ROOT / "presentation" / "clipseg.pdf").read_bytes().upper()


def test_the_readme_tells_how_to_give_them():
    """Its times are the slides'."""
    specs = yaml.safe_load((ROOT / "presentation" / "slides.yaml").read_text(encoding="utf-8"))
    said = (ROOT / "presentation" / "README.md").read_text(encoding="utf-8")
    lines = [f"| {n} | {spec['title']} | {spec['minutes']:g} |" for n, spec in enumerate(specs, 1)]
    assert "\n".join([*lines, f"| | together | {sum(spec['minutes'] for spec in specs):g} |"]) in said
