"""The device: which one is chosen, and the error when it cannot be used.

assert device.pick_device("auto") == torch.device("cpu")     # on a machine without a GPU
"""

from __future__ import annotations

import warnings

import pytest
import torch

from configs import UserError
from model.io import device


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make torch find no GPU, on a machine without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device, "_gpu_in_machine", lambda: False)
    return monkeypatch


def test_without_a_gpu_auto_is_the_cpu(no_gpu: pytest.MonkeyPatch) -> None:
    assert device.pick_device("auto") == device.pick_device("cpu") == torch.device("cpu")


def test_a_gpu_that_torch_cannot_use_is_an_error(
    no_gpu: pytest.MonkeyPatch,
) -> None:
    no_gpu.setattr(device, "_gpu_in_machine", lambda: True)
    no_gpu.setattr(torch.version, "cuda", None)
    no_gpu.setattr(torch.version, "hip", None)
    with pytest.raises(UserError, match=r"built for the CPU only.*--device cpu"):
        device.pick_device("auto")
    assert device.pick_device("cpu") == torch.device("cpu")

    def old_driver() -> bool:
        warnings.warn(
            "The NVIDIA driver on your system is too old (found version 11040)", stacklevel=2
        )
        return False

    no_gpu.setattr(torch.version, "cuda", "13.0")
    no_gpu.setattr(torch.cuda, "is_available", old_driver)
    with pytest.raises(UserError, match=r"driver on your system is too old.*--device cpu"):
        device.pick_device("auto")


@pytest.mark.parametrize(("value", "is_hidden"), [("", True), ("-1", True), ("0", False)])
def test_a_gpu_hidden_by_the_user_is_ignored(
    value: str, is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert device._gpu_in_machine() is not is_hidden


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "CUDA", ""])
def test_unknown_device_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="give auto, cpu, cuda, cuda:N or mps"):
        device.pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_missing_device_is_refused(name: str, no_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"--device {name}: .*use --device cpu"):
        device.pick_device(name)


def test_gpus_are_counted(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(torch.cuda, "is_available", lambda: True)
    no_gpu.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("auto") == torch.device("cuda")
    assert device.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="finds 2 GPU"):
        device.pick_device("cuda:2")
    no_gpu.setattr(torch.cuda, "is_available", lambda: False)
    no_gpu.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick_device("auto") == torch.device("mps")


def test_the_precision_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.native_dtype(torch.device("cuda")) == torch.float16
    assert device.native_dtype(torch.device("mps")) == torch.float16
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda has=has: has)
        assert device.native_dtype(torch.device("cpu")) == expected
