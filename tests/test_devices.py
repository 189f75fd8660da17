"""One place decides the precision: what the CPU and the GPU report is patched, and everything follows."""

import pytest
import torch
from accelerate.state import AcceleratorState

from clipseg_repro.devices import fast_dtype, mixed_precision, pick_device, pick_dtype
from clipseg_repro.errors import InputError
from clipseg_repro.segmenter import load_segmenter
from clipseg_repro.training import decoders

LAPTOP, SERVER = {"avx2": True}, {"avx2": True, "avx512_bf16": True, "amx_bf16": True}


@pytest.fixture
def cpu(monkeypatch):
    AcceleratorState._reset_state()  # it keeps the first precision that it hears of
    yield lambda report: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: report)
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("report", "dtype"),
    [
        ({}, torch.float32),
        (LAPTOP, torch.float32),
        ({"avx2": True, "avx512_f": True, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_is_chosen_where_the_cpu_has_units_for_it(report, dtype, cpu, tiny_folder):
    cpu(report)
    device = torch.device("cpu")
    assert fast_dtype(device) == pick_dtype(None, device) == dtype
    assert load_segmenter(str(tiny_folder), device="cpu").model.dtype == dtype
    assert load_segmenter(str(tiny_folder), device="cpu", dtype="float32").model.dtype == torch.float32
    with mixed_precision(device):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == dtype


@pytest.mark.parametrize("device", ["warp drive", 3.5, [], "meta"])
def test_odd_devices_are_refused(device):
    with pytest.raises(InputError, match=r"cannot be used here .*try 'cpu'"):
        pick_device(device)


@pytest.mark.parametrize(("emulated", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_emulated_bfloat16_of_older_gpus_is_not_chosen(emulated, dtype, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert fast_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize(("report", "dtype"), [(LAPTOP, torch.float32), (SERVER, torch.bfloat16)])
def test_training_computes_in_what_the_cpu_is_fast_at(report, dtype, cpu, tiny_folder, data, tmp_path, monkeypatch):
    cpu(report)
    seen, decode = [], decoders.decode

    def watched(model, activations, conditions):
        logits = decode(model, activations, conditions)
        if torch.is_grad_enabled():  # not in the validation, which is float32 on every machine
            seen.append((activations[0].dtype, logits.dtype, model.decoder.film_mul.weight.dtype))
        return logits

    monkeypatch.setattr(decoders, "decode", watched)
    budget = {"iterations": 1, "batch": 2, "phrases_per_image": 2, "validate_on": 1}
    decoders.train("clipseg-pc+", data, tmp_path, str(tiny_folder), **budget)
    assert seen == [(dtype, dtype, torch.float32)]
