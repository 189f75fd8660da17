"""What training must not see, on a WordNet of three synsets in Princeton's own files."""

import pytest

from clipseg_repro.datasets import held_out
from clipseg_repro.datasets.voc import CLASSES
from clipseg_repro.errors import InputError
from clipseg_repro.mini.vocabulary import MiniWords

# cattle, its hyponym ox (with a lemma of two words), and grass, which is neither
NOUNS = [
    "{0:08d} 05 n 02 cattle 0 cow 0 001 ~ {1:08d} n 0000 | a\n",
    "{1:08d} 05 n 02 ox 0 wild_ox 0 001 @ {0:08d} n 0000 | a\n",
    "{2:08d} 05 n 01 grass 0 000 | a\n",
]


@pytest.fixture
def words(tmp_path, monkeypatch):
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    lengths = [len(line.format(0, 0, 0)) for line in NOUNS]
    offsets = [sum(lengths[:n]) for n in range(3)]
    for part in ("noun", "verb", "adj", "adv"):
        lines = "".join(n.format(*offsets) for n in NOUNS) if part == "noun" else "  1 WordNet 3.0 Copyright 2006\n"
        (folder / f"data.{part}").write_text(lines)
        names = [("cattle", 0), ("cow", 0), ("ox", 1), ("wild_ox", 1), ("grass", 2)] if part == "noun" else []
        lines = (f"{name} n 1 0 1 0 {offsets[n]:08d}  \n" for name, n in sorted(names))
        (folder / f"index.{part}").write_text("".join(lines))
        (folder / f"{part}.exc").write_text("oxen ox\n" if part == "noun" else "")
    monkeypatch.setattr("nltk.data.path", [])
    (folder / "lexnames").write_text("".join(f"{n:02d}\tnoun.animal\t1\n" for n in range(6)))
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).touch()
    return held_out.WordNet(tmp_path)


def test_words_of_a_class_are_all_below_its_synset(words):
    assert words.lemmas("cow") == {"cattle", "cow", "ox", "wild ox"}
    assert words.lemmas("person") == held_out.PERSON
    assert [words.base(word) for word in ("cows", "oxen", "grass", "zzz")] == ["cow", "ox", "grass", "zzz"]


def test_phrases_go_by_their_words(words):
    goes = held_out.mentions(words.lemmas("cow"), words.base)
    gone = ["brown cows", "two oxen on grass", "a wild oxcart", "cow"]
    stay = ["grass", "cowboy hat", "cattles pen"]
    assert [goes(phrase) for phrase in gone + stay] == [True] * 4 + [False] * 2 + [True]


def test_keys():
    assert held_out.held_out("unseen-4") == ("cow", "motorbike", "aeroplane", "sofa")
    assert held_out.held_out("pascal-5i-0") == CLASSES[1:6]
    for key in ("unseen-3", "unseen-12", "pascal-5i-4", "unseen", ""):
        with pytest.raises(InputError, match="held_out: "):
            held_out.held_out(key)
    assert held_out.remover("properties", None)("a man riding a horse")


def test_the_mini_world_has_words_of_its_own():
    goes = held_out.remover("pascal-5i-3", MiniWords())
    assert [goes(phrase) for phrase in ("red couch", "potted plant left of the dog", "dog")] == [True, True, False]


def test_without_network_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    monkeypatch.setattr(held_out, "WORDNET", "http://127.0.0.1:9/wordnet.zip")
    with pytest.raises(InputError, match=r"put nltk's wordnet.zip into"):
        held_out.WordNet(tmp_path).lemmas("cow")
