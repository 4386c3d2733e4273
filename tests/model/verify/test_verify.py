"""The command `model.verify`: its report, which ends with verdicts, and its exit code.

python -m model.verify --encoder demo --llm random:qwen3-demo
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import configs
from configs import UserError
from model.language.model import load_language
from model.verify import __main__ as verify
from model.verify import report
from model.verify.options import Options
from model.vision.config import encoder_config
from model.vision.encoder import load_encoder
from tests.support.spaces import SPEC as TOY_SPEC

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("codec", "free", "start"),
    [
        ("int8", 500e9, "Fits the disk of somewhere (500 GB free) in int8: "),
        ("int8", 400e9, "Does NOT fit the disk of somewhere (400 GB free) in int8: "),
        ("int4", 400e9, "Fits the disk of somewhere (400 GB free) in int4: "),
    ],
)
def test_the_disk_verdict(
    codec: Any, free: float, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of CLIP ViT-L/14@336: 576 tokens of 1,024 values an image."""
    spec = dataclasses.replace(TOY_SPEC, image_size=336, patch_size=14, width=1024)
    encoder: Any = SimpleNamespace(spec=lambda codec: dataclasses.replace(spec, codec=codec))
    monkeypatch.setattr(report, "free_bytes", lambda _: free)
    verdict = report.disk_verdict(encoder, Options(features=Path("somewhere"), codec=codec))
    images = {"int8": "163,852", "int4": "317,065"}[codec]
    assert verdict == (
        f"{start}the 717,000 images of pixmo-cap take an estimated 846 GB in fp16, 438 GB in int8, 226 GB in "
        f"int4; 100 GB hold {images} images in {codec}"
    )


# ----------------------------------------------------------------------------------- the command

SMALL = ["--encoder", "demo", "--llm", "random:qwen3-tiny", "--device", "cpu"]


def numbers(line: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\b\d[\d,]{2,}", line)]


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(SMALL) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines() if line}
    encoder = load_encoder(encoder_config("demo"), device="cpu")
    language = sum(p.numel() for p in load_language("random:qwen3-tiny")[0].parameters())
    connector = encoder.spec("int8").width * 64 + 64
    assert numbers(lines["vision encoder"]) == [encoder.parameters]
    assert lines["vision encoder"].count("frozen") == 3
    assert numbers(lines["connector"]) == [connector] * 4
    assert numbers(lines["language"]) == [language] * 4
    assert (
        numbers(lines["all"])
        == [encoder.parameters + connector + language] + [connector + language] * 3
    )
    assert re.search(
        r"through everything: loss \d+\.\d{3} \(guessing among 320 words: 5\.768\)", out
    )
    train = configs.load("train")
    table = [line.split() for line in out.splitlines() if line.startswith("stage ")]
    for model in ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen2.5-0.5B"):
        assert sum(line.startswith(model) for line in out.splitlines()) == len(train["stages"])
    assert "GiB, 24gb" in out and "Estimates, not measurements" in out
    assert [line[1:3] for line in table] == [
        [str(stage), name] for stage in train["stages"] for name in train["hardware"]
    ]
    assert not any("NOT" in line for line in table)
    ends = [line.split(":")[0] for line in out.splitlines()[-8:]]
    assert ends[0].startswith("Fits a GPU of 16 GB")
    assert re.fullmatch(r"Fits the disk of cache \(.* free\) in int8", ends[-1])


def test_the_table_shows_the_connector_and_what_is_frozen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = configs.load

    def frozen_first(name: str) -> dict[str, Any]:
        values = inner(name)
        if name == "train":
            values["stages"][1]["train_llm"] = False
        return values

    monkeypatch.setattr(configs, "load", frozen_first)
    assert verify.main([*SMALL, "--connector", "mlp"]) == 0
    out = capsys.readouterr().out
    (language,) = [line for line in out.splitlines() if line.startswith("language")]
    (connector,) = [line for line in out.splitlines() if line.startswith("connector")]
    assert language.split()[2] == "frozen"
    assert "frozen" not in language.split()[3:]
    width = load_encoder(encoder_config("demo"), device="cpu").spec("int8").width
    assert numbers(connector)[0] == width * 64 + 64 + 64 * 64 + 64


def test_a_gpu_torch_cannot_use_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> torch.device:
        raise UserError("this machine has a GPU, torch cannot use it: driver too old")

    monkeypatch.setattr(report, "pick_device", broken)
    small_auto = SMALL[:-2]
    assert verify.main(small_auto) == 1
    out = capsys.readouterr().out
    assert "GPU: not usable: this machine has a GPU, torch cannot use it: driver too old" in out
    assert "stage 3" in out, "the rest of the report is printed"
    with pytest.raises(UserError, match="driver too old"):
        verify.main(SMALL)


def test_a_loss_that_is_not_finite_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: Callable[..., Any] = report.build_vlm

    def poisoned(*args: Any, **options: Any) -> Any:
        vlm, tok = inner(*args, **options)
        vlm.connector.bias.data.fill_(float("nan"))
        return vlm, tok

    monkeypatch.setattr(report, "build_vlm", poisoned)
    assert verify.main(SMALL) == 1
    assert "loss nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mfu", "2"], r"mfu 2\.0 is not between 0 and 1"),
        (["--gpus", "0"], "at least 1"),
        (["--encoder", "dmo"], "dmo"),
        (["--hardware", "25gb"], "there are auto, cpu, 16gb, .*; nearest: "),
        (["--llm", "random:tiny"], "no language model random:tiny"),
        (["--conector", "mlp"], "no option --conector; nearest: --connector"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        verify.main([*SMALL, *words])
    assert "\n" not in str(caught.value)
