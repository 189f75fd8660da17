"""The protocols on PhraseCut."""

import numpy as np
import torch

from clipseg_repro.datasets.phrasecut import PhraseCut
from clipseg_repro.evaluation.metrics import threshold_counts
from clipseg_repro.evaluation.referring import absent_phrases, phrasecut
from clipseg_repro.segmenter import load_segmenter


def test_evaluation_counts_every_phrase_once(tiny_folder, data):
    segmenter, dataset = load_segmenter(str(tiny_folder), dtype="float32"), PhraseCut(data, "test")
    threads = torch.get_num_threads()
    result = phrasecut(segmenter, dataset)
    assert torch.get_num_threads() == threads
    assert result.samples["index"].tolist() == list(range(len(dataset)))
    for i, counts in enumerate(result.counts):  # as when one image waits for the other
        segmenter.set_image(dataset[i].image)
        (probability,) = segmenter.predict(dataset.phrases[i])
        alone = threshold_counts(probability, dataset[i].mask).numpy()
        assert np.abs(counts - alone).max() <= 2  # other sums in float32, so a pixel may pass a threshold
    table = result.table()
    groups = table[table.phrases.str.endswith(" phrases")].samples.sum()
    assert groups == table[table.phrases == "all"].samples.item() == len(dataset)
    assert (table.miou_low <= table.miou).all() and (table.miou <= table.miou_high).all()


def test_absent_phrases_are_absent(tiny_folder, data):
    dataset = PhraseCut(data, "test")
    rows = absent_phrases(load_segmenter(str(tiny_folder)), dataset)
    assert len(rows) == 3 * len(dataset.by_image)
    assert not any(dataset.may_show(row.image_id, row.phrase) for row in rows.itertuples())
