"""One step: the micro-batches of each step, and the precision of the forward pass.

for step, micro_batches in by_step(loader, first=0, stop=1000): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.vlm import build_vlm
from train import step
from train.step import choose_precision


def test_a_step_has_its_micro_batches_and_asks_for_no_more() -> None:
    def micro(number: int, last: bool) -> Any:
        return SimpleNamespace(step=number, last=last)

    requested: list[Any] = []

    def source() -> Iterator[Any]:
        for item in (micro(3, False), micro(3, True), micro(4, True), micro(5, True)):
            requested.append(item)
            yield item

    seen = {}
    for number, micro_batches in step.by_step(source(), 3, 6):
        mine = []
        for item in micro_batches:
            assert requested[-1] is item, (
                "the next micro-batch was requested while this one was in use"
            )
            mine.append(item)
        seen[number] = len(mine)
    assert seen == {3: 2, 4: 1, 5: 1}


def test_auto_precision_depends_on_device_and_model_size(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    tiny = build_vlm(64, "random:qwen3-tiny", "linear", 0, device="meta")[0]
    large = build_vlm(64, "random:qwen3-0.6b", "linear", 0, device="meta")[0]
    for has_amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        assert choose_precision("auto", cpu, tiny) is None
        assert choose_precision("auto", cpu, large) is (torch.bfloat16 if has_amx else None)
        assert choose_precision("float32", cpu, large) is None
        assert choose_precision("bfloat16", cpu, tiny) is torch.bfloat16
    assert choose_precision("auto", torch.device("mps"), large) is None
