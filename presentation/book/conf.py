"""Sphinx's settings for the book (see build.py, which calls it)."""

import inspect
import re
import tomllib
from functools import cached_property
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
BUILD = Path(__file__).parent / "_build"

project = "CLIPSeg, reproduced"
author = "the authors of clipseg-repro"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
smartquotes = False  # in prose, --out is an option

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # so that links in outputs are resolved
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

html_theme = "furo"
html_title = "CLIPSeg, reproduced"
html_static_path = [str(Path(__file__).parent / "book.css")]
html_css_files = ["book.css"]
html_extra_path = [str(path) for path in [BUILD / "source" / "extra"] if path.exists()]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
exclude_patterns = ["extra"]

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
nitpick_ignore_regex = [("py:.*", r"(?!clipseg_repro\.).*")]  # other packages' pages are not at hand offline


def marked_up(app, what, name, obj, options, lines):
    """Docstrings are plain prose with `names`, lists and indented listings; this makes them reStructuredText."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip())
    lines[:] = "\n\n".join(map(_block, blocks)).splitlines() + [""]


def _block(block):
    rows = block.splitlines()
    if all(row.startswith("    ") for row in rows):
        return "\n".join(["::", "", *rows])
    if not rows[0].startswith("- ") and any(row.startswith(" ") for row in rows):  # a line each, some of them long
        rows = [f"  {row.strip()}" if row.startswith(" ") else f"- {row}" for row in rows]
    return re.sub(r"`([^`]+)`|([*|\\]|(?<=\w)_\b)", _inline, "\n".join(rows))


def _inline(match):
    return f"``{match[1]}``" if match[1] else f"\\{match[2]}"


def left_out(app, what, name, obj, skip, options):
    """Without a docstring of their own: values, which have their type's, and classes that dataclasses describe."""
    described = inspect.isroutine(obj) or isinstance(obj, (type, property, cached_property))
    own = described and not (isinstance(obj, type) and (obj.__doc__ or "").startswith(f"{obj.__name__}("))
    return None if own else True


def setup(app):
    """Formulas as MathML, which browsers draw by themselves: no script, no fonts."""

    def draw(display):
        def visit(translator, node):
            translator.body.append(convert(node.astext(), display=display))
            raise nodes.SkipNode

        return visit, None

    app.connect("autodoc-process-docstring", marked_up)
    app.connect("autodoc-skip-member", left_out)
    app.add_html_math_renderer("mathml", inline_renderers=draw("inline"), block_renderers=draw("block"))
