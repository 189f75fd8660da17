"""The whole study as a static web page, offline: `make book` writes presentation/book/_build/html.

The pages of this folder, the notebooks as stored and what results/ and the docstrings give are laid out as in the
repository, so that their links hold; Sphinx makes the pages, no warning let through; `faults` reads what came out.
"""

import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import clipseg_repro
from clipseg_repro.errors import InputError
from clipseg_repro.study.front_page import front_page
from clipseg_repro.study.numbers import filled

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "presentation" / "book"
BUILD = BOOK / "_build"
RESULTS = ROOT / "results"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
DOCUMENTS = ("results/report.md", "presentation/README.md", "data/README.md", "CREDITS.md")  # pages as they are
CHAPTERS = {  # first and last notebook of each part, as the README's table has them in order
    "The model": ("00", "05"),
    "The paper's tables": ("06", "10"),
    "Beyond them": ("11", "13"),
}
LEDGER = "claims"  # the table that has a page of its own
LONG = 24  # characters of a table's cell that is prose
SHORT = 20  # characters of a caption's first clause that says too little as a title
TABLE = re.compile(r"^(?:\|.*\n)+", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(?=[)#\s])")


def readme(begin: str, end: str) -> str:
    """The README between two headings, the first left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(begin)}\n(.*?)^## {re.escape(end)}\n", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise InputError(f"the README has no heading '{begin}' before '{end}': name them in {Path(__file__).name} anew")
    return found[1].strip()


def contents(_) -> str:
    """The README's table of the notebooks, each name a link under the notebook's own title."""
    titles = {path.stem: _title(path) for path in NOTEBOOKS}
    rows = [line for line in readme("Notebooks", "Results").splitlines() if line.startswith("|")]
    lines = ["| notebook | | of the paper |", *rows[1:]]
    return re.sub(r"`(\d\d_\w+)`", lambda m: f"[{titles[m[1]]}](notebooks/{m[1]}.ipynb)", "\n".join(lines))


def chapters(_) -> str:
    """The notebooks as the book's first chapters, numbered."""
    parts = []
    for part, (first, last) in CHAPTERS.items():
        lines = [f"{p.stem[:2]} {_title(p)} <notebooks/{p.stem}>" for p in NOTEBOOKS if first <= p.stem[:2] <= last]
        parts.append("\n".join(["```{toctree}", f":caption: {part}", ":hidden:", "", *lines, "```"]))
    return "\n\n".join(parts)


def glossary(_) -> str:
    """The glossary of notebook 00, its links as seen from here."""
    cells = json.loads(NOTEBOOKS[0].read_bytes())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    found = [text for text in texts if text.startswith("## Glossary\n")]
    if len(found) != 1:
        raise InputError(f"{NOTEBOOKS[0].name} has {len(found)} cells that begin with '## Glossary': leave one")
    table = found[0].removeprefix("## Glossary\n").strip()
    return LINK.sub(r"notebooks/\1", table.replace("| here |", f"| [00]({NOTEBOOKS[0].name}) |"))


def shown(results: Path) -> str:
    """The video and the slides, where they have been made."""
    video, slides = results / "demo.mp4", ROOT / "presentation" / "clipseg.pdf"
    parts = []
    if video.exists():
        poster, captions = video.with_suffix(".png"), video.with_suffix(".vtt")
        attributes = f' poster="results/{poster.name}"' if poster.exists() else ""
        track = f'<track kind="captions" srclang="en" src="results/{captions.name}">' if captions.exists() else ""
        parts.append(
            f'## The demo\n\n<video controls preload="metadata"{attributes} src="results/{video.name}">{track}</video>'
            "\n\nEverything on screen is computed by the model while the frames are made (`make video`)."
        )
    if slides.exists():
        parts.append("## The slides\n\n[Slides as PDF](presentation/clipseg.pdf), made from results/.")
    return "\n\n".join(parts) or "Not made yet: `make video` writes the video, `make presentation` the slides."


def commands(_) -> str:
    """The command line's reference, as typer writes it."""
    command = [sys.executable, "-m", "typer", "clipseg_repro.cli", "utils", "docs", "--name", "clipseg-repro"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return text.removeprefix("# `clipseg-repro`").strip()


BLOCKS = {
    "at_a_glance": front_page,
    "contents": contents,
    "chapters": chapters,
    "setup": lambda _: readme("Two commands", "Notebooks"),
    "scales": lambda _: readme("Results", "Licence and citation"),
    "glossary": glossary,
    "shown": shown,
    "commands": commands,
}


def tables_by_notebook(results: Path) -> dict[str, list[str]]:
    """Names of results/tables by the notebook (its stem) that names each first, in the order in which it does; "" has
    those that none names. The ledger is not among them."""
    left = {path.stem for path in (results / "tables").glob("*.md")} - {LEDGER}
    found = {}
    for path in NOTEBOOKS:
        code = (c for c in json.loads(path.read_bytes())["cells"] if c["cell_type"] == "code")
        named = re.findall(r'"([a-z0-9_-]+)(?:\.csv)?"', "\n".join("".join(cell["source"]) for cell in code))
        found[path.stem] = [name for name in dict.fromkeys(named) if name in left]
        left -= set(found[path.stem])
    return {stem: names for stem, names in (found | {"": sorted(left)}).items() if names}


def tables(results: Path) -> dict[str, str]:
    """Pages of tables with their captions, {path in the book: Markdown}: the ledger's, and one per notebook."""
    made = json.loads((results / "provenance.json").read_bytes())

    def section(name, level):
        caption, _, rows = (results / "tables" / f"{name}.md").read_text(encoding="utf-8").partition("\n")
        clauses = re.split(r"[;,.] ", caption.rstrip("."))
        title = ", ".join(clauses[: 1 + (len(clauses[0]) < SHORT)])
        command = made.get(f"tables/{name}.csv", {}).get("command")
        by = f", made by `{command}`" if command else ""
        caption = "" if caption.rstrip(".") == title else f"{caption}\n"
        link = f"[{name}.csv](../results/tables/{name}.csv){by}"
        return f"(table-{name})=\n{level} {title}\n\n{caption}{rows}\n{link}\n"

    pages = {"tables/ledger.md": section(LEDGER, "#")}
    for stem, names in tables_by_notebook(results).items():
        path = ROOT / "notebooks" / f"{stem}.ipynb"
        title = f"Tables of {stem[:2]}. {_title(path)}" if stem else "Other tables"
        about = f"Explained in [{stem}](../notebooks/{stem}.ipynb)." if stem else "Made by commands of their own."
        sections = "\n".join(section(name, "##") for name in names)
        pages[f"tables/{stem or 'other'}.md"] = f"# {title}\n\n{about}\n\n{sections}"
    listed = "\n".join(Path(page).stem for page in pages)
    pages["tables/index.md"] = (
        "# Tables\n\nEvery table of results/tables with its caption: first the ledger of the claims, then by notebook."
        f"\n\n```{{toctree}}\n:maxdepth: 2\n\n{listed}\n```\n"
    )
    return pages


def reference() -> dict[str, str]:
    """The docstrings' pages, {path in the book: reStructuredText}: the public face, and one per room of the package."""
    face = [name for name in clipseg_repro.__all__ if not name.startswith("_")]
    lines = [_heading("The public face", "="), ".. py:module:: clipseg_repro", ""]
    lines += ["Import these from ``clipseg_repro``.", ""]
    for name in sorted(face, key=lambda name: (name != "load_segmenter", name != "Segmenter", name)):
        kind = "autoclass" if isinstance(getattr(clipseg_repro, name), type) else "autofunction"
        lines += [f".. {kind}:: clipseg_repro.{name}", *["   :members:"] * (kind == "autoclass"), ""]
    pages, hidden = {"api/face.rst": "\n".join(lines)}, ", ".join(face)
    package = Path(clipseg_repro.__file__).parent
    for room in sorted(pkgutil.iter_modules([str(package)]), key=lambda room: room.name):
        if room.name == "cli":  # the page of commands has it
            continue
        name = f"clipseg_repro.{room.name}"
        modules = [name] + [
            f"{name}.{inner.name}"
            for inner in pkgutil.iter_modules([str(package / room.name)] if room.ispkg else [])
            if inner.name not in ("__main__",)
        ]
        lines = [_heading(room.name, "=")]
        for module in modules:
            lines += [_heading(module, "-")] if room.ispkg and module != name else []
            whole = not (room.ispkg and module == name)
            options = ["   :members:", f"   :exclude-members: {hidden}"] if whole else []
            lines += [f".. automodule:: {module}", *options, ""]
        pages[f"api/{room.name}.rst"] = "\n".join(lines)
    listed = "\n".join(f"   {Path(page).stem}" for page in pages)
    about = "The docstrings of the package, room by room."
    pages["api/index.rst"] = f"{_heading('Reference', '=')}\n{about}\n\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n"
    return pages


def assemble(into: Path):
    """The book's source below `into`, laid out as the repository: pages, notebooks, and the files that they link to."""
    pages = {path.name: filled(path.read_text(encoding="utf-8"), RESULTS, BLOCKS) for path in BOOK.glob("*.md")}
    pages |= {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS} | tables(RESULTS)
    known = {*pages, *(f"notebooks/{path.name}" for path in NOTEBOOKS)}
    for name, text in pages.items():
        _write(into / name, TABLE.sub(_wide, _linked(text + "\n", name, known, into)))
    for name, text in reference().items():
        _write(into / name, text)
    for path in NOTEBOOKS:
        name, notebook = f"notebooks/{path.name}", json.loads(path.read_bytes())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _linked("".join(cell["source"]), name, known, into)
            elif "".join(cell["source"]).startswith("REPOSITORY ="):  # the set-up, the same in all: folded
                cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
            for output in cell.get("outputs", []):
                if "text/markdown" in output.get("data", {}):
                    text = "".join(output["data"]["text/markdown"])
                    output["data"]["text/markdown"] = _linked(text, name, known, into)
        _write(into / name, json.dumps(notebook))
    for file in ("demo.mp4", "demo.png", "demo.vtt"):
        if (RESULTS / file).exists():
            _copy(f"results/{file}", into / "extra")


def _linked(text, name, known, into):
    """The text of page `name` with its links as the book has them; files of the repository come along."""

    def place(match):
        target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(match[1])))
        table = re.fullmatch(r"results/tables/([a-z0-9_-]+)\.md", target)
        if table and (RESULTS / "tables" / f"{table[1]}.md").exists():
            return f"#table-{table[1]}"
        if target not in known:
            if not (ROOT / target).is_file():
                raise InputError(f"{name} links to '{match[1]}', which is not in the repository: mend the link")
            _copy(target, into)
        return match[1]

    # Jupyter's anchors keep capitals, Sphinx's do not
    text = re.sub(r"(?<=\.ipynb#)[^)\s]+", lambda m: m[0].lower(), text)
    return LINK.sub(place, text)


def _wide(table):
    """A table of many columns, prose among them, marked so that book.css gives it columns that can be read."""
    many = table[0].partition("\n")[0].count("|") > 5
    prose = many and any(len(cell) > LONG for cell in table[0].split("|"))
    return f"```{{container}} prose\n{table[0]}```\n" if prose else table[0]


def _copy(name, into):
    (into / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / name, into / name)


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _title(path):
    return "".join(json.loads(path.read_bytes())["cells"][0]["source"]).splitlines()[0].removeprefix("# ")


def _heading(text, line):
    return f"{text}\n{line * len(text)}\n"


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads by itself."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.pictures = set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loads.append(given.get("href") or "")
        self.loads += [given[key] for key in ("src", "poster", "srcset", "data") if given.get(key)]
        self.loads += re.findall(r"url\(([^)]+)\)", given.get("style") or "")
        source = given.get("src") or ""
        self.pictures += tag == "img" and "_images/" in source and not source.endswith(".svg")  # badges


def faults(html: Path, notebooks: list[Path] = NOTEBOOKS) -> list[str]:
    """What is wrong with the built pages: links inside that lead nowhere, what would be fetched from elsewhere, and
    notebooks whose page does not show every picture once."""
    html = html.resolve()
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in html.rglob("*.html")}
    found = []

    def follow(page, address, loaded):
        parts = urlsplit(address)
        where = f"{page.relative_to(html)}: {address}"
        if parts.scheme == "data" or (parts.scheme in ("http", "https", "mailto") and not loaded):
            return
        if parts.scheme or parts.netloc or parts.path.startswith("/"):
            found.append(f"{where} is not in the book")
            return
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.is_file():
            found.append(f"{where} leads nowhere")
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
            found.append(f"{where} has no such place")

    for path, page in pages.items():
        for address in page.links:
            follow(path, address, loaded=False)
        for address in page.loads:
            follow(path, address, loaded=True)
    for path in html.rglob("*.css"):
        for address in re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')]+)", path.read_text(encoding="utf-8")):
            follow(path, address, loaded=True)
    for path in notebooks:
        cells = [cell for cell in json.loads(path.read_bytes())["cells"] if cell["cell_type"] == "code"]
        expected = sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
        shown = pages[html / "notebooks" / f"{path.stem}.html"].pictures
        if shown != expected:
            found.append(f"notebooks/{path.stem}.html: {shown} pictures, {expected} in the notebook")
    return found


def main() -> int:
    from sphinx.cmd.build import main as sphinx

    started = time.perf_counter()
    shutil.rmtree(BUILD, ignore_errors=True)
    source, html = BUILD / "source", BUILD / "html"
    assemble(source)
    strict = ["-q", "-W", "--keep-going", "-n"]
    status = sphinx([*strict, "-b", "html", "-d", f"{BUILD}/doctrees", "-c", str(BOOK), str(source), str(html)])
    if not status:
        for fault in (found := faults(html)):
            print(fault, file=sys.stderr)
        status = int(bool(found))
    if status:
        print("the book is not right: see above", file=sys.stderr)
    else:
        size = sum(path.stat().st_size for path in html.rglob("*") if path.is_file())
        print(f"{html.relative_to(ROOT)}/index.html: {size / 1e6:.0f} MB in {time.perf_counter() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
