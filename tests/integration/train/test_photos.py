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

from cache.store.ledger import read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from model import generate
from tests.support.photos import CAPTIONS, make_folder

STEPS = {1: 350, 2: 60, 3: 30}
"""Steps of each stage: enough to memorise every caption."""


def run(*argv: str, folder: Path) -> str:
    """Run a command in `folder`; return its standard output."""
    done = subprocess.run([sys.executable, "-m", *argv], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with photos/, cache/ and a run of three stages in runs/photos/."""
    folder = tmp_path_factory.mktemp("photographs")
    make_folder(folder / "photos")
    # From here on the working directory has a folder `cache`, which must not hide the package.
    run(
        *("encode.run", "--dataset", "folder:photos", "--encoder", "demo", "--codec", "fp16"),
        *("--pool", "2", "--workers", "0"),
        folder=folder,
    )
    for stage, steps in STEPS.items():
        first = ("--llm", "random:qwen3-tiny") if stage == 1 else ()
        run(
            *("train.run", "--stage", str(stage), "--run", "photos", "--hardware", "cpu", *first),
            *("--held-out", "0", "--batch-size", "23", "--max-steps", str(steps)),
            *("--learning-rate", "3e-3", "--connector-learning-rate", "3e-3"),
            *("--warmup-steps", "10", "--eval-every", "0"),
            folder=folder,
        )
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
    output = run(
        *("encode.run", "--dataset", "folder:photos", "--encoder", "demo", "--codec", "fp16"),
        *("--pool", "2"),
        folder=trained,
    )
    assert f"encoded=0 reused={len(CAPTIONS)} failed=0" in output
