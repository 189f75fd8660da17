"""A reproduction of CLIPSeg (Lüddecke & Ecker, CVPR 2022): image segmentation using text and image prompts."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("clipseg-repro")
_HOMES = {
    "Segmenter": "clipseg_repro.segmenter",
    "load_segmenter": "clipseg_repro.segmenter",
    "VisualPrompt": "clipseg_repro.prompts",
    "interpolate": "clipseg_repro.prompts",
}
__all__ = ["Segmenter", "VisualPrompt", "__version__", "interpolate", "load_segmenter"]


def __getattr__(name):
    # Late: torch and transformers take seconds, and neither `--help` nor the processes that draw scenes need them.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
