"""Real photographs from encoding to generation: three stages memorise their captions.

python -m encode.run --dataset folder:photos --encoder demo
python -m train.run --stage 1 --run photos
python -m model.generate --run photos --image photos/coffee.jpg --prompt "Describe this image."
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.store.ledger import read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from encode import run as encode_run
from model.generate import __main__ as generate
from tests.support.photos import CAPTIONS, make_folder
from train import run as train_run

STEPS = {1: 350, 2: 15, 3: 10}
"""Steps of each stage: enough to memorise every caption."""
ENCODE = [
    *("--dataset", "folder:photos", "--encoder", "demo", "--codec", "fp16", "--pool", "2"),
]
"""Words of encode.run."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with photos/, cache/ and a run of three stages in runs/photos/."""
    folder = tmp_path_factory.mktemp("photographs")
    make_folder(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert encode_run.main([*ENCODE, "--workers", "0"]) == 0
        torch.set_flush_denormal(True)  # as the command does: gradients become tiny
        for stage, steps in STEPS.items():
            first = ("--llm", "random:qwen3-tiny") if stage == 1 else ()
            rate = "3e-3" if stage == 1 else "5e-4"  # a higher one forgets
            words = [
                *("--stage", str(stage), "--run", "photos", "--hardware", "cpu", *first),
                *("--held-out", "0", "--batch-size", "23", "--max-steps", str(steps)),
                *("--learning-rate", rate, "--connector-learning-rate", rate),
                *("--warmup-steps", "10", "--eval-every", "0"),
            ]
            assert train_run.main(words) == 0
        torch.set_flush_denormal(False)
    return folder


def test_every_photograph_is_in_the_space_with_its_size(trained: Path) -> None:
    root = CacheRoot(trained / "cache")
    reader = FeatureReader(find_space(root, None))
    media = read_media(root)
    assert len(media) == len(CAPTIONS) >= 20
    assert {record.status for record in media.values()} == {"ok"}
    assert reader.rows("image") == len(CAPTIONS)
    sizes = {Path(source).stem: (record.width, record.height) for source, record in media.items()}
    assert sizes["retina"] == (1411, 1411)
    assert sizes["no_time_for_that_tiny"] == (14, 25)


@pytest.mark.parametrize("name", ["astronaut.jpg", "camera.png", "coffee.jpg", "chelsea.webp"])
def test_the_model_answers_a_photograph_with_its_caption(
    trained: Path, name: str, run_command: Callable[..., tuple[Any, str]], monkeypatch: Any
) -> None:
    """The files are encoded again: one is rotated, one has 16 bits, one is CMYK, one is WebP."""
    caption = next(text for file, text in CAPTIONS.items() if Path(file).stem == Path(name).stem)
    monkeypatch.chdir(trained)
    words = ("--run", "photos", "--image", f"photos/{name}", "--prompt", "Describe this image.")
    assert run_command(generate, *words)[1].strip() == caption


def test_the_same_command_again_encodes_nothing(trained: Path) -> None:
    """As a process: its working directory has a folder `cache`, which must not hide the package."""
    command = [sys.executable, "-m", "encode.run", *ENCODE]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"encoded=0 reused={len(CAPTIONS)} failed=0" in done.stdout
