"""Towers and language models of real sizes, untrained, are exported and compared.

python -m pytest -m soak_counted --soak -s tests/integration/model/test_export_sizes.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from model.export.exporter import export
from model.export.options import Options
from model.io.runs import find_run
from model.io.saved_model import save_final
from model.vision.config import encoder_config
from model.vision.encoder import load_encoder
from model.vlm import build_vlm

SIZES = (
    ("clip-vit-b32", "random:qwen3-tiny", "linear"),
    ("clip-vit-l14-336", "random:qwen3-0.6b", "linear"),
    ("siglip2-so400m-14-378", "random:qwen3-tiny", "mlp"),
)
"""Encoder, language model and connector. `make test` takes the first; the second needs 10 GB of memory."""


@pytest.mark.slow
@pytest.mark.soak_counted
def test_real_sizes(soak: Callable[[int, int], int], tmp_path: Path) -> None:
    for encoder, llm, connector in SIZES[: soak(1, len(SIZES))]:
        config = encoder_config(encoder, fit="pad", compute_dtype="float32")
        eyes = load_encoder(config, device="cpu", random_weights=True)
        spec = eyes.spec("int8")
        vlm, tokenizer = build_vlm(spec.width, llm, connector, seed=0)
        space = {"spec": spec.to_json(), "load": eyes.load_info()}
        meta = {"connector": connector, "llm": llm, "space": space, "stage": 1, "step": 0}
        save_final(tmp_path / encoder / "stage1/final", vlm, tokenizer, meta)
        del vlm, eyes
        options = Options(run=str(tmp_path / encoder), out=tmp_path / f"{encoder}-exported")
        found = export(find_run(options.run), options)
        print(f"{encoder}, {llm}, {connector}: {dataclasses.asdict(found)}")
        assert found.logits <= 1e-4 and found.tokens > 0
