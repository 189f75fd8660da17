"""Writes released_*.json: figures of the authors' code on the inputs of the tests, which then compare ours with them.

    PYTHONPATH=. python tests/data/make_released.py CLIPSEG CLIP

CLIPSEG and CLIP are checkouts of timojl/clipseg and openai/CLIP. Their modules are imported as they are, with these
stand-ins: `clip.load` gives a full-size CLIP with the random weights of tests/models/full_size.py, renamed, in place
of a download; `clip.tokenize` gives that file's token ids, padded as CLIP pads; torchvision's constant padding is
torch's; scipy.integrate.simps, gone since SciPy 1.14, is simpson(y, x=x); `general_utils` is nothing but a log.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import scipy
import torch

HERE = Path(__file__).parent
CLIPSEG, CLIP = map(Path, sys.argv[1:])
sys.path[:0] = [str(HERE.parent / room) for room in ("", "models", "evaluation")]

import test_metrics  # noqa: E402
import test_parity  # noqa: E402
import test_prompts  # noqa: E402

from clipseg_repro.prompts import RECIPES  # noqa: E402

# transformers' names of modules and weights -> those of openai/CLIP and of the authors
NAMES = {
    r"clip\.vision_model\.": "visual.",
    r"clip\.text_model\.": "",
    r"clip\.visual_projection\.weight": "visual.proj",
    r"clip\.text_projection\.weight": "text_projection",
    r"clip\.logit_scale": "logit_scale",
    r"embeddings\.class_embedding": "class_embedding",
    r"embeddings\.patch_embedding": "conv1",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"embeddings\.token_embedding": "token_embedding",
    r"pre_layrnorm": "ln_pre",
    r"post_layernorm": "ln_post",
    r"final_layer_norm": "ln_final",
    r"encoder\.layers": "transformer.resblocks",
}
CLIP_BLOCK = {"self_attn": "attn", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
DECODER = {"transposed_convolution": "trans_conv", "layers": "blocks"}
DECODER_BLOCK = {"layer_norm": "norm", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}

# img_preprocess's options in the released notebook, row by row of Table 2; "crop + BG intensity 10%" as it is named
OPTIONS = {
    "dye object red in grayscale image": {"colorize": True},
    "add red object outline": {"outline": True},
    "BG intensity 50%": {"bg_fac": 0.5},
    "BG intensity 10%": {"bg_fac": 0.1},
    "BG intensity 0%": {"bg_fac": 0.0},
    "BG blur": {"blur": 3},
    "BG blur + intensity 10%": {"blur": 3, "bg_fac": 0.1},
    "crop large context": {"center_context": 0.5},
    "crop": {"center_context": 0.1},
    "crop + BG blur": {"blur": 3, "center_context": 0.5},
    "crop + BG intensity 10%": {"center_context": 0.1, "bg_fac": 0.1},
    "crop + BG blur + BG intensity 10%": {"blur": 3, "center_context": 0.1, "bg_fac": 0.1},
}
MASKING = {  # the notebook's layer 11 is the last; the test's tower has four
    "CLIP masking CLS in layer 11": (3, "cls_token"),
    "CLIP masking CLS in all layers": ("all", "cls_token"),
    "CLIP masking all in all layers": ("all", "all"),
}


def replaced(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def renamed(state):
    """Weights by their names in transformers -> by their names in the authors' model."""
    found = {}
    for name, weight in state.items():
        if re.search(r"[kv]_proj", name):
            continue  # with q_proj
        if "q_proj" in name:
            weight = torch.cat([state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")])
            name = re.sub(r"q_proj\.", "in_proj_", name)
        if name.startswith("decoder."):
            name = replaced(name.removeprefix("decoder."), DECODER)
            name = replaced(name, DECODER_BLOCK) if name.startswith("blocks") else name
        else:
            weight = weight.T if "_projection" in name else weight
            for old, new in NAMES.items():
                name = re.sub(old, new, name)
            name = replaced(name, CLIP_BLOCK) if "resblocks" in name else name
        found[name] = weight
    return found


def module(name, **contents):
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Log:
    def __getattr__(self, _):
        return print


def pad(image, padding, padding_mode):
    left, top, right, bottom = padding
    return torch.nn.functional.pad(image, (left, right, top, bottom), mode=padding_mode)


def tokenize(texts):
    ids = {"short": test_parity.TOKENS[0], "long": test_parity.TOKENS[1]}
    return torch.tensor([ids[text] + [0] * (77 - len(ids[text])) for text in texts])


def rounded(x):
    return float(f"{x:.8g}")


def write(name, note, entries):
    note = f"{note} torch {torch.__version__}, numpy {np.__version__}."
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in {"note": note, **entries}.items()]
    path = HERE / f"released_{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(partial, path)
    print(path.name, path.stat().st_size, "bytes")


@torch.no_grad()
def logits(clipseg, ours):
    """CLIPDensePredT on the cases of tests/models/test_parity.py."""
    entries = {}
    for case in test_parity.CASES:
        size, head, width, layers = case
        test_parity.set_decoder(ours, head, width, layers)
        model = clipseg.CLIPDensePredT(
            "ViT-B/16", extract_layers=layers, reduce_dim=width, complex_trans_conv=head == "refined"
        ).eval()
        missing, unexpected = model.load_state_dict(renamed(ours.decoder.state_dict(prefix="decoder.")), strict=False)
        assert not unexpected
        # `reduce` is in the released class, and nothing calls it
        assert all(name.startswith(("clip_model.", "model.", "reduce.")) for name in missing)
        query, support = test_parity.image("query", size), test_parity.image("support", size)
        visual, share = model.visual_forward(support)[0], test_parity.VISUAL_SHARE
        mixed = model.compute_conditional(["long"]) * (1 - share) + visual * share
        entries[test_parity.case_name(*case)] = {
            kind: {
                key: [rounded(x) for x in value] if isinstance(value, list) else rounded(value)
                for key, value in test_parity.figures(model(query, condition)[0][0, 0]).items()
            }
            for kind, condition in (("text", "short"), ("image", support), ("mixed", mixed))
        }
    note = "Logits of CLIPDensePredT, models/clipseg.py of timojl/clipseg, made by make_released.py:"
    write("logits", note, entries)


@torch.no_grad()
def prompts(clipseg, clip_model, evaluation_utils):
    """img_preprocess and visual_forward on the cases of tests/test_prompts.py."""
    recipes = {}
    for case in ("inside", "border", "pixel"):
        pixels, mask = test_prompts.recipe_case(case)
        recipes[case] = {}
        for name, options in OPTIONS.items():
            batch = (None, [pixels.clone()], [mask.float()])
            (out,) = evaluation_utils.img_preprocess(batch, image_size=352, **options)
            recipes[case][name] = [rounded(x) for x in test_prompts.recipe_figures(out)]
    tiny, images, masks = test_prompts.masking_case()
    dense = clipseg.CLIPDensePredT("ViT-B/16")
    dense.model = clip_model.VisionTransformer(112, 8, width=64, layers=4, heads=4, output_dim=48).eval()
    state = {f"clip.{k}": v for k, v in tiny.clip.state_dict().items() if k.startswith("vis")}
    dense.model.load_state_dict({k.removeprefix("visual."): v for k, v in renamed(state).items()})
    masking = {}
    for name, (layer, kind) in MASKING.items():
        alone = [dense.visual_forward(images[i : i + 1], mask=(layer, kind, masks[i : i + 1]))[0] for i in (0, 1)]
        together = dense.visual_forward(images, mask=(layer, kind, masks))[0]
        masking[name] = {
            "alone": [[rounded(x) for x in row] for row in torch.cat(alone)[:, :8].tolist()],
            "together": [[rounded(x) for x in row] for row in together[:, :8].tolist()],
        }
    assert {*OPTIONS, *MASKING} == set(RECIPES)
    note = (
        "get_prompt_list and CLIPDensePredT.visual_forward (models/clipseg.py) and img_preprocess "
        "(evaluation_utils.py) of timojl/clipseg, made by make_released.py:"
    )
    templates = {
        "templates": clipseg.get_prompt_list("shuffle+"),
        "test template": clipseg.get_prompt_list("fixed")[0],
    }
    write("prompts", note, {**templates, "recipes": recipes, "masking": masking})


def metrics(released):
    """FixedIntervalMetrics on the cases of tests/evaluation/test_metrics.py; 255 goes in as its mask argument."""
    entries = {}
    for name in test_metrics.CASES:
        maps, targets, groups = test_metrics.case(name)
        metric = released.FixedIntervalMetrics(resize_pred=True)
        for i, (p, t) in enumerate(zip(maps, targets, strict=True)):
            t = torch.from_numpy(t)
            valid, target = (t != 255)[None, None], torch.where(t == 255, 0, t).float()[None, None]
            group = torch.tensor([i if groups is None else groups[i]])
            metric.add([torch.from_numpy(p)[None, None]], [target, valid, group])
        with contextlib.redirect_stdout(io.StringIO()):
            value = metric.value()
        names = {
            "miou": ("mean_iou_scores", "miou"),
            "iou_fg": ("fgiou_scores", "fgiou"),
            "iou_bin": ("biniou_scores", "biniou"),
        }
        entries[name] = {
            "ap": float(value["ap"]),
            **{key: [float(x) for x in value[curve]][::6] for key, (curve, _) in names.items()},
            "best": {k: [float(value[f"{n}_best_t"]), float(value[f"{n}_best"])] for k, (_, n) in names.items()},
            "counts": {k: [int(x) for x in value["summed_statistics"][k]] for k in ("tp", "fp", "fn", "tn")},
        }
    note = (
        "FixedIntervalMetrics(resize_pred=True), metrics.py of timojl/clipseg, made by make_released.py. Curves: every "
        f"sixth of the 49 thresholds; best: [threshold, value]; counts: all 49. scipy {scipy.__version__},"
    )
    write("metrics", note, entries)


def main():
    scipy.integrate.simps = lambda y, x: scipy.integrate.simpson(y, x=x)
    module("general_utils", log=Log(), load_model=None)
    for name in ("torchvision", "torchvision.transforms"):
        module(name)
    module("torchvision.transforms.functional", pad=pad)
    metrics(load("released_metrics", CLIPSEG / "metrics.py"))

    clip_model = load("clip_model", CLIP / "clip" / "model.py")
    ours = test_parity.full_size_model()
    network = clip_model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12).eval()
    network.load_state_dict(renamed({k: v for k, v in ours.state_dict().items() if k.startswith("clip.")}))
    module("clip", load=lambda *_, **__: (network, None), tokenize=tokenize)
    clipseg = load("released_clipseg", CLIPSEG / "models" / "clipseg.py")
    prompts(clipseg, clip_model, load("released_evaluation", CLIPSEG / "evaluation_utils.py"))
    logits(clipseg, ours)


main()
