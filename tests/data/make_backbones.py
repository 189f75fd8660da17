"""Writes backbones.json: figures of timm, open_clip and the authors' baselines on the inputs of
tests/models/test_backbones.py.

    PYTHONPATH=. python tests/data/make_backbones.py CLIPSEG

CLIPSEG is a checkout of timojl/clipseg; timm and open_clip are installed beside the project (not by it: they need
torchvision). timm's and open_clip's own classes are run, in small sizes, with random weights by their own names. Of the
authors' CLIPDenseBaseline and VITDensePredT the decoders are run: their towers are stand-ins that give the test's
activations.
"""

import json
import os
import pickle
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
CLIPSEG = Path(sys.argv[1]).resolve()

library = torch.library.Library("torchvision", "DEF")  # a torchvision for another build of torch can be imported then
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
open_clip, timm = import_module("open_clip"), import_module("timm")  # by name: no dependencies of the project

sys.path[:0] = [str(HERE.parent / room) for room in ("", "models")]
import test_backbones as cases  # noqa: E402
from full_size import figures, image, random_weight  # noqa: E402

VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 10}
RESNET = {
    "embed_dim": 48,
    "vision_cfg": {"layers": (1, 1, 1, 1), "width": 16, "image_size": 64},
    "text_cfg": {"context_length": 4, "vocab_size": 300, "width": 64, "heads": 1, "layers": 2},
}


def rounded(found):
    return {
        key: [float(f"{x:.8g}") for x in value] if isinstance(value, list) else float(f"{value:.8g}")
        for key, value in figures(found).items()
    }


def filled(network):
    """The network with the test's weights, and the shapes of them."""
    shapes = {name: list(weight.shape) for name, weight in network.state_dict().items()}
    network.load_state_dict(cases.published_weights(shapes))
    return network.eval(), shapes


def vit():
    network, shapes = filled(timm.models.vision_transformer.VisionTransformer(**VIT))
    pixels = torch.nn.functional.interpolate(image("query", 80), (64, 64))
    blocks = {}
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: blocks.update({f"block {i}": rounded(out)}))
    cls = network.forward_features(pixels)[:, 0]  # after the final norm
    return {"shapes": shapes, **blocks, "cls": rounded(cls)}


def resnet():
    network, shapes = filled(open_clip.model.CLIP(**RESNET, quick_gelu=True))
    pixels, visual = image("query", 64), network.visual
    x, found = visual.stem(pixels), {}
    for i in range(4):
        x = getattr(visual, f"layer{i + 1}")(x)
        found[f"stage {i}"] = rounded(x)
    return {
        "shapes": shapes,
        **found,
        "image": rounded(network.encode_image(pixels)),
        "text": rounded(network.encode_text(torch.tensor(cases.TOKENS))),
    }


class Visual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.positional_embedding = torch.nn.Parameter(torch.zeros(1))


def authors(kind):
    """Logits of the authors' decoder of that kind on the test's activations, one of each image."""
    clipseg = __import__("models.clipseg", fromlist=["x"])
    vitseg = __import__("models.vitseg", fromlist=["x"])
    if kind == "clip-deconv":
        network = clipseg.CLIPDenseBaseline("ViT-B/16", reduce_dim=64, reduce2_dim=64)
        names = {"reduces.0": "reduce", "layers.0": "reduce2", "transposed_convolution": "trans_conv"}
        side = 16 * cases.GRID
    else:
        network = vitseg.VITDensePredT(reduce_dim=64)
        names = {"transposed_convolution.0": "trans_conv", "layers": "blocks"}
        names |= {"layer_norm": "norm", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
        side = cases.DECODER_SIDE
    state = {}
    for name, weight in cases.DECODERS[kind](cases.decoder_config(kind)).state_dict().items():
        weight = random_weight(f"decoder.{name}", weight.shape)
        part = name.partition("self_attn.")[2]
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if part[:2] in ("q_", "k_", "v_"):
            name = name.replace(part, part.replace(part[:7], "in_proj_"))
            weight = torch.cat([state[name], weight]) if name in state else weight
        state[name] = weight
    for name in [n for n in state if "in_proj" in n]:
        k, v, q = state[name].chunk(3)  # transformers lists them in this order
        state[name] = torch.cat([q, k, v])
    missing, unexpected = network.eval().load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("clip_model.", "model.", "reduce." * (kind == "vitseg"))) for name in missing), missing
    activations, conditions = cases.decoder_inputs(kind)
    first = [] if kind == "clip-deconv" else activations[:1]  # VITDensePredT asks for block 0 too, and leaves it
    given = [a.transpose(0, 1) for a in [*first, *activations]]
    network.visual_forward = lambda *_, **__: (None, given, None)
    return [rounded(row) for row in network(torch.zeros(2, 3, side, side), conditions)[0][:, 0]]


def stand_in(name, **contents):
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)


@torch.no_grad()
def main():
    entries = {"timm vit": vit(), "open_clip resnet": resnet()}
    tower = torch.nn.Module()
    tower.visual = Visual()
    stand_in("clip", load=lambda *_, **__: (tower, None))
    stand_in("clip.model", convert_weights=None)
    timm.create_model = lambda *_, **__: torch.nn.Module()
    sys.path[:0] = [str(CLIPSEG)]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with open("precomputed_prompt_vectors.pickle", "wb") as file:
            pickle.dump({}, file)
        for kind in cases.DECODERS:
            entries[kind] = authors(kind)
        os.chdir(HERE)
    note = (
        f"timm {timm.__version__}, open_clip {open_clip.__version__} and timojl/clipseg's CLIPDenseBaseline and "
        f"VITDensePredT, made by make_backbones.py with torch {torch.__version__}."
    )
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in {"note": note, **entries}.items()]
    path = HERE / "backbones.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(path.name, path.stat().st_size, "bytes")


main()
