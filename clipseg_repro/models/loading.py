"""Loading models: the shipped one, folders, the Hub, the authors' files and the image towers of the other backbones."""

import contextlib
import json
import re
from logging import CRITICAL
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub import utils as hub
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import (
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    ViTImageProcessorPil,
)
from transformers.utils import logging

from clipseg_repro.errors import InputError
from clipseg_repro.models.released import read_decoder
from clipseg_repro.models.towers import FILES, read_tower
from clipseg_repro.models.variants import MODELS
from clipseg_repro.prompts import IMAGENET_MEAN, IMAGENET_STD, RELEASED_SIZE, input_size

MINI = Path(__file__).parents[1] / "weights" / "mini"
CLIP = "openai/clip-vit-base-patch16"

# Hub id -> the commit that is loaded; of other ids, and of None, the newest.
REVISIONS = {
    "CIDAS/clipseg-rd64-refined": "999e0328d9e10b484360c477313983f9afdd7050",
    "CIDAS/clipseg-rd64": None,  # its commits could not be looked up when this was written
    "CIDAS/clipseg-rd16": None,  # likewise
    CLIP: "57c216476eefef5ab752ec549e440a49ae4ae5f3",
    **dict.fromkeys(FILES),  # likewise
}

RANDOM_SEED = 0  # of weights that stay random: a CLIP without pre-training, and ViTSeg's linear layer


def load_model(source="mini", clip=CLIP, pretrained=True):
    """(one of variants.MODELS in float32 and eval mode, CLIPSegProcessor).

    `source` is "mini" (shipped with the package), a folder written by `save_pretrained`, a Hub id such as
    "CIDAS/clipseg-rd64-refined", or a file: one of the authors' `.pth` files, or the image tower of ViTSeg or of RN50x4 as a
    safetensors file, which the Hub ids of towers.FILES stand for too. The authors' files hold the decoder only: `clip`, a Hub id
    or a `save_pretrained` folder of a CLIPModel and its tokenizer, gives the rest. It gives ViTSeg's text tower and RN50x4's tokenizer
    too, whose decoders are untrained; no other source reads it. `pretrained=False` keeps the architecture and draws all weights at random,
    the same in every call ("no CLIP pre-training" in the paper's Table 9). A model that is in the Hub's cache is not
    fetched again. Raises InputError if a source is unknown, damaged or another architecture.
    """
    if source == "mini" and not (MINI / "model.safetensors").is_file():
        raise InputError(
            f"the mini model's weights are missing from {MINI}: reinstall the package or give another source"
        )
    path = MINI if source == "mini" else Path(source)
    if str(source) in FILES:
        path, _ = _pretrained(_read_file, source, *MODELS)
    if path.suffix == ".safetensors" and path.is_file():
        model, processor = _read_tower(path, clip)
    elif path.is_file():
        model, processor = _read_released(path, clip)
    else:
        model, processor = _pretrained(_read_segmentation, path, *MODELS)
    words, known = len(processor.tokenizer), model.config.text_config.vocab_size
    if words != known:  # without its files, transformers makes an empty tokenizer and says nothing
        raise InputError(
            f"model '{source}': its tokenizer has {words} tokens, its text tower {known}: the tokenizer files are missing "
            "or belong to another model"
        )
    patch, size = model.config.vision_config.patch_size, input_size(processor.image_processor)
    if size % patch:
        raise InputError(
            f"model '{source}': input size {size} is no multiple of the patch size {patch}: correct the processor"
        )
    if size != getattr(model.config, "input_size", size):
        raise InputError(
            f"model '{source}': its processor makes images of {size} px, the model takes {model.config.input_size}: "
            "correct the processor"
        )
    if not pretrained:
        model = _random(type(model), model.config)
    return model.eval(), processor


def _random(kind, config):
    """A model with the weights that RANDOM_SEED gives; the caller's random numbers are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return kind(config)


def _pretrained(read, source, *kinds):
    """read(...) of a folder that holds a model of those `kinds` (config.json's model_type), or of a Hub id."""
    path, name = Path(source), str(source)
    if path.is_dir():
        _kind(path, kinds)
        failure = f"model folder '{name}' is damaged or incomplete: save or copy it again"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        failure = (
            f"model '{name}' is no folder, is not in the cache {HF_HUB_CACHE}, and could not be fetched from the Hub: "
            "check the name and the network, or use 'mini', which needs neither"
        )
    else:
        raise InputError(
            f"unknown model '{name}': give 'mini', an existing save_pretrained folder or .pth file, or a Hub id "
            "(owner/name)"
        )
    options = {"revision": REVISIONS[name]} if REVISIONS.get(name) else {}
    try:
        with _quiet():
            try:
                model, report, rest = read(name, local_files_only=True, **options)  # what is cached needs no network
            except OSError:
                model, report, rest = read(name, **options)
    except Exception as error:  # of many kinds: OSError, RuntimeError, SafetensorError, ValueError ...
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{failure} ({type(error).__name__}: {reason})") from error
    strange = [k for k in report["unexpected_keys"] if not k.endswith("position_ids")]  # old files store that buffer
    missing = sorted(report["missing_keys"])
    if missing or strange or report["mismatched_keys"]:
        raise InputError(
            f"model '{name}' is not a complete {type(model).__name__}: {len(missing)} weights missing {missing[:3]}, "
            f"{len(strange)} unexpected {sorted(strange)[:3]}: give weights of that class"
        )
    return model, rest


def _kind(path, kinds):
    """The model_type of a folder; fails early, with the reason, on one that is not among `kinds`."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise InputError(
            f"model folder '{path}' has no config.json: give a folder written by save_pretrained"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model folder '{path}' has a damaged config.json ({error!r}): save or copy it again"
        ) from None
    if found not in kinds:
        listed = ", ".join(f"'{kind}'" for kind in kinds)
        raise InputError(f"model folder '{path}' holds a '{found}' model: give one of model_type {listed}")
    return found


def _read_segmentation(name, **options):
    kind = _kind(Path(name), MODELS) if Path(name).is_dir() else "clipseg"  # on the Hub there is no other
    # float32 by name: transformers 5 would keep the precision of the file
    model, report = MODELS[kind].from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    processor = CLIPSegProcessor.from_pretrained(name, **options)
    # where torchvision is installed, transformers would resize with it, to slightly other pixels
    processor.image_processor = ViTImageProcessorPil.from_dict(processor.image_processor.to_dict())
    return model, report, processor


def _read_clip(name, **options):
    model, report = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    return model, report, CLIPTokenizer.from_pretrained(name, **options)


_COMPLETE = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())  # the report on what is no model


def _read_tokenizer(name, **options):
    return CLIPTokenizer.from_pretrained(name, **options), _COMPLETE, None


def _read_file(name, **options):
    return Path(hf_hub_download(name, FILES[name], **options)), _COMPLETE, None


def _read_tower(path, clip):
    """(model with an untrained decoder, processor) of an image tower and what it needs of a CLIP."""
    kind, options, tensors = read_tower(path)
    if kind == "vitseg":
        text, processor = _over_clip(clip)
        shared = ("text_config", "projection_dim", "extract_layers")
        options |= {name: text.config.to_dict()[name] for name in shared} | {"input_size": RELEASED_SIZE}
        if max(options["extract_layers"]) >= options["vision_config"]["num_hidden_layers"]:
            raise InputError(
                f"weights '{path}' have too few layers for {options['extract_layers']}: give {', '.join(FILES)}"
            )
        tensors |= {
            k: v for k, v in text.clip.state_dict().items() if k.startswith(("text_model.", "text_projection."))
        }
    else:
        tokenizer, _ = _pretrained(_read_tokenizer, clip, "clip")
        processor = CLIPSegProcessor(image_processor=released_pixels(), tokenizer=tokenizer)
        options["text_config"] |= {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad")}
    model = _random(MODELS[kind], MODELS[kind].config_class(**options))
    own = model.backbone.state_dict()
    wrong = [
        f"{k} {tuple(v.shape)} in place of {tuple(own[k].shape)}" for k, v in tensors.items() if v.shape != own[k].shape
    ]
    if wrong:
        raise InputError(f"weights '{path}' do not fit together ({wrong[0]}): give the files of {', '.join(FILES)}")
    # strict but for ViTSeg's random layer and the counts of batch norm: read_tower has accounted for the file's keys
    left = [k for k in own.keys() - tensors.keys() if not k.startswith("projection.") and "num_batches" not in k]
    assert not left, left
    model.backbone.load_state_dict(tensors, strict=False)
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
    towers, tokenizer = _pretrained(_read_clip, clip, "clip")
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
    model, processor = _over_clip(clip, **options)
    config = model.config
    wanted = {name: tuple(tensor.shape) for name, tensor in model.decoder.state_dict().items()}
    wrong = [
        f"{k} {tuple(tensor.shape)} in place of {wanted[k]}"
        for k, tensor in tensors.items()
        if tensor.shape != wanted[k]
    ]
    if wrong or max(config.extract_layers) >= config.vision_config.num_hidden_layers:
        raise InputError(
            f"weights '{path}' do not fit CLIP '{clip}' ({wrong[0] if wrong else 'too few layers'}): the authors' files "
            f"need {CLIP}"
        )
    model.decoder.load_state_dict(tensors)
    return model, processor


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
