"""Pictures and masks as users have them, read into arrays."""

import os
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clipseg_repro.errors import InputError

MAX_PIXELS = 128_000_000  # width x height: cameras have up to 108 megapixels, and few bytes can hold many more
# A soft mask is light and dark with little between: the share near white or black in all, and near white in the light.
NEAR, SHARE_NEAR, LIGHT_SHARE_NEAR = 0.1, 0.9, 0.5
FULL = (1, 255, 65535)  # the values that mark an object alone, where it fills the mask


def load_image(image):
    """An image as an (H, W, 3) uint8 RGB array.

    `image` is a path, a PIL image of any mode or an (H, W), (H, W, 3) or (H, W, 4) array. EXIF rotation is applied and
    transparency laid over white. Bytes are taken as they are, other types by their range: bools and floats in [0, 1]
    are scaled by 255, integers above 255 are 16-bit, other numbers in [0, 255] are rounded. Raises InputError for
    anything else, for files that are missing, damaged or no image, and for fewer than 2 x 2 or more than MAX_PIXELS
    pixels.
    """
    if isinstance(image, np.ndarray):
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise InputError(f"image array of shape {image.shape}: give (H, W), (H, W, 3) or (H, W, 4)")
        values = _bytes(image, "image array")
        if values.ndim == 3 and values.shape[2] == 3:
            return values
        picture = Image.fromarray(values)
    else:
        picture, name = _open(image, "image")
        if _has_numbers(picture):
            picture = Image.fromarray(_bytes(np.asarray(picture), name))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))  # convert copies


def load_mask(mask, shape):
    """A binary mask as an (H, W) bool array, True on the object.

    `mask` is a path, a PIL image of any mode or an (H, W) array; `shape` is the (H, W) of its image. What is read how:

    - two values, one of them 0 (grey or bool, {0, 1}, {0, 255}, {0, 15}, 16-bit, float): the other is the object;
    - one value, 1 or white: all is object;
    - more greys, nearly all close to black or white (JPEG noise, smooth edges): the object is lighter than half;
    - colour constant, alpha not: alpha, by the rules above. Alpha constant: the colour;
    - two colours (RGB, palette, ...), one of them black: the other is the object;
    - a palette of other colours: its indices, by the rules above.

    Raises InputError for all else, as it is not clear what the object is: label maps of several labels, two colours
    without black, a picture that varies in colour and in alpha. Also for an empty mask, another size, and whatever
    `load_image` refuses.
    """
    colours = None
    if isinstance(mask, np.ndarray):
        values, name = mask, "mask array"
        if mask.ndim != 2 or mask.dtype.kind not in "buif":
            raise InputError(f"{name} of shape {mask.shape} and type {mask.dtype}: give (H, W) numbers or bools")
        _check_size(*mask.shape, name)
    else:
        picture, name = _open(mask, "mask")
        values, colours = _values(picture, name)
    if values.shape != tuple(shape[:2]):
        raise InputError(
            f"{name} has shape {values.shape}, its image {tuple(shape[:2])}: give a mask of the image's size"
        )
    found = np.unique(values)
    if len(found) == 1 and found[0] == 0:
        raise InputError(f"{name} is empty: mark the object with at least one pixel")
    marked = found[0] in FULL if len(found) == 1 else len(found) == 2 and found[0] == 0 < found[1] < np.inf
    if marked and (colours is None or len(colours) <= 2):
        return values > 0
    if _is_soft(values):
        return values > _white(values) / 2
    kind, shown = ("values", found.tolist()) if colours is None else ("colours", colours)
    one = shown[min(1, len(shown) - 1)]
    choice = f"`values == {one}` for a label or `values > {(_white(values) or 255) // 2}` for a threshold"
    raise InputError(
        f"{name} is not binary, it has the {kind} {', '.join(map(str, shown[:8]))}{', ...' * (len(shown) > 8)}: choose "
        f"the object, as by {choice if colours is None else f'`(rgb == {one}).all(-1)`'}"
    )


def _values(picture, name):
    """What tells a picture's object: (H, W) numbers, and for grey levels of a coloured one its colours (else None)."""
    if _has_numbers(picture):
        return np.asarray(picture), None
    if picture.has_transparency_data:
        rgba = np.asarray(picture.convert("RGBA"))
        alpha = rgba[..., 3]
        if alpha.min() < max(1, alpha.max()):  # not the same everywhere, or nothing can be seen
            drawn = rgba[alpha > alpha.max() / 2][:, :3]
            # faint pixels are left out and others may be off by one, as many programs store colour times alpha
            if drawn.size and np.ptp(drawn, axis=0).max() > 2:
                raise InputError(
                    f"{name} varies in colour and in alpha: keep one, as by `picture.convert('RGB')` or "
                    "`picture.convert('RGBA').getchannel('A')`"
                )
            return alpha, None
    if picture.mode in ("1", "L"):
        return np.asarray(picture), None
    rgb = picture.convert("RGB")
    grey = np.asarray(rgb.convert("L"))
    colours = [colour for _, colour in sorted(rgb.getcolors() or (), reverse=True)]  # the most frequent first
    if len(colours) == 2 and (0, 0, 0) in colours:
        return np.asarray(rgb).any(-1), colours  # a dark colour may be no lighter than black as grey
    if not colours and not _is_soft(grey):
        raise InputError(f"{name} has more than 256 colours: give a mask, with the object white and all else black")
    if picture.mode == "P" and len(colours) != 2 and not _is_soft(grey):
        return np.asarray(picture), None
    return grey, colours


def _is_soft(grey):
    """Whether grey levels are those of a mask with compression noise or smooth edges."""
    white = _white(grey)
    if white is None:
        return False
    dark, bright, light = grey <= NEAR * white, grey >= (1 - NEAR) * white, grey > white / 2
    noise = bright & (grey < white)  # a label map, too, can have low values and white: labels and what is left out
    shares = (dark | bright).mean() >= SHARE_NEAR and bright.sum() >= LIGHT_SHARE_NEAR * light.sum()
    return bool(shares and dark.any() and noise.any())


def _has_numbers(picture):
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def _white(values):
    """The number that stands for white in an array with such type and range; None if none does (or for NaN)."""
    low, high = values.min(), values.max()
    steps = {"b": (1,), "f": (1, 255)}.get(values.dtype.kind, (255, 65535))
    return next((white for white in steps if low >= 0 and high <= white), None)


def _bytes(values, name):
    """Brightness of any type as uint8."""
    _check_size(*values.shape[:2], name)
    if values.dtype.kind not in "buif":
        raise InputError(f"{name} of type {values.dtype}: give numbers or bools")
    white = _white(values)
    if white is None:
        raise InputError(
            f"{name} has values from {values.min():g} to {values.max():g}, type {values.dtype}: scale floats to "
            "[0, 1] or [0, 255], integers to 8 or 16 bits"
        )
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    return np.round(np.divide(values, white / 255, dtype=np.float32)).astype(np.uint8)


def _open(source, what):
    """(PIL image, decoded and with its EXIF rotation applied; its name in messages) of a path or a PIL image."""
    if isinstance(source, Image.Image):
        name, opened = f"{what} (PIL)", nullcontext
    elif isinstance(source, (str, Path)):
        name, opened = f"{what} '{source}'", Image.open
        if not os.path.isfile(source):
            raise InputError(f"{name} is no file: check the path")
    else:
        raise InputError(f"{what} of type {type(source).__name__}: give a path, a PIL image or a numpy array")
    try:
        # Pillow's own limits are a warning below ours and an error above it
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            opened(source) as picture,
        ):
            _check_size(picture.height, picture.width, name)
            picture.load()
            _check_size(picture.height, picture.width, name)  # icons can be larger than they say
            if picture.mode == "La":
                picture = picture.convert("LA")  # the only one that Pillow converts it to
            return ImageOps.exif_transpose(picture), name
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{name} has too many pixels, more than {MAX_PIXELS:,}: make it smaller") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that Pillow can read: convert it to PNG or JPEG") from None
    except Exception as error:  # of any kind, as Pillow's readers trip over damaged files in many ways
        raise InputError(f"{name} cannot be read ({error!r}): it is damaged, truncated or closed") from None


def _check_size(height, width, name):
    size = f"{name} is {width} x {height} pixels"
    if min(height, width) < 2:
        raise InputError(f"{size}: an image needs at least 2 x 2")
    if height * width > MAX_PIXELS:
        raise InputError(f"{size}, more than {MAX_PIXELS:,} in all: make it smaller")
