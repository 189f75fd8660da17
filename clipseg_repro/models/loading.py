"""Loading models: the shipped one, folders, the Hub, the authors' files and the image towers of the other backbones."""

import contextlib
import json
import os
import re
from logging import CRITICAL
from pathlib import Path

import torch
from huggingface_hub import utils as hub
from transformers import (
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    ViTImageProcessorPil,
)
from transformers.utils import logging

from clipseg_repro.downloads import foreign_content
from clipseg_repro.errors import InputError
from clipseg_repro.models.hub import CLIP, CONFIG, PROCESSOR, TOKENIZER, WEIGHTS, fetched, is_id, storage
from clipseg_repro.models.released import read_decoder
from clipseg_repro.models.soundness import check_model, check_stored_types
from clipseg_repro.models.towers import FILES, read_tower
from clipseg_repro.models.variants import MODELS
from clipseg_repro.prompts import IMAGENET_MEAN, IMAGENET_STD, RELEASED_SIZE

MINI = Path(__file__).parents[1] / "weights" / "mini"

RANDOM_SEED = 0  # of weights that stay random: a CLIP without pre-training, and ViTSeg's linear layer


def load_model(source="mini", clip=CLIP, pretrained=True):
    """(one of variants.MODELS in float32 and eval mode, CLIPSegProcessor).

    `source` is "mini" (shipped with the package), a folder written by `save_pretrained`, a Hub id such as
    "CIDAS/clipseg-rd64-refined", or a file: one of the authors' `.pth` files, or the image tower of ViTSeg or of RN50x4
    as a safetensors file, which the Hub ids of towers.FILES stand for too. The authors' files hold the decoder only:
    `clip`, a Hub id or a `save_pretrained` folder of a CLIPModel and its tokenizer, gives the rest. It gives ViTSeg's
    text tower and RN50x4's tokenizer too, whose decoders are untrained; no other source reads it. `pretrained=False`
    keeps the architecture and draws all weights at random, the same in every call ("no CLIP pre-training" in the
    paper's Table 9). A model that is in the Hub's cache is not fetched again. Raises InputError if a source is unknown,
    damaged, not sound (see `soundness`) or another architecture.
    """
    if source == "mini" and not (MINI / "model.safetensors").is_file():
        raise InputError(
            f"the mini model's weights are missing from {MINI}: reinstall the package or give another source"
        )
    path = MINI if source == "mini" else Path(source)
    if str(source) in FILES:
        with _quiet():
            path = fetched(str(source), re.escape(FILES[source])) / FILES[source]
    if not os.path.isfile(path):  # Path.is_file raises on names that are too long
        model, processor = _pretrained(_read_segmentation, path, MODELS, WEIGHTS, TOKENIZER, PROCESSOR)
    elif path.suffix == ".safetensors":
        model, processor = _read_tower(path, clip)
    else:
        model, processor = _read_released(path, clip)
    check_model(source, model, processor)
    if not pretrained:
        model = _random(type(model), model.config)
    return model.eval(), processor


def _random(kind, config):
    """A model with the weights that RANDOM_SEED gives; the caller's random numbers are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return kind(config)


def _pretrained(read, source, kinds, *parts):
    """read(folder) of a folder that holds a model of those `kinds` (config.json's model_type), or of a Hub id, of which
    those `parts` are needed (see `hub.fetched`)."""
    name = str(source)
    if os.path.isdir(name):
        folder, remedy = Path(name), "save or copy it again"
    elif is_id(name):
        with _quiet():
            _kind(fetched(name, CONFIG), kinds)  # before the weights, which may be large and of no use
            folder = fetched(name, CONFIG, *parts)
        remedy = f"delete '{storage(name)}' and run the same command again, which fetches it"
    else:
        shown = name if len(name) < 200 else f"{name[:200]}..."
        raise InputError(
            f"unknown model '{shown}': give 'mini', an existing save_pretrained folder or .pth file, or a Hub id "
            "(owner/name)"
        )
    _kind(folder, kinds)
    try:
        with _quiet():
            return read(folder)
    except InputError:
        raise
    except Exception as error:  # of many kinds: OSError, RuntimeError, SafetensorError, ValueError ...
        files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".bin")]
        strange = (f"{file.name} is {found}" for file in files if (found := foreign_content(file)))
        reason = next(strange, _reason(error))
        raise InputError(f"model folder '{folder}' is damaged or incomplete ({reason}): {remedy}") from error


def _kind(path, kinds):
    """The model_type of a folder; fails early, with the reason, on one that is not among `kinds`."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise InputError(
            f"model folder '{path}' has no config.json: give a folder written by save_pretrained"
        ) from None
    except OSError as error:
        raise InputError(f"'{path / 'config.json'}' cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = foreign_content(path / "config.json") or repr(error)
        raise InputError(f"model folder '{path}' has a damaged config.json ({reason}): save or copy it again") from None
    if found not in kinds:
        listed = ", ".join(f"'{kind}'" for kind in kinds)
        raise InputError(f"model folder '{path}' holds a '{found}' model: give one of model_type {listed}")
    return found


def _read_segmentation(folder):
    # by class: folders of older transformers name a ViTFeatureExtractor, and where torchvision is installed,
    # transformers would resize with it, to slightly other pixels
    pixels, tokenizer = ViTImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    return _read_model(MODELS[_kind(folder, MODELS)], folder), CLIPSegProcessor(pixels, tokenizer)


def _read_clip(folder):
    return _read_model(CLIPModel, folder), CLIPTokenizer.from_pretrained(folder)


def _read_model(kind, folder):
    """The model of class `kind` in a folder that has all its weights and no others."""
    # float32 by name: transformers 5 would keep the precision of the file
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    strange = [k for k in report["unexpected_keys"] if not k.endswith("position_ids")]  # old files store that buffer
    missing = sorted(report["missing_keys"])
    if missing or strange or report["mismatched_keys"]:
        raise InputError(
            f"model folder '{folder}' is not a complete {kind.__name__}: {len(missing)} weights missing {missing[:3]}, "
            f"{len(strange)} unexpected {sorted(strange)[:3]}: give weights of that class"
        )
    check_stored_types(folder, model)
    return model


def _read_tower(path, clip):
    """(model with an untrained decoder, processor) of an image tower and what it needs of a CLIP."""
    kind, options, tensors = read_tower(path)
    if kind == "vitseg":
        text, processor = _over_clip(clip)
        shared = ("text_config", "projection_dim", "extract_layers")
        options |= {name: text.config.to_dict()[name] for name in shared} | {"input_size": RELEASED_SIZE}
        tensors |= {
            k: v for k, v in text.clip.state_dict().items() if k.startswith(("text_model.", "text_projection."))
        }
    else:
        tokenizer = _pretrained(CLIPTokenizer.from_pretrained, clip, ["clip"], TOKENIZER)
        processor = CLIPSegProcessor(image_processor=released_pixels(), tokenizer=tokenizer)
        options["text_config"] |= {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad")}
    with _fitting(path, f"give the files of {', '.join(FILES)}"):
        model = _random(MODELS[kind], MODELS[kind].config_class(**options))
        left = model.backbone.load_state_dict(tensors, strict=False)
    # but for ViTSeg's random layer and the counts of batch norm: read_tower has accounted for the file's keys
    missing = [k for k in left.missing_keys if not k.startswith("projection.") and "num_batches" not in k]
    assert not missing and not left.unexpected_keys, left
    return model, processor


def released_pixels() -> ViTImageProcessorPil:
    """The released preparation of images: 352 px, bilinear, ImageNet's mean and standard deviation."""
    return ViTImageProcessorPil(
        size={"height": RELEASED_SIZE, "width": RELEASED_SIZE},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        resample=2,  # bilinear
    )


def _over_clip(clip, **options):
    """(CLIPSegForImageSegmentation on CLIP `clip` with an untrained decoder, processor as released)."""
    towers, tokenizer = _pretrained(_read_clip, clip, ["clip"], WEIGHTS, TOKENIZER)
    config = CLIPSegConfig(
        text_config=towers.config.text_config.to_dict(),
        vision_config=towers.config.vision_config.to_dict(),
        projection_dim=towers.config.projection_dim,
        **options,
    )
    model = CLIPSegForImageSegmentation(config)
    model.clip.load_state_dict(towers.state_dict())
    return model, CLIPSegProcessor(image_processor=released_pixels(), tokenizer=tokenizer)


def _read_released(path, clip):
    """(model, processor) of one of the authors' files and the CLIP that it was trained on."""
    options, tensors = read_decoder(path)  # before CLIP: its errors are cheaper
    with _fitting(path, f"the authors' files need CLIP {CLIP}, this is '{clip}'"):
        model, processor = _over_clip(clip, **options)
        model.decoder.load_state_dict(tensors)
    return model, processor


@contextlib.contextmanager
def _fitting(path, remedy):
    """One InputError where weights of a file do not make a model."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # RuntimeError and ValueError of sizes that differ, ZeroDivisionError of none ...
        raise InputError(f"weights '{path}' do not fit together ({_reason(error)}): {remedy}") from error


def _reason(error):
    lines = [line.strip() for line in str(error).splitlines() if not line.endswith(":")]  # which are headings
    return f"{type(error).__name__}: {(lines or [''])[0]}"


@contextlib.contextmanager
def _quiet():
    """Silence load reports and retries: we raise on what matters. The bars of downloads stay."""
    libraries = (logging, hub.logging)
    levels = [library.get_verbosity() for library in libraries]
    bars, silent = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    for library in libraries:
        library.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # which disables the Hub's too
    if not silent:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if silent:
            hub.disable_progress_bars()
