"""CLIPSeg (Lüddecke & Ecker, CVPR 2022), reproduced: segment images by text, by example, or by both."""

from importlib.metadata import PackageNotFoundError, version

from clipseg_repro.prompts import VisualPrompt, interpolate
from clipseg_repro.segmenter import Segmenter, load_segmenter

__all__ = ["Segmenter", "VisualPrompt", "__version__", "interpolate", "load_segmenter"]
try:
    __version__ = version("clipseg-repro")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
