"""Shared fixtures: a tiny CLIPSeg with random weights, saved as transformers would, and test pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizerFast,
    ViTImageProcessorPil,
)

from clipseg_repro.mini import curriculum, pretrain
from clipseg_repro.mini.export import build
from clipseg_repro.models.loading import load_model
from clipseg_repro.prompts import IMAGENET_MEAN, IMAGENET_STD, TRAIN_TEMPLATES
from clipseg_repro.segmenter import Segmenter

WORDS = ["cat", "dog", "red", "small", "car", "tree", "something", "sit", "left", "house", "bird", "apple"]


def tiny_processor(size=112, context=48):
    """A CLIPSegProcessor whose BPE is trained on a few sentences; `context` is the text tower's length."""
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([t.format(w) for t in TRAIN_TEMPLATES for w in WORDS], trainer)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = CLIPTokenizerFast(
        vocab=state["vocab"], merges=[tuple(m) for m in state["merges"]], model_max_length=context
    )
    image_processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), resample=2
    )
    return CLIPSegProcessor(image_processor=image_processor, tokenizer=tokenizer)


def tiny_config(tokenizer, **changes):
    return CLIPSegConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 48,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 8,
        },
        projection_dim=48,
        reduce_dim=64,
        extract_layers=[0, 1, 2],
        decoder_intermediate_size=128,
        **changes,
    )


def random_model(config, seed=0):
    """A CLIPSeg whose weights are spread enough for prompts and pixels to matter to the logits."""
    torch.manual_seed(seed)
    return spread(CLIPSegForImageSegmentation(config).eval())


def spread(model):
    """Draw the weights of any module so that signals neither die nor explode on their way."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A save_pretrained folder: 112 px, patches of 8, 4 blocks of width 64, decoder of width 64, condition of width
    48."""
    folder = tmp_path_factory.mktemp("tiny") / "clipseg"
    processor = tiny_processor()
    random_model(tiny_config(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder of a CLIPModel with random weights, 11 blocks and patches of 16, and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_processor().tokenizer
    config = tiny_config(tokenizer)
    vision = config.vision_config.to_dict() | {
        "num_hidden_layers": 11,
        "patch_size": 16,
        "model_type": "clip_vision_model",
    }
    text = config.text_config.to_dict() | {"model_type": "clip_text_model"}
    spread(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """(model, processor), shared: do not change the weights."""
    return load_model(tiny_folder)


@pytest.fixture
def segmenter(tiny_model):
    return Segmenter(*tiny_model, device="cpu")


@pytest.fixture(scope="session")
def picture():
    """(90, 140, 3) uint8: noise with a bright disc."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 120, (90, 140, 3), dtype=np.uint8)
    y, x = np.ogrid[:90, :140]
    image[(y - 50) ** 2 + (x - 60) ** 2 < 400] = (250, 200, 30)
    return image


@pytest.fixture(scope="session")
def picture_mask():
    """(90, 140) bool: the disc of `picture`."""
    y, x = np.ogrid[:90, :140]
    return (y - 50) ** 2 + (x - 60) ** 2 < 400


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a PhraseCut of 24 + 4 + 4 scenes."""
    folder = tmp_path_factory.mktemp("phrasecut")
    build(folder, splits={"train": 24, "val": 4, "test": 4}, workers=1)
    return folder


@pytest.fixture
def short_curriculum(monkeypatch):
    """Pre-training in seconds: batches of four scenes, and a curve that looks at eight."""
    cycles = tuple(replace(cycle, batch=4) for cycle in curriculum.CYCLES)
    monkeypatch.setattr(pretrain, "CYCLES", cycles)
    monkeypatch.setattr(pretrain, "FINE", tuple(replace(cycle, batch=2) for cycle in curriculum.FINE))
    few = lambda rules, size, patch, scenes: curriculum.fresh_scenes(rules, size, patch, 8)  # noqa: E731
    monkeypatch.setattr(pretrain, "fresh_scenes", few)
    return cycles
