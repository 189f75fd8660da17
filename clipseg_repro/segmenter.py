"""The public face: one image, many prompts."""

import numpy as np
import torch
from torch.nn import functional as F

from clipseg_repro.devices import pick_device, pick_dtype
from clipseg_repro.errors import InputError
from clipseg_repro.models.forward import decode, embed_images, embed_texts, encode, keep_freed_memory
from clipseg_repro.models.loading import CLIP, load_model
from clipseg_repro.pictures import load_image
from clipseg_repro.prompts import EVERY_RECIPE, Mix, VisualPrompt, checked_share, prepare, to_pixels

CACHED_TEXTS = 4096  # embeddings kept, 2 KB each
TEXT_BATCH = 256
VISUAL_BATCH = 16
PROMPT_BATCH = (
    16  # prompts decoded at once: some 50 MB at 352 px, in blocks that a CPU keeps (models.keep_freed_memory)
)


def load_segmenter(source="mini", device=None, dtype=None, clip=CLIP):
    """A Segmenter of `source`: "mini", a Hub id, a save_pretrained folder or one of the authors' .pth files, whose CLIP
    comes from `clip` (see `models.load_model`).

    device: None picks CUDA, then MPS, then the CPU. dtype: None picks bfloat16 where the device has units for it (CUDA,
    CPU), else float32; results that must be the same on every machine name float32. Both take torch's objects or their
    names ("cpu", "float32").
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    return Segmenter(*load_model(source, clip), device=device, dtype=dtype)


class Segmenter:
    """Segments images by text, by example, by a mix of both, or by a condition tensor.

    A prompt is a phrase (str), a VisualPrompt, a result of `interpolate`, or a tensor (P,), with P the model's
    projection_dim. Wherever `prompts` is asked for, a list of K prompts, a (K, P) tensor, or a single prompt (K = 1)
    will do. `model` and `processor` are the transformers objects. device and dtype: as `load_segmenter` takes them, but
    None leaves the model where and as it is. Errors are InputErrors.
    """

    def __init__(self, model, processor, device=None, dtype=None):
        device = pick_device(device or model.device)
        self.model = model.to(device=device, dtype=pick_dtype(dtype or model.dtype, device)).eval()
        self.processor = processor
        if self.device.type == "cpu":
            keep_freed_memory()
        self._texts = {}  # phrase -> embedding, oldest first
        self._activations = None
        self._size = None

    @property
    def device(self):
        return self.model.device

    def set_image(self, image):
        """Set the query image: path, PIL image of any mode, or (H, W, 3) array, as `load_image` reads it. The encoder
        runs here, once, and only up to the deepest layer that the decoder reads."""
        image = load_image(image)
        pixels = to_pixels([image], self.processor.image_processor)
        self._activations = encode(self.model, pixels.to(self.model.device, self.model.dtype))
        self._size = image.shape[:2]

    def predict(self, prompts):
        """Probability maps, (K, H, W) float32 array in [0, 1], at the query image's own size.

        Probabilities are resized bilinearly with aligned corners, as in the released evaluation."""
        maps = [self._resized(batch.sigmoid()).cpu().numpy() for batch in self._decoded(self.conditions(prompts))]
        return maps[0] if len(maps) == 1 else np.concatenate(maps)

    def maps(self, prompts):
        """An iterator over what `predict` gives, (H, W) float32 each: K maps of a large picture need much memory at
        once."""
        return map(lambda probability: probability.cpu().numpy(), self._maps(self.conditions(prompts)))

    def logits(self, prompts):
        """Raw logits, (K, S, S) float32 tensor, at the model's input size S."""
        return torch.cat(list(self._decoded(self.conditions(prompts))))

    def label_map(self, classes, background=None, threshold=None):
        """One multi-class map, (H, W) int64 array: i + 1 where classes[i] is the most probable, 0 for background.

        Background is where a prompt of `background` (one or a list) beats every class, or where no class exceeds
        `threshold` (default 0.5 without a background prompt, none with one)."""
        classes = self.conditions(classes)
        best = torch.full(self._query_size(), 0.0 if background is not None else 0.5, device=self.device)
        if threshold is not None:
            best.fill_(checked_share(threshold, "label_map: threshold"))
        if background is not None:
            for probability in self._maps(self.conditions(background)):
                torch.maximum(best, probability, out=best)
        labels = torch.zeros(best.shape, dtype=torch.int32, device=self.device)
        for label, probability in enumerate(self._maps(classes), start=1):
            labels.masked_fill_(probability > best, label)
            torch.maximum(best, probability, out=best)
        del best, probability  # of a large picture, as much as the result
        return labels.cpu().numpy().astype(np.int64)

    @torch.no_grad()
    def conditions(self, prompts):
        """Condition vectors, (K, P) float32 tensor. Text embeddings are cached; to reuse a visual prompt's, keep the
        result and pass it in its place."""
        prompts = _as_list(prompts)
        parts = [part for prompt in prompts for part in _parts(prompt)]
        vectors = self._embed_texts(dict.fromkeys(part for part in parts if isinstance(part, str)))
        vectors |= self._embed_visuals(dict.fromkeys(part for part in parts if isinstance(part, VisualPrompt)))

        def vector(prompt):
            if isinstance(prompt, Mix):
                return prompt.weight * vector(prompt.visual) + (1 - prompt.weight) * vector(prompt.text)
            return self._checked(prompt) if isinstance(prompt, torch.Tensor) else vectors[prompt]

        return torch.stack([vector(prompt) for prompt in prompts])

    def _embed_texts(self, texts):
        known = {text: self._texts[text] for text in texts if text in self._texts}
        new = [text for text in texts if text not in known]
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            known |= zip(batch, embed_texts(self.model, self.processor, batch).float())
        self._texts |= {text: known[text] for text in new}
        for text in list(self._texts)[:-CACHED_TEXTS]:
            self._texts.pop(text, None)  # another thread may have been faster
        return known

    def _embed_visuals(self, prompts):
        vectors = {}
        for attention in {EVERY_RECIPE[prompt.recipe].attention for prompt in prompts}:
            group = [prompt for prompt in prompts if EVERY_RECIPE[prompt.recipe].attention == attention]
            for start in range(0, len(group), VISUAL_BATCH):
                batch = group[start : start + VISUAL_BATCH]
                pixels, masks = zip(*(prepare(prompt, self.processor.image_processor) for prompt in batch))
                pixels = torch.stack(pixels).to(self.model.device, self.model.dtype)
                vectors |= zip(batch, embed_images(self.model, pixels, torch.stack(masks), attention).float())
        return vectors

    def _checked(self, condition):
        width = self.model.config.projection_dim
        if condition.shape != (width,):
            raise InputError(
                f"condition tensor of shape {tuple(condition.shape)}: this model takes ({width},) per prompt"
            )
        try:
            vector = condition.detach().to(self.model.device, torch.float32)
            usable = bool(vector.isfinite().all()) and not condition.is_complex()
        except RuntimeError:  # sparse, or on the meta device
            usable = False
        if not usable:
            raise InputError("condition tensor that is not of finite real numbers: check how it was made")
        return vector

    def _query_size(self):
        if self._size is None:
            raise InputError("no query image yet: call set_image(image) before predict, logits or label_map")
        return self._size

    @torch.no_grad()
    def _decoded(self, conditions):
        """Logits in batches of bounded size: yields (<= PROMPT_BATCH, S, S) float32."""
        self._query_size()
        for batch in conditions.split(PROMPT_BATCH):
            yield decode(self.model, self._activations, batch).float()

    def _maps(self, conditions):
        """Probability maps at the query's size, one (H, W) tensor per condition."""
        for batch in self._decoded(conditions):
            for probability in batch.sigmoid():
                yield self._resized(probability[None])[0]

    def _resized(self, probabilities):
        """(K, S, S) to the query's size."""
        return F.interpolate(probabilities[None], self._size, mode="bilinear", align_corners=True)[0].clamp_(0, 1)


def _as_list(prompts):
    single = isinstance(prompts, (str, VisualPrompt, Mix)) or (isinstance(prompts, torch.Tensor) and prompts.ndim == 1)
    try:
        prompts = [prompts] if single else list(prompts)
    except (TypeError, NotImplementedError):  # no list, nor like one: `_parts` or `_checked` says what it should be
        prompts = [prompts]
    if not prompts:
        raise InputError("no prompts: give at least one phrase, VisualPrompt or condition")
    return prompts


def _parts(prompt):
    if isinstance(prompt, Mix):
        return (prompt.text, prompt.visual)
    if isinstance(prompt, (str, VisualPrompt, torch.Tensor)):
        return (prompt,)
    raise InputError(
        f"prompt of type {type(prompt).__name__}: give a phrase, a VisualPrompt, interpolate(...) or a tensor"
    )
