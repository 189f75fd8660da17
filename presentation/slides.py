"""Write presentation/clipseg.pptx, and clipseg.pdf where LibreOffice is installed, from slides.yaml and results/:
`make presentation`."""

import hashlib
import re
import shutil
import subprocess
import tempfile
from datetime import datetime
from pathlib import Path

import pandas as pd
import yaml
from matplotlib.colors import to_hex
from PIL import Image
from pptx import Presentation
from pptx.chart.data import CategoryChartData
from pptx.dml.color import RGBColor
from pptx.enum.chart import XL_CHART_TYPE, XL_LEGEND_POSITION, XL_TICK_LABEL_POSITION
from pptx.enum.text import MSO_ANCHOR, PP_ALIGN
from pptx.util import Inches, Pt
from report import BLOCKS

from clipseg_repro.files import written_whole
from clipseg_repro.plotting import OKABE_ITO
from clipseg_repro.study.numbers import NAMED, cell, filled

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 13.333, 7.5  # inches, as all lengths here
LEFT, TOP, BOTTOM = 0.6, 1.6, 6.8  # of what a slide says; its title is above, its claims and its number are below
INSIDE = WIDTH - 2 * LEFT
FONT = "Arial"
COLOURS = {"mini": "blue", "times faster": "blue", "paper": "orange"}  # of series, as in the notebooks' figures
VERDICTS = {"holds": "green", "does not hold": "vermillion", "cannot be told here": "sky blue"}


def build(results: Path) -> Presentation:
    """The slides as python-pptx has them. Raises InputError for a number that is missing, with its name."""
    deck = Presentation()
    deck.slide_width, deck.slide_height = Inches(WIDTH), Inches(HEIGHT)
    specs = yaml.safe_load((ROOT / "presentation" / "slides.yaml").read_text(encoding="utf-8"))
    for page, spec in enumerate(specs, 1):
        Slide(deck, results, spec, f"{page} / {len(specs)}")
    deck.core_properties.title = specs[0]["title"]
    deck.core_properties.author = "The clipseg_repro maintainers"
    deck.core_properties.keywords = digest(deck)  # goes into the PDF, too, and says of which slides it was made
    deck.core_properties.created = deck.core_properties.modified = datetime(2022, 6, 19)  # same slides, same file
    return deck


def digest(deck: Presentation) -> str:
    """Checksum of all that the slides and their notes say."""
    said = [text for slide in deck.slides for text in [*texts(slide), slide.notes_slide.notes_text_frame.text]]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def texts(slide) -> list[str]:
    """Every text and number that a slide shows: of text boxes, cells of tables, and charts."""
    said = []
    for shape in slide.shapes:
        if shape.has_text_frame:
            said.append(shape.text_frame.text)
        elif shape.has_table:
            said += [cell.text_frame.text for row in shape.table.rows for cell in row.cells]
        elif shape.has_chart:
            plot = shape.chart.plots[0]
            said += [str(label) for label in plot.categories]
            said += [f"{value:g}" for series in plot.series for value in series.values]
    return said


class Slide:
    """A slide: its title, then what its entry in slides.yaml has, then notes with the source of every number."""

    def __init__(self, deck, results, spec, page):
        self.results, self.sources = results, {}
        self.slide = deck.slides.add_slide(deck.slide_layouts[5])  # a title only
        self._title(spec["title"])
        text, code = [self._filled(line) for line in spec.get("text", [])], spec.get("code", [])
        if code:
            self._text([part for pair in zip(text, code) for part in pair], LEFT, TOP, INSIDE, 5, 20, code, 16)
        elif "picture" in spec:
            self._picture(results / "figures" / spec["picture"], spec.get("crop", (0, 0)), text)
        elif "chart" in spec:
            self._chart(spec["chart"], 4.2 if text else 0)
            self._text(text, LEFT, TOP, 3.9, BOTTOM - TOP, 22)
        elif "table" in spec:
            under = self._table(spec["table"])
            self._text(text, LEFT, under + 0.2, INSIDE, BOTTOM - under - 0.2, 20)
        else:
            self._text(text, LEFT, TOP, INSIDE, BOTTOM - TOP, 28, gap=18)
        self._foot(spec.get("claims"), page)
        notes = self._filled(spec["notes"])
        sources = [f"{name} = {value}" for name, value in self.sources.items()]
        notes = [notes, *(["", "Sources (results/tables):", *sources] if sources else [])]
        self.slide.notes_slide.notes_text_frame.text = "\n".join(notes)

    def _number(self, name):
        """A number by its name, noted as a source; nan where it is not measured."""
        value = cell(self.results, name)
        if not pd.isna(value):
            self.sources[name] = f"{value:g}" if isinstance(value, float) else str(value)
        return value

    def _filled(self, text):
        for match in NAMED.finditer(text):
            name = match[1].partition("@")[0].strip()
            self.sources[name] = filled("{{" + name + "}}", self.results, BLOCKS)
        return " ".join(filled(text, self.results, BLOCKS).split())

    def _title(self, text):
        title = self.slide.shapes.title
        title.left, title.top, title.width, title.height = (Inches(n) for n in (LEFT, 0.35, INSIDE, 0.95))
        title.text_frame.vertical_anchor = MSO_ANCHOR.BOTTOM
        _write(title.text_frame, [text], 36, bold=True)
        line = self.slide.shapes.add_connector(1, *(Inches(n) for n in (LEFT, 1.38, WIDTH - LEFT, 1.38)))
        line.line.color.rgb, line.line.width = _colour("blue"), Pt(2)

    def _text(self, lines, left, top, width, height, size, code=(), gap=12):
        if lines:
            box = self.slide.shapes.add_textbox(*(Inches(n) for n in (left, top, width, height)))
            _write(box.text_frame, lines, size, gap=gap, code=code)

    def _picture(self, path, crop, text):
        """Above the text where it is wide, to the right of it where it is not."""
        with Image.open(path) as image:
            ratio = image.width / (image.height * (1 - sum(crop)))
        wide = ratio > 2.1
        limits = (INSIDE, 3.4) if wide else (7.4, BOTTOM - TOP)
        width = min(limits[0], limits[1] * ratio)
        left = (WIDTH - width) / 2 if wide else WIDTH - LEFT - width
        picture = self.slide.shapes.add_picture(str(path), Inches(left), Inches(TOP), width=Inches(width))
        picture.crop_top, picture.crop_bottom, picture.height = *crop, Inches(width / ratio)
        picture.name = path.name
        if wide:
            under = TOP + width / ratio + 0.2
            self._text(text, LEFT, under, INSIDE, BOTTOM - under, 20, gap=8)
        else:
            self._text(text, LEFT, TOP, INSIDE - width - 0.4, BOTTOM - TOP, 22)

    def _table(self, spec):
        """Either `header` and `rows` of texts, or `of` tables of results: see `_measured`. Returns where it ends."""
        top = []  # a second line of the header, above pairs of columns
        if spec.get("of") == "failed":
            header, rows, widths = self._failed()
        elif "of" in spec:
            top, header, rows, widths = self._measured(**spec)
        else:
            header, widths = spec["header"], spec["widths"]
            rows = [[self._filled(cell) for cell in row] for row in spec["rows"]]
        lines = [*([top] if top else []), header, *rows]
        size, height = (18, 0.5) if len(rows) < 10 else (16, 0.37)
        heights = [0.6 if any("\n" in cell for cell in line) else height for line in lines]
        place = (Inches(n) for n in (LEFT, TOP, sum(widths), sum(heights)))
        table = self.slide.shapes.add_table(len(lines), len(header), *place).table
        for column, width in zip(table.columns, widths):
            column.width = Inches(width)
        for r, line in enumerate(lines):
            head = r < len(lines) - len(rows)
            table.rows[r].height = Inches(heights[r])
            for c, text in enumerate(line):
                cell = table.cell(r, c)
                cell.vertical_anchor = MSO_ANCHOR.MIDDLE
                cell.margin_left = cell.margin_right = Inches(0.08)
                cell.margin_top = cell.margin_bottom = Inches(0.02)
                cell.fill.solid()
                cell.fill.fore_color.rgb = _colour("blue") if head else RGBColor(*(240 + 15 * (r % 2),) * 3)
                bold = head or not any(line[1:])
                _write(cell.text_frame, text.split("\n"), size, bold=bold, white=head, smaller=True)
        for c in range(1, len(top), 2):
            table.cell(0, c).merge(table.cell(0, c + 1))
        return TOP + sum(heights)

    def _measured(self, of, columns, settings=("",), methods=None, cited=()):
        """Of tables of results {name: title}, a row per setting and method, at the end those `cited`, and per column
        {"metric" or "setting; metric": title} the paper's number and this study's, with its interval."""
        top, header, rows = [""], [""], []
        for title in columns.values():
            top, header = [*top, title, ""], [*header, "paper", "mini"]
        for table, title in of.items():
            frame = pd.read_csv(self.results / "tables" / f"{table}.csv").fillna({"setting": ""})
            own = methods or list(frame[~frame.setting.str.startswith("cited")].method.unique())
            for setting in settings:
                above = ", ".join(filter(None, (title, setting if len(settings) > 1 else "")))
                rows += [[above] + [""] * 2 * len(columns)] * bool(above)
                for method in [*own, *cited]:
                    row = [method]
                    where = f"cited {setting}".strip() if method in cited else setting
                    for column in columns:
                        row += self._pair("; ".join(filter(None, (table, method, where, column))), len(columns) > 2)
                    rows.append(row)
        widths = [3.3] + [1.1, (INSIDE - 3.3) / len(columns) - 1.1] * len(columns)
        return top, header, rows, widths

    def _pair(self, name, narrow):
        """The paper's number and this study's, as they stand in two cells."""
        cited = "; cited" in name
        if cited and name.endswith("; ap"):  # printed for none of them
            return ["", ""]
        printed, *here = (self._number(f"{name}; {what}") for what in ("paper", "mini", "low", "high"))
        paper = "" if pd.isna(printed) else f"{printed:.1f}"
        if pd.isna(here[0]):
            return [paper, "" if cited else "not measured"]
        return [paper, ("{:.1f}\n{:.1f} to {:.1f}" if narrow else "{:.1f}  ({:.1f} to {:.1f})").format(*here)]

    def _failed(self):
        """The claims that do not hold."""
        rows = []
        for row in pd.read_csv(self.results / "tables" / "claims.csv").query("verdict == 'does not hold'").itertuples():
            columns = ("paper_larger", "paper_smaller", "larger", "smaller", "low", "high")
            values = [self._number(f"claims; {row.claim}; {column}") for column in columns]
            said = "{:.1f} against {:.1f}|{:.1f} against {:.1f}\n{:+.1f} to {:+.1f}".format(*values)
            rows.append([row.claim, row.statement, *said.split("|")])
        return ["", "claim", "paper", "mini, difference"], rows, [0.9, 5.2, 2.4, 3.6]

    def _chart(self, spec, left):
        frame = pd.read_csv(self.results / "tables" / f"{spec['table']}.csv")
        frame = frame.query(spec["where"]) if "where" in spec else frame
        doughnut, bar = spec["kind"] == "doughnut", spec["kind"] == "bar"
        frame = frame[::-1] if bar else frame  # a bar chart grows upwards
        data = CategoryChartData()
        data.categories = [str(label) for label in frame[spec["label"]]]
        for column, name in list(spec["series"].items())[:: -1 if bar else 1]:
            data.add_series(name, [float(value) for value in frame[column]])
            for _, row in frame.iterrows():
                keys = [str(value) for key, value in row.items() if key == spec["label"] or isinstance(value, str)]
                self._number("; ".join([spec["table"], *keys, column]))
        kinds = {"bar": "BAR_CLUSTERED", "column": "COLUMN_CLUSTERED", "doughnut": "DOUGHNUT"}
        place = (Inches(n) for n in (LEFT + left, TOP, INSIDE - left, BOTTOM - TOP))
        chart = self.slide.shapes.add_chart(XL_CHART_TYPE[kinds[spec["kind"]]], *place, data).chart
        chart.font.size, chart.font.name = Pt(14 if len(frame) > 8 else 18), FONT
        chart.has_legend = doughnut or len(spec["series"]) > 1
        if chart.has_legend:
            chart.legend.include_in_layout, chart.legend.position = False, XL_LEGEND_POSITION.BOTTOM
        chart.has_title = not doughnut
        plot = chart.plots[0]
        plot.has_data_labels = len(frame) <= 8  # of more, the axis tells
        if plot.has_data_labels:
            plot.data_labels.show_value, plot.data_labels.font.size = True, Pt(28 if doughnut else 16)
        if doughnut:
            for point, label in zip((plot.series[0].points[n] for n in range(len(frame))), frame[spec["label"]]):
                point.format.fill.solid()
                point.format.fill.fore_color.rgb = _colour(VERDICTS[label])
            return
        _write(chart.chart_title.text_frame, [spec["unit"]], 16)
        plot.gap_width, plot.overlap = 45, 0
        if plot.has_data_labels:
            plot.data_labels.number_format, plot.data_labels.number_format_is_linked = "0.0", False
        for series in plot.series:
            series.format.fill.solid()
            series.format.fill.fore_color.rgb = _colour(COLOURS[series.name])
            series.invert_if_negative = False
        chart.value_axis.visible = chart.value_axis.has_major_gridlines = not plot.has_data_labels
        if not plot.has_data_labels:
            chart.value_axis.major_gridlines.format.line.color.rgb = RGBColor(217, 217, 217)
        chart.category_axis.tick_label_position = XL_TICK_LABEL_POSITION.LOW
        chart.category_axis.format.line.color.rgb = RGBColor(128, 128, 128)

    def _foot(self, tables, page):
        """Left the verdicts on a table's claims, right the slide's number."""
        if tables:
            claims = pd.read_csv(self.results / "tables" / "claims.csv")
            own = claims[claims.table.astype(str).isin(str(tables).split(", "))]
            several = {"holds": "hold", "does not hold": "do not hold"}
            told = [
                f"{', '.join(group.claim)} {several.get(verdict, verdict) if len(group) > 1 else verdict}"
                for verdict, group in own.groupby("verdict", sort=False)
            ]
            box = self.slide.shapes.add_textbox(*(Inches(n) for n in (LEFT, 6.9, INSIDE - 1.2, 0.45)))
            _write(box.text_frame, ["Claims: " + "; ".join(told)], 16, bold=True)
        box = self.slide.shapes.add_textbox(*(Inches(n) for n in (WIDTH - LEFT - 1.2, 6.9, 1.2, 0.45)))
        _write(box.text_frame, [page], 14)
        box.text_frame.paragraphs[0].alignment = PP_ALIGN.RIGHT


def _write(frame, lines, size, bold=False, gap=0, code=(), white=False, smaller=False):
    """Fill a text frame with paragraphs. *Words* between stars are italic; smaller: all lines but the first are."""
    frame.word_wrap = True
    for n, line in enumerate(lines):
        paragraph = frame.paragraphs[0] if n == 0 else frame.add_paragraph()
        paragraph.alignment, paragraph.space_after = PP_ALIGN.LEFT, Pt(gap)
        line = re.sub(r"(?<!\w)-(?=\d)", "\u2212", line)  # a minus, at which no line is broken
        for k, part in enumerate([line] if line in code else line.split("*")):
            if part:
                run = paragraph.add_run()
                run.text = part
                font = run.font
                font.name, font.size = ("Courier New" if line in code else FONT), Pt(size - 4 * (smaller and n > 0))
                font.bold, font.italic = bold, k % 2 == 1
                font.color.rgb = _colour("blue") if line in code else RGBColor(*(255 if white else 34,) * 3)


def _colour(name):
    return RGBColor.from_string(to_hex(OKABE_ITO[name])[1:].upper())


def to_pdf(slides: Path, pdf: Path):
    """Through LibreOffice; says so where there is none."""
    office = shutil.which("soffice") or shutil.which("libreoffice")
    if not office:
        print(f"{pdf.name} is left as it is, for want of LibreOffice (Debian: apt install libreoffice-impress)")
        return
    with tempfile.TemporaryDirectory() as folder:
        home = f"-env:UserInstallation={(Path(folder) / 'home').as_uri()}"  # beside an office that is open
        command = [office, home, "--headless", "--convert-to", "pdf", "--outdir", folder, str(slides)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with written_whole(pdf) as temporary:
            shutil.copyfile(Path(folder) / f"{slides.stem}.pdf", temporary)


if __name__ == "__main__":
    path = ROOT / "presentation" / "clipseg.pptx"
    with written_whole(path) as temporary:
        build(ROOT / "results").save(temporary)
    to_pdf(path, path.with_suffix(".pdf"))
