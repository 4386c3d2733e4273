"""The figures of model.verify: counted where they can be, and held against a running model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import configs
from configs import UserError
from model.attention.batch import PackedBatch
from model.connector import build_connector
from model.language.model import LanguagePreset, load_language
from model.verify import __main__ as verify
from model.verify.memory import (
    GIB,
    Sizes,
    Step,
    layer_bytes,
    sample_flops,
    sizes_of,
    stage_days,
    step_bytes,
)
from model.vision.config import encoder_config
from model.vision.encoder import load_encoder
from model.vlm import VLM, parameter_counts

T = 256  # tokens of the model that is watched


def small(layers: int) -> tuple[VLM, Sizes]:
    """All widths different, so that no term of a formula can stand for another."""
    preset = LanguagePreset(
        hidden_size=96, layers=layers, heads=8, kv_heads=2, head_dim=16, intermediate_size=208
    )
    model = AutoModelForCausalLM.from_config(preset.config(300))
    vlm = VLM(model, build_connector("linear", 32, 96), 32)
    counts = parameter_counts(vlm)
    return vlm, sizes_of(model.config, counts["language"][1], counts["connector"][1])


def one_sample(tokens: int = T, supervised: int = 8) -> PackedBatch:
    places = torch.arange(tokens)
    return PackedBatch(
        input_ids=places % 290,
        position_ids=places,
        image_slots=places[:4],
        loss_positions=places[-1 - supervised : -1],
        targets=places[-supervised:] % 290,
        loss_weights=torch.ones(supervised),
        units=torch.tensor([[0, tokens, 0, 0]]),
    )


def kept_bytes(layers: int, autocast: bool, learns: bool, checkpointing: bool) -> int:
    """What autograd really holds after the forward pass, parameters apart; every storage once."""
    vlm, _ = small(layers)
    vlm.freeze(train_connector=True, train_llm=learns)
    vlm.gradient_checkpointing(checkpointing)
    known = {p.untyped_storage().data_ptr() for p in vlm.parameters()}
    held: dict[int, Any] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        # Copies of weights in bfloat16 are a part of their own ("bf16 copies").
        if storage.data_ptr() not in known and not (x.dim() == 2 and T not in x.shape):
            held[storage.data_ptr()] = storage
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss, _ = vlm.loss(one_sample(), torch.randn(1, 4, 32))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_layers_activations_are_as_computed(autocast: bool, learns: bool) -> None:
    """Exactly: two layers more hold exactly twice the formula's bytes more."""
    _, sizes = small(1)
    two, four = (kept_bytes(n, autocast, learns, checkpointing=False) for n in (2, 4))
    assert (four - two) / 2 / T == layer_bytes(sizes, autocast, learns)


@pytest.mark.parametrize("autocast", [True, False])
def test_checkpointing_keeps_a_layers_input(autocast: bool) -> None:
    _, sizes = small(1)
    two, four = (kept_bytes(n, autocast, True, checkpointing=True) for n in (2, 4))
    assert (four - two) / 2 / T == 4 * sizes.width


@pytest.mark.parametrize("learns", [True, False])
def test_arithmetic_is_as_counted(learns: bool) -> None:
    """torch's own counter on a running step; it counts attention in full, we its causal half."""
    vlm, sizes = small(3)
    vlm.freeze(train_connector=True, train_llm=learns)
    batch, features = one_sample(supervised=40), torch.randn(1, 4, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm.loss(batch, features)[0].backward()
    products = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    full_attention = 3 * sizes.layers * 4 * sizes.heads * sizes.head_dim * T * T
    assert products["aten.bmm"] == full_attention
    # The connector passes over 4 of the tokens only; norms count as parameters in the formula.
    wanted = sample_flops(sizes, T, 40, learns) - full_attention / 2
    assert counter.get_total_flops() - full_attention == pytest.approx(wanted, rel=0.02)


def qwen3() -> Sizes:
    model = load_language("random:qwen3-0.6b", device="meta").model
    return sizes_of(model.config, sum(p.numel() for p in model.parameters()), 1_049_600)


def test_the_published_figures_of_qwen3() -> None:
    sizes = qwen3()
    parts = step_bytes(sizes, Step(tokens=4096, checkpointing=True, autocast=True, gpu=True))
    state = parts["weights"] + parts["gradients"] + parts["AdamW"]
    assert state == 16 * (596_049_920 + 1_049_600)
    assert state / GIB == pytest.approx(8.9, abs=0.05)
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    # 76 KB a token a layer in bfloat16 throughout; autocast keeps float32 norms.
    assert 76_000 < layer_bytes(sizes, autocast=True, learns=True) < 84_000


def test_the_estimate_is_near_a_measured_peak() -> None:
    """Qwen3-0.6B in train.run on a CPU, two images in 1,414 tokens: 15.14 GiB resident at most."""
    step = Step(tokens=1414, checkpointing=False, autocast=False, gpu=False)
    assert step_bytes(qwen3(), step)["total"] / GIB == pytest.approx(15.14, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "name", "fits"),
    [(1, "24gb", True), (2, "24gb", True), (3, "24gb", True), (3, "40gb", True), (3, "80gb", True)],
)
def test_every_preset_fits_its_card(stage: int, name: str, fits: bool) -> None:
    train = configs.load("train")
    settings = {**train["stages"][stage], **train["hardware"][name]}
    step = verify.step_of(settings, gpu=True)
    assert step.tokens >= settings["max_sequence_length"]
    assert step.checkpointing
    total = step_bytes(qwen3(), step)["total"]
    assert verify._fits(name, total)[1] == fits
    without = Step(tokens=36_864, checkpointing=False, autocast=True, gpu=True)
    assert not verify._fits(name, step_bytes(qwen3(), without)["total"])[1]


def test_frozen_parts_hold_less() -> None:
    sizes = qwen3()
    base = {"tokens": 4096, "checkpointing": False, "autocast": True, "gpu": True}
    all_of_it = step_bytes(sizes, Step(**base))
    frozen = step_bytes(sizes, Step(**base, train_llm=False))
    assert frozen["gradients"] == 4 * sizes.connector
    assert frozen["AdamW"] == 8 * sizes.connector
    assert frozen["weights"] == all_of_it["weights"]
    assert frozen["activations"] < all_of_it["activations"]


def test_days_are_work_over_speed() -> None:
    assert stage_days(1e15, 86_400, peak_tflops=100, mfu=0.5) == pytest.approx(20.0)


def test_other_models_say_their_sizes_too() -> None:
    class Plain:
        hidden_size, num_hidden_layers, num_attention_heads = 64, 2, 4
        intermediate_size, vocab_size, tie_word_embeddings = 128, 320, False

    sizes = sizes_of(Plain(), 1000, 10)
    assert (sizes.kv_heads, sizes.head_dim, sizes.embeddings) == (4, 16, 2 * 320 * 64)


# ----------------------------------------------------------------------------------- the command

SMALL = ["--encoder", "demo", "--llm", "random:qwen3-tiny", "--device", "cpu"]


def numbers(line: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\b\d[\d,]{2,}", line)]


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(SMALL) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines() if line}
    encoder = load_encoder(encoder_config("demo"), device="cpu")
    language = sum(p.numel() for p in load_language("random:qwen3-tiny").model.parameters())
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
    for stage in train["stages"]:
        block = out.split(f"stage {stage}: GiB")[1].split("\n\n")[0].splitlines()[1:]
        assert [line.split()[0] for line in block] == list(train["hardware"])
        assert not any("NOT" in line for line in block)


def test_connector_and_stage_switches_show(
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

    monkeypatch.setattr(verify, "pick_device", broken)
    small_auto = SMALL[:-2]
    assert verify.main(small_auto) == 1
    out = capsys.readouterr().out
    assert "GPU: not usable: this machine has a GPU, torch cannot use it: driver too old" in out
    assert "stage 3" in out, "the rest is still said"
    with pytest.raises(UserError, match="driver too old"):
        verify.main(SMALL)


def test_pieces_that_do_not_work_together_are_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: Callable[..., Any] = verify.build_vlm

    def poisoned(*args: Any, **options: Any) -> Any:
        vlm, tok = inner(*args, **options)
        vlm.connector.bias.data.fill_(float("nan"))
        return vlm, tok

    monkeypatch.setattr(verify, "build_vlm", poisoned)
    assert verify.main(SMALL) == 1
    assert "loss nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mfu", "2"], r"mfu 2\.0 is not between 0 and 1"),
        (["--gpus", "0"], "at least 1"),
        (["--encoder", "dmo"], "dmo"),
        (["--llm", "random:tiny"], "no language model random:tiny"),
        (["--conector", "mlp"], "no option --conector; nearest: --connector"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        verify.main([*SMALL, *words])
    assert "\n" not in str(caught.value)
