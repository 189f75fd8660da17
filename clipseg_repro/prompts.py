"""Prompts: text templates, visual prompts with the recipes of Table 2, and interpolation between the two.

A recipe turns a support image and its mask into the input of CLIP's image tower. As in the released code, the image is
first resized to the model's input size (aspect ratio not kept) and normalised; the recipe works on that. The released
lengths (blur of 15 x 15, outline of thickness 5) hold at 352 px and are scaled in proportion at other
sizes.
"""

from dataclasses import dataclass
from numbers import Real

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from clipseg_repro.errors import InputError
from clipseg_repro.pictures import load_image, load_mask

TRAIN_TEMPLATES = (
    "a photo of a {}.",
    "a photograph of a {}.",
    "an image of a {}.",
    "{}.",
    "a cropped photo of a {}.",
    "a good photo of a {}.",
    "a photo of one {}.",
    "a bad photo of a {}.",
    "a photo of the {}.",
)
TEST_TEMPLATE = "a photo of a {}."

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RELEASED_SIZE = 352  # px, the input size at which the released blur and outline are stated


@dataclass(frozen=True)
class Recipe:
    """How a support image is shown to CLIP (a row of Table 2).

    background: factor on the background in normalised space, where 0 is ImageNet's mean colour (a grey), not black.
    blur: sigma of a Gaussian blur of the background, 15 x 15, in pixels at 352 px; 0 is none. The blurred picture
        includes the object, as released, so some of it bleeds into the background.
    context: crop to the mask's box, widened on each side by this share of its width and height; None keeps the image.
    tint: grey image, object in red. outline: red outline around the object, cv2's thickness 5 (7 px wide) at 352 px.
    attention: (rows, layers) whose attention logits on patches outside the mask are multiplied by 0 before the softmax;
        rows "cls" (the CLS query) or "patches" (all patch queries), layers "last" or "all". None leaves CLIP as it is.
    """

    background: float = 1.0
    blur: float = 0.0
    context: float | None = None
    tint: bool = False
    outline: bool = False
    attention: tuple[str, str] | None = None

    def apply(self, pixels, mask):
        """The engineered image, (3, S, S) float32, of ImageNet-normalised `pixels` (3, S, S) and bool `mask` (S, S).

        Equals the released `img_preprocess` at S = 352.
        """
        size = pixels.shape[-1]
        background = _blur(pixels, self.blur) if self.blur else pixels
        # with factor 1 and no blur this is the image itself
        out = torch.where(mask, pixels, self.background * background)
        if self.context is not None:
            out = _crop_to_square(out, mask, self.context)
        if self.tint:
            grey = cv2.cvtColor(_to_array(_denormalise(pixels)), cv2.COLOR_RGB2GRAY)
            colour = torch.where(mask, torch.tensor([1.0, 0.2, 0.2])[:, None, None], torch.ones(3, 1, 1))
            out = _normalise(colour * torch.from_numpy(grey))
        if self.outline:
            contours, _ = cv2.findContours(_to_array(mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            line = np.zeros((size, size), np.uint8)
            cv2.drawContours(line, contours, -1, color=1, thickness=max(1, round(5 * size / RELEASED_SIZE)))
            red = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
            out = _normalise(torch.where(torch.from_numpy(line) > 0, red, _denormalise(out)))
        return out


# Named as in Table 2. "layer 11" is the last of ViT-B/16; a shallower tower uses its own last layer. The released
# notebook crops "crop + BG blur" with the large context. It computes "crop + BG intensity 10%" without a crop (the
# paper's two rows of 21.73 are one experiment); here it is what its name says.
RECIPES = {
    "CLIP masking CLS in layer 11": Recipe(attention=("cls", "last")),
    "CLIP masking CLS in all layers": Recipe(attention=("cls", "all")),
    "CLIP masking all in all layers": Recipe(attention=("patches", "all")),
    "dye object red in grayscale image": Recipe(tint=True),
    "add red object outline": Recipe(outline=True),
    "BG intensity 50%": Recipe(background=0.5),
    "BG intensity 10%": Recipe(background=0.1),
    "BG intensity 0%": Recipe(background=0.0),
    "BG blur": Recipe(blur=3.0),
    "BG blur + intensity 10%": Recipe(blur=3.0, background=0.1),
    "crop large context": Recipe(context=0.5),
    "crop": Recipe(context=0.1),
    "crop + BG blur": Recipe(context=0.5, blur=3.0),
    "crop + BG intensity 10%": Recipe(context=0.1, background=0.1),
    "crop + BG blur + BG intensity 10%": Recipe(context=0.1, blur=3.0, background=0.1),
}
# Table 9's "highlight mask", the released `blur_highlight`, is no row of Table 2.
EVERY_RECIPE = RECIPES | {"highlight mask": Recipe(blur=1.0, background=0.5)}
DEFAULT_RECIPE = "crop + BG blur + BG intensity 10%"  # the released `crop_blur_highlight352`


@dataclass(frozen=True, eq=False)
class VisualPrompt:
    """A support image and the mask of the object meant.

    image: path, PIL image or array, as `load_image` reads it. mask: path, PIL image or array of the image's size, as
    `load_mask` reads it. recipe: a key of EVERY_RECIPE. Raises InputError on an unknown one; files are read when used.
    """

    image: object
    mask: object
    recipe: str = DEFAULT_RECIPE

    def __post_init__(self):
        if not isinstance(self.recipe, str) or self.recipe not in EVERY_RECIPE:
            raise InputError(f"unknown recipe '{self.recipe}': choose one of {', '.join(map(repr, EVERY_RECIPE))}")

    def load(self):
        """((H, W, 3) uint8 RGB image, (H, W) bool mask)."""
        image = load_image(self.image)
        return image, load_mask(self.mask, image.shape)


@dataclass(frozen=True, eq=False)
class Mix:
    """An interpolated prompt: condition = weight * visual + (1 - weight) * text. Made by `interpolate`."""

    text: object
    visual: object
    weight: float


def interpolate(text, visual, weight):
    """A prompt between `text` and `visual`: x = a * s + (1 - a) * t (paper, section 3), with `weight` a in [0, 1] the
    share of the visual prompt. Either may be a condition tensor instead."""
    if not isinstance(text, (str, torch.Tensor)):
        raise InputError(f"interpolate: text of type {type(text).__name__}: give a phrase or a condition tensor")
    if not isinstance(visual, (VisualPrompt, torch.Tensor)):
        raise InputError(
            f"interpolate: visual of type {type(visual).__name__}: give a VisualPrompt or a condition tensor"
        )
    return Mix(text, visual, checked_share(weight, "interpolate: weight"))


def checked_share(value, name):
    """`value` as a float. Raises InputError for anything but a number in [0, 1]."""
    if not isinstance(value, Real) or not 0 <= value <= 1:
        shown = value if isinstance(value, Real) else f"of type {type(value).__name__}"
        raise InputError(f"{name} {shown}: give a number in [0, 1]")
    return float(value)


def input_size(image_processor):
    """The side in pixels of the square images that the processor makes. Released weights: 352, read here and not from
    the model's config, whose 224 is the size CLIP was pre-trained at."""
    size = dict(image_processor.size)
    if size.get("height") is None or size.get("height") != size.get("width"):
        raise InputError(f"image processor of size {size}: the decoder needs square inputs, set height = width")
    return size["height"]


def to_pixels(images, image_processor):
    """Images, (H, W, 3) uint8 each, as one (B, 3, S, S) float32 batch: resized to the processor's size without keeping
    the aspect ratio, and normalised."""
    batch = image_processor(list(images), input_data_format="channels_last", return_tensors="pt")
    return batch["pixel_values"].float()


def prepare(prompt, image_processor):
    """A VisualPrompt ready for the image tower: (pixels (3, S, S) float32 after its recipe, mask (S, S) bool).

    The mask is the support mask at the input size before any crop; the attention recipes need it."""
    image, mask = prompt.load()
    (pixels,) = to_pixels([image], image_processor)
    full = torch.from_numpy(mask)[None, None].float()
    small = F.interpolate(full, pixels.shape[-2:])  # nearest, as released
    if not small.any():  # an object thinner than the sampling grid must not vanish
        small = F.adaptive_max_pool2d(full, pixels.shape[-2:])
    small = small[0, 0] > 0
    return EVERY_RECIPE[prompt.recipe].apply(pixels, small), small


def as_seen(prompt, image_processor):
    """What the image tower is given for a VisualPrompt, as a picture, (S, S, 3) uint8 RGB: the normalisation undone."""
    pixels, _ = prepare(prompt, image_processor)
    return np.round(255 * _to_array(_denormalise(pixels))).astype(np.uint8)


def _blur(pixels, sigma):
    scale = pixels.shape[-1] / RELEASED_SIZE
    side = max(3, 2 * round((15 * scale - 1) / 2) + 1)
    return torch.from_numpy(cv2.GaussianBlur(_to_array(pixels), (side, side), sigma * scale)).permute(2, 0, 1)


def _crop_to_square(pixels, mask, context):
    """Crop to the mask's box with context, pad with zeros (the mean colour) to a square, resize it back (nearest)."""
    size = pixels.shape[-1]
    (top, bottom), (left, right) = (_span(mask.any(axis), context, size) for axis in (1, 0))
    crop = pixels[:, top:bottom, left:right]
    height, width = crop.shape[1:]
    x, y = max(0, height - width), max(0, width - height)
    crop = F.pad(crop, (x // 2, x - x // 2, y // 2, y - y // 2))
    return F.interpolate(crop[None], (size, size))[0]


def _span(occupied, context, size):
    where = occupied.nonzero()
    first, last = int(where[0]), int(where[-1]) + 1
    margin = context * (last - first)
    return int(max(0, first - margin)), int(min(size, last + margin))


def _to_array(tensor):
    array = tensor.numpy() if tensor.ndim == 2 else tensor.permute(1, 2, 0).numpy()
    return np.ascontiguousarray(array.astype(np.uint8) if array.dtype == bool else array)


def _normalise(pixels):
    return (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def _denormalise(pixels):
    return (pixels * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]).clamp(0, 1)
