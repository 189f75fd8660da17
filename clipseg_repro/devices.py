"""Devices, and the precision that each computes fastest in: the only place that decides it."""

import platform
import re
from pathlib import Path

import torch
from torch.nn import functional as F

from clipseg_repro.errors import InputError


def pick_device(device=None) -> torch.device:
    """`device` (torch's object or its name); of None, CUDA, then MPS, then the CPU. InputError if it cannot be used."""
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device '{device}' cannot be used here ({str(error).splitlines()[0]}): try 'cpu'") from None
    return device


def device_name(device: torch.device | None = None) -> str:
    """What a device calls itself, as "NVIDIA H100" or "AMD EPYC"; of None, the processor."""
    if device and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has units for it, else float32: without them, bfloat16 is emulated, eight times slower
    on a CPU with AVX2."""
    if device.type == "cpu":
        units = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
        has_units = units.get("amx_bf16") or units.get("avx512_bf16")
    else:
        has_units = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_units else torch.float32


def mixed_precision(device: torch.device) -> torch.autocast:
    """The context in which models train: matrix products in `fast_dtype`, everything else in float32."""
    dtype = fast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def pick_dtype(dtype, device: torch.device) -> torch.dtype:
    """`dtype` (torch's object or its name), or `fast_dtype` of None. InputError if the device cannot compute in it."""
    if dtype is None:
        return fast_dtype(device)
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if value not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype '{dtype}' is not supported: use float32, bfloat16 or float16")
    try:
        one = torch.ones(1, 1, 1, 1, device=device, dtype=value)
        F.interpolate(F.conv2d(one, one) @ one, scale_factor=2, mode="bicubic").softmax(-1)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"dtype '{dtype}' does not work on device '{device}' ({str(error).splitlines()[0]}): use float32"
        ) from None
    return value
