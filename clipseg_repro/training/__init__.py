"""Training: the loop, and the decoders' runs of `experiments.yaml`."""

from clipseg_repro.training.decoders import experiments, fresh_decoder, train, untrained

__all__ = ["experiments", "fresh_decoder", "train", "untrained"]
