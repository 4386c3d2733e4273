"""Choose the device to compute on, and its precision."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from configs import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name of a precision, as in specs and options -> torch's dtype."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`. `auto` is CUDA, else MPS, else the CPU.

    Raises:
        UserError: the device cannot be used, or `auto` finds a GPU that torch cannot use. Falling back to the
            CPU without an error would turn minutes into hours.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        if torch.backends.mps.is_available():
            return torch.device("mps")
        raise UserError("--device mps: torch finds no Metal GPU here; use --device cpu")
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdigit()):
        raise UserError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps")
    problem = _cuda_problem()
    if not problem:
        count = torch.cuda.device_count()
        if index and int(index) >= count:
            raise UserError(
                f"--device {name}: torch finds {count} GPU(s), cuda:0 to cuda:{count - 1}"
            )
        return torch.device(name if kind == "cuda" else "cuda")
    if kind == "cuda":
        raise UserError(f"--device {name}: {problem}; use --device cpu")
    if _gpu_in_machine():
        raise UserError(f"{problem}; fix that, or use --device cpu")
    return torch.device("cpu")


def native_dtype(device: torch.device) -> torch.dtype:
    """Return the precision for the encoder on `device`.

    Float16 on GPUs (0.15 % off float32 at block 22 of CLIP ViT-L; packing finds features that overflow),
    bfloat16 (1.2 % off) on CPUs that compute in it, else float32.
    """
    if device.type in ("cuda", "mps"):
        return torch.float16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cuda_problem() -> str:
    """Return why CUDA cannot be used, '' if it can."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only (reinstall it with CUDA)"
    reason = " ".join(str(caught[0].message).split()) if caught else "no reason given"
    return (
        f"torch {torch.__version__} cannot use the GPU: {reason.split(' (Triggered internally')[0]}"
    )


def _gpu_in_machine() -> bool:
    """Return whether the operating system shows a GPU that no environment variable hides."""
    hidden = any(
        os.environ.get(v) in ("", "-1") for v in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    )
    shown = any(Path(p).exists() for p in ("/dev/nvidia0", "/proc/driver/nvidia/gpus", "/dev/kfd"))
    return shown and not hidden


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware. Emulation is slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
