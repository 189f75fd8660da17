"""The book's contents, without Sphinx: `make book` builds it, and fails on warnings and on links that lead nowhere."""

import ast
import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("book", ROOT / "presentation" / "book" / "build.py")
book = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(book)


def test_every_notebook_is_a_chapter_once():
    listed = re.findall(r"<notebooks/(\w+)>", book.chapters(None))
    assert listed == sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    assert re.findall(r"\(notebooks/(\w+)\.ipynb\)", book.contents(None)) == listed


def test_every_table_is_there_once():
    pages = book.tables(ROOT / "results")
    places = re.findall(r"^\(table-(.+)\)=$", "\n".join(pages.values()), re.MULTILINE)
    assert sorted(places) == sorted(path.stem for path in (ROOT / "results" / "tables").glob("*.md"))
    assert "(table-claims)=" in pages["tables/ledger.md"]


def test_the_glossary_is_that_of_notebook_00():
    assert book.glossary(None).count("\n") == notebook_text("00").count("\n| *") + 1
    assert "](notebooks/02_architecture.ipynb)" in book.glossary(None)


def notebook_text(number):
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_bytes())["cells"])


def messages():
    """Every string of the package as Python joins it, what is filled in as "...", and the other places that speak."""
    for path in (ROOT / "clipseg_repro").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(PYTHON)", "...")
    yield notebook_text("00")


def test_quoted_messages_are_what_we_print():
    text = (ROOT / "presentation" / "book" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [q for line in re.findall(r"^It says: (.+)$", text, re.MULTILINE) for q in re.findall(r"`([^`]+)`", line)]
    known = list(messages())
    assert quoted and [quote for quote in quoted if not any(quote in message for message in known)] == []


def test_faults_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://arxiv.org">out</a> <a href="b.html#there">fine</a> <a href="b.html#gone">1</a>'
        '<a href="c.html">2</a> <img src="https://host/x.png"> <script src="//host/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    (tmp_path / "x.css").write_text('@import "https://host/font.css"; p { background: url(data:image/png;base64,x) }')
    assert book.faults(tmp_path, notebooks=[]) == [
        "a.html: b.html#gone has no such place",
        "a.html: c.html leads nowhere",
        "a.html: https://host/x.png is not in the book",
        "a.html: //host/x.js is not in the book",
        "x.css: https://host/font.css is not in the book",
    ]
