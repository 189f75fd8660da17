"""The weights that the authors released with their code (timojl/clipseg): rd64-uni, rd64-uni-refined and rd16-uni.

Each `.pth` file is the decoder of their class CLIPDensePredT without CLIP, some in half precision. Here are its keys,
and the archive that holds the three. What shapes cannot tell (layers read, heads) is as in the Hub's configs of the
same weights.
"""

import hashlib
import pickle
import re
import stat
import zipfile
from pathlib import Path, PurePosixPath

import torch

from clipseg_repro.downloads import download, foreign_content
from clipseg_repro.errors import InputError, listed
from clipseg_repro.files import sha256, written_whole

ARCHIVE = "https://owncloud.gwdg.de/index.php/s/ioHbRzFx6th32hn/download"
FILES = {  # name -> SHA-256
    "rd64-uni.pth": "13845f6cee4d54ca46f62ee19dd354822094a26e0efccc64e606be93d6a7e26f",
    "rd64-uni-refined.pth": "a4956f9a7978a75630b08c9d6ec075b7c51cf43b4751b686e3a011d4012ddc9d",
    "rd16-uni.pth": "61545cdb3a28f99d33d457c64a9721ade835a9dfbda604c459de6831c504167a",
}
# The archive's address has been dead for months at a time; the Hub has the same weights.
ON_THE_HUB = (
    "give CIDAS/clipseg-rd64, CIDAS/clipseg-rd64-refined or CIDAS/clipseg-rd16 as the model, which are the same "
    "weights on the Hub"
)
AGAIN = f"fetch them again (clipseg-repro data weights), or {ON_THE_HUB}"

EXTRACT_LAYERS = [3, 6, 9]  # of CLIP's blocks, counted from 0; the paper says 3, 7, 9
HEADS = 4

# Keys that the authors' forward pass does not use, or that we have from elsewhere.
UNUSED = {
    r"reduce\.(weight|bias)": "a layer of the base class that only the CLIP-Deconv baseline calls",
    r"(clip_model|model)\..+": "CLIP, which was frozen; only in files saved with all of a model's parameters",
}


def read_decoder(path):
    """(options, tensors) of a released `.pth` file, which is read as data and never executed.

    options: what the shapes say, as keywords of CLIPSegConfig. tensors: float32, named as in transformers'
    CLIPSegDecoder. Raises InputError for a file that is damaged, would execute code, or is not such a decoder.
    """
    released = _open(path)
    refined = "trans_conv.0.weight" in released
    layers = len({key.split(".")[1] for key in released if key.startswith("reduces.")})
    names = _names(layers or len(EXTRACT_LAYERS), refined)
    tensors = renamed(released, names, UNUSED, f"weights '{path}' are not those of a CLIPSeg decoder", FILES)
    if layers != len(EXTRACT_LAYERS):
        raise InputError(
            f"weights '{path}' have {layers} decoder layers: which layers of CLIP they read is known only for the "
            f"released files with {len(EXTRACT_LAYERS)} ({', '.join(FILES)})"
        )
    options = {
        "reduce_dim": released["film_mul.bias"].numel(),
        "decoder_intermediate_size": released["blocks.0.linear1.bias"].numel(),
        "use_complex_transposed_convolution": refined,
        "extract_layers": EXTRACT_LAYERS,
        "decoder_num_attention_heads": HEADS,
    }
    return options, tensors


def renamed(state, names, unused, complaint, files):
    """The tensors of `state` in float32 under our names: {theirs: [ours, ...]}, where each of several has an equal part
    of the rows. Keys that match `unused` are left out; InputError, beginning with `complaint`, lists others, and what
    is missing.
    """
    missing = sorted(names.keys() - state.keys())
    unexpected = sorted(k for k in state.keys() - names.keys() if not any(re.fullmatch(u, k) for u in unused))
    if missing or unexpected:
        absent, foreign = (listed(keys, 8, ", ") or "nothing" for keys in (missing, unexpected))
        raise InputError(
            f"{complaint}: missing {absent}, unexpected {foreign}: give one of the published files ({', '.join(files)})"
        )
    tensors = {}
    for theirs, ours in names.items():
        tensor = state[theirs]
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise InputError(
                f"{complaint}: {theirs} is a tensor of {kind}: give one of the published files ({', '.join(files)})"
            )
        tensor = tensor.float()
        tensors |= zip(ours, tensor.chunk(len(ours)) if len(ours) > 1 else [tensor])
    return tensors


def _names(layers, refined):
    """Every key that the model uses -> its names in CLIPSegDecoder; of several, each has an equal part of the rows."""
    modules = {"film_mul": "film_mul", "film_add": "film_add"}
    for place in (".0", ".2", ".4") if refined else ("",):
        modules[f"trans_conv{place}"] = f"transposed_convolution{place}"
    names = {}
    for i in range(layers):
        block, layer = f"blocks.{i}", f"layers.{i}"
        modules |= {
            f"reduces.{i}": f"reduces.{i}",
            f"{block}.self_attn.out_proj": f"{layer}.self_attn.out_proj",
            f"{block}.linear1": f"{layer}.mlp.fc1",
            f"{block}.linear2": f"{layer}.mlp.fc2",
            f"{block}.norm1": f"{layer}.layer_norm1",
            f"{block}.norm2": f"{layer}.layer_norm2",
        }
        for kind in ("weight", "bias"):
            names[f"{block}.self_attn.in_proj_{kind}"] = [f"{layer}.self_attn.{x}_proj.{kind}" for x in "qkv"]
    return names | {f"{theirs}.{k}": [f"{ours}.{k}"] for theirs, ours in modules.items() for k in ("weight", "bias")}


def _open(path):
    """The {key: tensor} of a .pth file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: UnpicklingError, RuntimeError, EOFError, OSError ...
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # the pickle names a function or class
            raise InputError(f"weights '{path}' would execute code when opened, so they were not: {AGAIN}") from None
        reason = foreign_content(path) or type(error).__name__
        raise InputError(f"weights '{path}' are damaged or no .pth file ({reason}): {AGAIN}") from None
    table = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not table or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(
            f"weights '{path}' hold a {type(content).__name__} that is no plain table of named tensors: give one of "
            f"the authors' files ({', '.join(FILES)})"
        )
    return content


def authors_name(path):
    """The name of the authors' file whose bytes the file `path` holds, or None."""
    found = sha256(path)
    return next((name for name, known in FILES.items() if known == found), None)


def fetch_weights(folder):
    """The paths of the authors' three files in `folder`, fetched if they are not all there with the known checksums;
    goes on where it was stopped. Raises InputError without network and for an archive that is damaged, unsafe or not
    theirs."""
    folder = Path(folder)
    paths = [folder / name for name in FILES]
    if not all(path.is_file() and authors_name(path) == path.name for path in paths):
        archive = folder / "weights.zip"
        if not archive.is_file():
            download(ARCHIVE, archive, otherwise=ON_THE_HUB)
        try:
            contents = _unpacked(archive)
        except Exception as error:  # of many kinds: BadZipFile, zlib.error, EOFError, RuntimeError, OSError ...
            damage = foreign_content(archive) or f"damaged ({error})"
            reason = error if isinstance(error, InputError) else f"it is {damage}"
            archive.unlink()  # then the next run fetches it afresh
            raise InputError(
                f"archive '{archive}' is not what the authors published at {ARCHIVE}: {reason}; nothing was extracted: "
                f"run the same command to fetch it again, or {ON_THE_HUB}"
            ) from None
        try:
            for path in paths:
                with written_whole(path) as temporary:
                    temporary.write_bytes(contents[path.name])
        except OSError as error:  # the archive stays for the next run
            raise InputError(
                f"cannot write to '{folder}' ({error.strerror or error}): free disk space or give another folder"
            ) from None
        archive.unlink()
    return paths


def _unpacked(archive):
    """{name: bytes} of the released files in a zip archive; other members are left alone."""
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        if unsafe := [m.filename for m in members if _is_unsafe(m)]:
            raise InputError(f"it has members that point outside it ({unsafe[0]!r})")
        found = {name: m for m in members if (name := PurePosixPath(m.filename).name) in FILES}
        if absent := [name for name in FILES if name not in found]:
            raise InputError(f"it lacks {', '.join(absent)}")
        contents = {name: opened.read(found[name]) for name in FILES}
    if other := [name for name, content in contents.items() if hashlib.sha256(content).hexdigest() != FILES[name]]:
        raise InputError(f"the checksum of {', '.join(other)} is another")
    return contents


def _is_unsafe(member):
    path = PurePosixPath(member.filename.replace("\\", "/"))
    link = stat.S_ISLNK(member.external_attr >> 16)
    return link or path.is_absolute() or ".." in path.parts or ":" in str(path)
