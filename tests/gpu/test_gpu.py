"""The CPU twin of `python -m tests.gpu`: every part runs, every line holds, and a broken path falls short.

python -m tests.gpu --cpu
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanomolmo2 import unpack as unpacking
from tests.gpu import encoding, lines
from tests.gpu.__main__ import main


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_every_line_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cpu", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    table = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| ").partition(":")[0] for row in table}
    assert {"encode", "codecs", "nanomolmo2", "attention", "model", "loader", "train.run"} <= found
    assert {"this process", "generate", "an image", "a clip"} <= found
    short = [row for row in table if row[-1].startswith("short")]
    assert not short
    assert said.count("-- ") >= 12, "a part is missing"


def test_a_wrong_bit_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines.Lines()
    encoding.check_codecs(found, lines.CPU)
    assert found.met == found.total == 3

    def wrong(*given: object, **options: object) -> torch.Tensor:
        x = unpacking.unpack(*given, **options).clone()  # type: ignore[arg-type]
        x[5, 3, 2] = 12345.0
        return x

    monkeypatch.setattr(encoding, "unpack", wrong)
    encoding.check_codecs(found, lines.CPU)
    assert found.met == 3


def test_an_error_in_a_part_is_a_line_that_falls_short() -> None:
    found = lines.Lines()
    with found.part("loader"):
        raise RuntimeError("CUDA error: an illegal memory access")
    assert found.rows == [("loader", "RuntimeError", "no error", "short")]
    assert "| loader | RuntimeError | no error | short |" in found.table(torch.device("cpu"))


def test_nan_never_passes() -> None:
    ours, reference = torch.tensor([1.0, float("nan")]), torch.ones(2)
    found = lines.Lines()
    found.at_most("off", lines.difference(ours, reference), 1.0)
    found.at_most(
        "worst",
        lines.largest_difference({"a": reference, "b": ours}, {"a": reference, "b": ours}),
        1.0,
    )
    found.at_most("names", lines.largest_difference({"a": ours}, {"b": ours}), 1.0)
    assert (found.met, found.total) == (0, 3)
