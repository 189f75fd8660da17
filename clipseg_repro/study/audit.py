"""Where paper, released code and summaries disagree (audit.yaml), and what each disagreement is worth."""

from functools import lru_cache
from importlib.resources import files

import numpy as np
import pandas as pd
import torch
import yaml
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from clipseg_repro.study.scales import Scale
from clipseg_repro.study.tables import paper, side


@lru_cache
def disagreements() -> dict[str, dict]:
    """audit.yaml by the entry's name, the paper's numbers in their places."""
    entries = yaml.safe_load((files(__package__) / "audit.yaml").read_text(encoding="utf-8"))
    for entry in entries.values():
        for source in entry["sources"]:
            source["says"] = source["says"].format(*(paper(*number) for number in source.pop("numbers", ())))
        for effect in entry["effects"]:
            for name in {"this", "over"} & set(effect):
                effect[name] = {"setting": ""} | effect[name]
    return entries


def audit(scale: Scale, recipes: pd.DataFrame | None = None) -> pd.DataFrame:
    """A row per effect: about, sources, likely, compared, unit, the paper's difference, this scale's and its 95%
    interval (low, high), shown_by. What is not measured, or not printed in the paper, is nan.

    recipes: gains of Table 2 as for `tables.ledger`, with a column ", another's mask" for each that masks attention.
    """
    made = []
    for entry in disagreements().values():
        told = {"about": entry["about"], "sources": "; ".join(f"{s['where']}: {s['says']}" for s in entry["sources"])}
        told["likely"] = entry.get("likely", "")
        for effect in entry["effects"]:
            row = told | {"compared": effect["compared"], "unit": effect.get("unit", "points")}
            row |= dict.fromkeys(("paper", scale.column, "low", "high"), np.nan)
            if patches := effect.get("patches"):
                row[scale.column] = decoder_parameters(patches[0]) - decoder_parameters(patches[1])
            else:
                row |= _worth(effect["this"], effect["over"], scale, recipes)
            made.append(row | {"shown_by": entry["shown_by"]})
    return pd.DataFrame(made)


def _worth(this: dict, over: dict, scale: Scale, recipes: pd.DataFrame | None) -> dict:
    row = {}
    if not {"threshold", "convention", "also"} & {*this, *over}:  # in which the paper has nothing
        row["paper"] = paper(**this) - paper(**over)
    sides = [side(own, scale, recipes) for own in (this, over)]
    if all(sides):
        row |= dict(zip((scale.column, "low", "high"), sides[0].over(sides[1])))
    return row


def decoder_parameters(patch: int) -> int:
    """Of transformers' decoder with the plain head, D = 64 and the widths of ViT-B."""
    with torch.device("meta"):
        model = CLIPSegForImageSegmentation(CLIPSegConfig(vision_config={"patch_size": patch}))
    return sum(weight.numel() for weight in model.decoder.parameters())
