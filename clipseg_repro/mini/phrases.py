"""Phrases about scenes, in PhraseCut's grammar: attributes + name + relation, and the properties of Table 8.

A `Phrase` knows its words and which objects of any scene it is true of; captions and ground truth come from here alone.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from clipseg_repro.mini.scenes import Scene, SceneObject
from clipseg_repro.mini.vocabulary import COLOURS, load_vocabulary

RELATIONS = {
    "left of": lambda a, b: a.centre[0] < b.centre[0] - 0.5 * max(a.box[2], b.box[2]) / 2,
    "right of": lambda a, b: a.centre[0] > b.centre[0] + 0.5 * max(a.box[2], b.box[2]) / 2,
    "above": lambda a, b: a.centre[1] < b.centre[1] - 0.5 * max(a.box[3], b.box[3]) / 2,
    "below": lambda a, b: a.centre[1] > b.centre[1] + 0.5 * max(a.box[3], b.box[3]) / 2,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# How people ask for the properties of Table 8; the first form is the paper's.
PROPERTY_FORMS = {
    "sit on": ("sit on", "something to sit on", "a thing you can sit on"),
    "drink from": ("drink from", "something to drink from", "a thing you can drink from"),
    "ride on": ("ride on", "something to ride on", "a thing you can ride on"),
    "can fly": ("can fly", "something that can fly"),
    "can be driven": ("can be driven", "something that can be driven"),
    "can swim": ("can swim", "something that can swim"),
    "has wheels": ("has wheels", "something that has wheels"),
    "has legs": ("has legs", "something that has legs"),
}


@dataclass(frozen=True)
class Phrase:
    """Words and meaning. An object is meant if its kind is in `kinds` and colour, size and relation (if given) hold."""

    text: str
    kinds: frozenset[int]
    name: str
    colour: str | None = None
    size: str | None = None
    relation: str | None = None
    other: frozenset[int] = frozenset()
    other_name: str = ""

    @property
    def attributes(self) -> list[str]:
        return [a for a in (self.size, self.colour) if a]

    @property
    def category(self) -> str:
        """`relation`, `attribute` or `category`: the phrase's most specific part."""
        return "relation" if self.relation else "attribute" if self.attributes else "category"

    def describes(self, thing: SceneObject) -> bool:
        """Whether the words before the relation are true of an object."""
        return thing.kind in self.kinds and self.colour in (None, thing.colour) and self.size in (None, thing.size)

    def find(self, scene: Scene) -> list[int]:
        """Indices of the objects of a scene that the phrase means."""
        found = [i for i, thing in enumerate(scene.objects) if self.describes(thing)]
        if self.relation is None:
            return found
        holds = RELATIONS[self.relation]
        others = [(j, o) for j, o in enumerate(scene.objects) if o.kind in self.other]
        return [i for i in found if any(j != i and holds(scene.objects[i], o) for j, o in others)]


@cache
def name_phrases() -> tuple[Phrase, ...]:
    """Every name and synonym of the vocabulary, once."""
    return tuple(Phrase(n, frozenset([k.index]), n) for k in load_vocabulary() for n in k.names)


@cache
def general_phrases() -> tuple[Phrase, ...]:
    """Super-categories and the properties of Table 8, in all their forms."""
    vocabulary = load_vocabulary()
    phrases = []
    for category in sorted({k.supercategory for k in vocabulary}):
        kinds = frozenset(k.index for k in vocabulary if k.supercategory == category)
        phrases.append(Phrase(category, kinds, category))
    for label, forms in PROPERTY_FORMS.items():
        kinds = frozenset(k.index for k in vocabulary if label in k.properties)
        phrases += [Phrase(form, kinds, label) for form in forms if kinds]
    return tuple(phrases)


def _name(rng: np.random.Generator, kind: int, canonical: float = 0.7) -> str:
    names = load_vocabulary()[kind].names
    return names[0] if len(names) == 1 or rng.random() < canonical else names[rng.integers(1, len(names))]


def describe(rng: np.random.Generator, scene: Scene, index: int, category: str) -> Phrase | None:
    """A random phrase of one category that is true of object `index`, or None where there is none to say."""
    thing = scene.objects[index]
    name = _name(rng, thing.kind)
    kinds = frozenset([thing.kind])
    if category == "category":
        return Phrase(name, kinds, name)
    if category == "attribute":
        said = [a for a in (thing.size, thing.colour) if a and rng.random() < 0.8]
        if not said:
            return None
        size, colour = (thing.size if thing.size in said else None), (thing.colour if thing.colour in said else None)
        return _worded(kinds=kinds, name=name, colour=colour, size=size)
    options = [
        (relation, o.kind)
        for relation, holds in RELATIONS.items()
        for j, o in enumerate(scene.objects)
        if j != index and o.kind != thing.kind and holds(thing, o)
    ]
    if not options:
        return None
    relation, other = options[rng.integers(len(options))]
    other_name = _name(rng, other)
    return _worded(kinds=kinds, name=name, relation=relation, other=frozenset([other]), other_name=other_name)


def contrary(rng: np.random.Generator, phrase: Phrase) -> Phrase | None:
    """A phrase with the opposite relation, or with another colour or size; None for a bare name."""
    changes = []
    if phrase.relation:
        changes.append({"relation": OPPOSITE[phrase.relation]})
    if phrase.colour:
        others = [colour for colour in COLOURS if colour != phrase.colour]
        changes.append({"colour": others[rng.integers(len(others))]})
    if phrase.size:
        changes.append({"size": "small" if phrase.size == "large" else "large"})
    if not changes:
        return None
    return _worded(**{k: v for k, v in vars(phrase).items() if k != "text"} | changes[rng.integers(len(changes))])


def _worded(**meaning) -> Phrase:
    phrase = Phrase("", **meaning)
    side = f" {phrase.relation} the {phrase.other_name}" if phrase.relation else ""
    return replace(phrase, text=" ".join([*phrase.attributes, phrase.name]) + side)


def tokenizer_corpus() -> list[str]:
    """Sentences that show the tokenizer every word of the mini world."""
    things = [p.text for p in name_phrases() + general_phrases()]
    words = [f"{c} thing" for c in (*COLOURS, "small", "large")] + [f"cat {r} the dog" for r in RELATIONS]
    return things + words
