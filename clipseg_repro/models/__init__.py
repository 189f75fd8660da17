"""Models: loading them (`loading`), and their forward pass in pieces (`forward`)."""

from clipseg_repro.models.forward import decode, embed_images, embed_texts, encode
from clipseg_repro.models.loading import load_model

__all__ = ["decode", "embed_images", "embed_texts", "encode", "load_model"]
