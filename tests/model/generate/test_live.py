"""`model.generate`: an answer about images, equal to the answer from cached features.

python -m model.generate --run demo --image cat.png --prompt "What is it?"
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import configs
from cache.format import codec
from cache.format.checksums import sealed_json
from configs import UserError
from model.generate.__main__ import main
from model.generate.live import live_features
from model.inference import answer
from model.io.run_files import META
from model.io.runs import read_meta
from model.io.saved_model import load_final
from model.media.images import decode_image
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from tests.support.trained_runs import answering, drawings
from tests.support.videos import make_video

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return load_encoder(encoder_config("demo"), device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, encoder: VisionEncoder) -> Path:
    """Make three images, and a run whose model gives them different answers."""
    folder = tmp_path_factory.mktemp("world")
    answering(folder / "run/stage1/final", encoder, "int8", drawings(folder, encoder), stage=1)
    return folder


def from_cache(world: Path, encoder: VisionEncoder, names: list[str]) -> torch.Tensor:
    """Return features as stored by a job and read by the trainer: encoded in a batch, packed by numpy."""
    spec = encoder.spec("int8")
    images = [decode_image((world / f"{n}.png").read_bytes()) for n in ["blue", "red", "lime"]]
    batch = encoder.encode(np.stack([encoder.prepare(p) for p in images]))
    rows = codec.pack(batch.numpy(), spec.codec)
    stored = codec.unpack(rows, spec.codec, spec.tokens("image"), spec.width)
    order = ["blue", "red", "lime"]
    return torch.from_numpy(stored[[order.index(n) for n in names]])


def ask(world: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["--run", str(world / "run"), "--max-new-tokens", "16", *words]) == 0
    out, err = capsys.readouterr()
    return out, err


def images(world: Path, *names: str) -> list[str]:
    return ["--image", *(str(world / f"{n}.png") for n in names)]


def test_live_features_equal_cached_ones(world: Path, encoder: VisionEncoder) -> None:
    """Bit for bit, although the cache was filled from another batch."""
    space = {"spec": encoder.spec("int8").to_json(), "load": encoder.load_info()}
    images = [decode_image((world / f"{n}.png").read_bytes()) for n in ("red", "lime")]
    live = live_features(encoder, space, images)
    assert live.dtype == torch.float16
    assert torch.equal(live, from_cache(world, encoder, ["red", "lime"]))


def test_a_jpeg_is_decoded_as_the_space_of_the_model_says(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(encoder_config("demo", decode="reduced"), device="cpu")
    space = {"spec": encoder.spec("int8").to_json(), "load": encoder.load_info()}
    final = tmp_path / "run/stage1/final"
    shutil.copytree(world / "run/stage1/final", final)
    meta = read_meta(final) | {"space": space}
    (final / META).write_bytes(sealed_json(meta))
    photograph = tmp_path / "large.jpg"
    with Image.open(world / "lime.png") as small:
        small.resize((601, 501)).save(photograph)
    seen: list[torch.Tensor] = []

    def spy(*args: object) -> torch.Tensor:
        seen.append(live_features(*args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr("model.generate.live.live_features", spy)
    words = ["--run", str(tmp_path / "run"), "--image", str(photograph), "--prompt", "what?"]
    assert main([*words, "--max-new-tokens", "2"]) == 0
    whole = live_features(encoder, space, [decode_image(photograph.read_bytes())])
    decoded = encoder.decode(photograph.read_bytes())
    assert decoded.reduced is not None
    assert torch.equal(seen[0], live_features(encoder, space, [decoded]))
    assert not torch.equal(seen[0], whole)


def test_live_answers_equal_those_from_the_cache(
    world: Path, encoder: VisionEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm, tok, _ = load_final(world / "run/stage1/final")
    answers = {}
    for names, prompt in [
        (["red"], "what?"),
        (["blue"], "what?"),
        (["red", "blue"], "<image> or <image>?"),
        (["blue", "red"], "<image> or <image>?"),
        (["red", "blue"], "or?"),
        (["red", "blue"], "or <video> and <image>?"),
    ]:
        out, err = ask(world, capsys, *images(world, *names), "--prompt", prompt)
        features = from_cache(world, encoder, names)
        cached = answer(vlm, tok, [([("user", prompt, 1.0)], features)], max_new_tokens=16)
        assert out == cached[0] + "\n"
        assert err == ""
        answers[(*names, prompt)] = out
    assert len(set(answers.values())) == len(answers), (
        "images, their order and their place change the answer"
    )
    words = [*images(world, "red"), "--prompt", "what?", "--verbose"]
    loud, err = ask(world, capsys, *words)
    assert loud == answers["red", "what?"]
    lines = err.splitlines()
    assert len(lines) == 4 and "encoder demo" in lines[0] and "1 images, " in lines[1]
    assert all(" s  " in line for line in lines)


def test_a_file_that_is_used_with_a_note_is_named(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cut, clip = tmp_path / "cut.jpg", make_video(tmp_path / "clip.mkv", frames=20, fps=10)
    with Image.open(world / "red.png") as image:
        image.save(cut)
    cut.write_bytes(cut.read_bytes()[:-2])
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    words = ["--image", str(cut), "--video", str(clip), "--prompt", "what?"]
    _, err = ask(world, capsys, *words)
    first, second = err.splitlines()
    assert first == f"{cut}: the JPEG ends early: no pixel is missing"
    assert second.startswith(f"{clip}: ends early: ") and second.endswith(" of 2.0 s")


def test_without_images_no_encoder_is_loaded(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.generate.live.rebuild_encoder", None)
    vlm, tok, _ = load_final(world / "run/stage1/final")
    out, _ = ask(world, capsys, "--prompt", "an <image> in words")
    text = answer(vlm, tok, [([("user", "an <image> in words", 1.0)], None)], max_new_tokens=16)
    assert out == text[0] + "\n"


def test_sampled_answers_depend_on_the_seed(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [
        ask(world, capsys, "--prompt", "what?", "--temperature", "1.5", "--seed", seed)[0]
        for seed in ("1", "1", "2")
    ]
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "what?", "--image", "nowhere.png"], r"nowhere\.png: No such file"),
        (
            ["--prompt", "<image> <image>", "--image", "a.png"],
            r"1 --image and 0 --video but 2 marks \(<image> or <video>\)",
        ),
        (["--prompt", "<video>", "--image", "a.png", "b.png"], "2 --image .* but 1 marks"),
        (["--prompt", " "], "no --prompt"),
        (["--prompt", "x", "--temperature", "-1"], r"temperature -1\.0 is below 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens 0 is below 1"),
        (["--promt", "x"], "no option --promt; nearest: --prompt"),
        (["--prompt", "x", "--stage", "2"], "stage 2 is not finished"),
        (
            ["--prompt", "x", "--image", "https://example.org/a b/cat.png"],
            "not URLs; download it first: curl -fL -o cat.png 'https://example.org/a b/cat.png'",
        ),
        (
            ["--prompt", "x", "--video", "HTTP://example.org"],
            "download it first: curl -fL -o downloaded HTTP://example.org",
        ),
    ],
)
def test_mistakes_are_one_line(world: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        main(["--run", str(world / "run"), *words])
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_refused(world: Path, tmp_path: Path) -> None:
    whole = (world / "red.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half\.png: .*give an intact JPEG"):
        main(["--run", str(world / "run"), "--prompt", "x", "--image", str(tmp_path / "half.png")])


def test_an_encoder_with_other_weights_is_refused(world: Path, tmp_path: Path) -> None:
    """A space records the sha256 of the weights its rows were made with."""
    final = tmp_path / "stage1/final"
    shutil.copytree(world / "run/stage1/final", final)
    meta = read_meta(final)
    meta["space"]["spec"]["weights"] = "0" * 64
    del meta["seal"]
    (final / META).write_bytes(sealed_json(meta))
    with pytest.raises(UserError, match=r"made with weights 000000000000"):
        main(["--run", str(tmp_path), "--prompt", "x", *images(world, "red")])


def test_the_command_itself(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes and output streams; of a command that works, those of its process."""
    command = [sys.executable, "-m", "model.generate", "--run", str(world / "run")]
    done = subprocess.run(
        [*command, "--prompt", "what?", *images(world, "red"), "--max-new-tokens", "8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as failed:
        configs.command(lambda: main(["--run", str(world / "run")]))
    assert failed.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
