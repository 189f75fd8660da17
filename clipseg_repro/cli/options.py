"""What several commands take."""

from enum import StrEnum
from typing import Annotated

import typer

from clipseg_repro.study.scales import SCALES

ScaleName = StrEnum("ScaleName", list(SCALES))
ScaleOption = Annotated[
    ScaleName,
    typer.Option("--scale", help="mini: generated data, offline, minutes. paper: the real data sets, a GPU."),
]
