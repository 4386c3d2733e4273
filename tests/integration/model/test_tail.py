"""The encoder's last blocks, from a cache to an exported model: trained, resumed, asked, measured, exported.

python -m encode.run --dataset demo --encoder demo-clip --block 2 --tail
python -m train.run --train-vision-blocks 3
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import encode.check.loss
import encode.run
import model.export.__main__
import model.generate
import train.evaluate.__main__
import train.run
from cache.format.tail import Tail
from cache.share import share
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space, read_info
from configs import UserError
from encode.sources.demo_drawings import DemoWorld, draw
from model.inference import answer
from model.io.saved_model import META, load_final
from model.tail import block_tensors
from tests.support.faults import garble
from tests.support.remote_servers import WebServer
from tests.support.trained_runs import BASE, losses
from train.data.features import read_features
from train.data.join import join

pytestmark = pytest.mark.slow

TAIL = ("--block", "2", "--tail", "--pool", "1")
TRAINED = ("--train-vision-blocks", "3", "--vision-learning-rate", "2e-3")
ONLY = ("--connector", "linear", "--no-train-llm", "--connector-learning-rate", "3e-3")


def encode_demo(folder: Path, *more: str) -> int:
    words = ["--dataset", "demo-captions", "demo-videos", "--encoder", "demo-clip", "--limit", "16"]
    return encode.run.main([*words, "--device", "cpu", "--features", str(folder), *more])


def run_stage(folder: Path, name: str, *more: str) -> Path:
    words = [*BASE, "--features", str(folder / "cache"), "--run", str(folder / "runs" / name)]
    assert train.run.main([*words, "--eval-every", "0", *more]) == 0
    return folder / "runs" / name / "stage1"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of images and clips with a tail, and two runs of 50 steps on it: `frozen` and `trained`."""
    folder = tmp_path_factory.mktemp("tail")
    assert encode_demo(folder / "cache", *TAIL) == 0
    steps = ("--max-steps", "50", "--save-every", "25")
    run_stage(folder, "frozen", *steps, *ONLY)
    run_stage(folder, "trained", *steps, *ONLY, *TRAINED)
    return folder


def tail_of(world: Path) -> Tail:
    tail = read_info(find_space(CacheRoot(world / "cache"), None)).spec.tail
    assert tail is not None
    return tail


def final_tail(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "final" / "tail.safetensors")


def test_the_space_has_one_block_and_those_behind_it(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = find_space(CacheRoot(world / "cache"), None)
    spec = read_info(paths).spec
    assert (spec.blocks, spec.keep_cls, spec.tokens("frame")) == ((2,), True, 37)
    assert (tail_of(world).blocks, spec.seen.tokens("image"), spec.seen.tokens("frame")) == (
        *((5,), 36, 9),
    )
    assert encode_demo(world / "cache", *TAIL, "--plan") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("tail "))
    assert line == (
        "tail     3 blocks behind block 2, stored once (2.38 MB), are computed in training; so rows are "
        "unpooled, with CLS, and take 1.0 times the bytes of features for an image, 4.3 times for a frame"
    )
    # The same command again has nothing to do, and another tail is refused.
    assert encode_demo(world / "cache", *TAIL) == 0
    assert "encoded=0" in capsys.readouterr().out
    with pytest.raises(Exception, match="the space has another tail"):
        encode_demo(world / "cache", *TAIL, "--frame-pool", "1")


def test_a_lost_file_is_written_again(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "cache", tmp_path / "cache")
    path = find_space(CacheRoot(tmp_path / "cache"), None).tail
    before = path.read_bytes()
    garble(path, 5000)
    words = [*BASE, "--features", str(tmp_path / "cache"), "--run", str(tmp_path / "r")]
    with pytest.raises(Exception, match="its sha256 is not that in space") as caught:
        train.run.main([*words, "--max-steps", "1"])
    assert "\n" not in str(caught.value)
    path.unlink()
    assert encode_demo(tmp_path / "cache", *TAIL) == 0
    assert path.read_bytes() == before


def test_trained_blocks_learn_what_frozen_ones_cannot(world: Path) -> None:
    frozen, trained = (losses(world / "runs" / name / "stage1") for name in ("frozen", "trained"))
    last = [sum(found[-5:]) / 5 for found in (frozen, trained)]
    print(
        f"loss of the last 5 of 50 steps: frozen {last[0]:.4f}, three blocks trained {last[1]:.4f}"
    )
    assert frozen[0] == trained[0], "the same model in the first step"
    assert last[1] < last[0]
    stored = load_file(find_space(CacheRoot(world / "cache"), None).tail)
    kept, changed = (final_tail(world / "runs" / name / "stage1") for name in ("frozen", "trained"))
    assert stored.keys() == kept.keys() == changed.keys()
    assert all(torch.equal(kept[name], stored[name]) for name in stored)
    assert not any(torch.equal(changed[name], stored[name]) for name in stored)


def test_fewer_blocks_leave_the_first_ones_as_they_are(world: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(world / "cache")
    stage = run_stage(tmp_path, "one", "--max-steps", "2", "--train-vision-blocks", "1")
    stored = load_file(find_space(CacheRoot(world / "cache"), None).tail)
    found = final_tail(stage)
    differ = {name.split(".")[1] for name in stored if not torch.equal(found[name], stored[name])}
    assert differ == {"5"}


def test_a_resumed_run_is_the_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    """From its checkpoint of step 25, to the bit."""
    shutil.copytree(world / "runs" / "trained", tmp_path / "runs" / "trained")
    stage = tmp_path / "runs" / "trained" / "stage1"
    shutil.move(stage / "final", stage / "kept")
    shutil.rmtree(stage / "checkpoints" / "step-00000050")
    words = ["--run", str(stage.parent), "--features", str(world / "cache"), "--resume"]
    assert train.run.main(words) == 0
    before, after = load_file(stage / "kept" / "tail.safetensors"), final_tail(stage)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("connector.safetensors", "model.safetensors"):
        assert (stage / "kept" / name).read_bytes() == (stage / "final" / name).read_bytes()


def test_another_run_starts_from_a_checkpoint_or_a_final_model(world: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(world / "cache")
    stage = world / "runs" / "trained" / "stage1"
    trained = final_tail(stage)
    for number, origin in enumerate((stage / "final", stage / "checkpoints" / "step-00000050")):
        more = ("--from", str(origin), "--max-steps", "1", "--train-vision-blocks", "0")
        found = final_tail(run_stage(tmp_path, f"next{number}", *more))
        assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_training_over_the_network_is_the_local_one(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "cache", tmp_path / "cache")
    local = losses(run_stage(tmp_path, "local", "--max-steps", "2", *TRAINED))
    share(CacheRoot(tmp_path / "cache"))
    with WebServer(tmp_path / "cache") as server:
        remote = ("--features", server.url, "--mirror", str(tmp_path / "mirror"))
        assert losses(run_stage(tmp_path, "far", "--max-steps", "2", *TRAINED, *remote)) == local


# ---- the trained model


def test_an_answer_is_of_the_trained_blocks(world: Path, tmp_path: Path) -> None:
    """`model.generate` encodes the image: its answer is that of the stored rows through these blocks."""
    run = world / "runs" / "trained"
    vlm, tokenizer, meta = load_final(run / "stage1" / "final")
    assert vlm.tail is not None
    reader = FeatureReader(find_space(CacheRoot(world / "cache"), None))
    samples = join(
        CacheRoot(world / "cache"),
        reader,
        {"demo-captions": None, "demo-videos": None},
        split="train",
        held_out=0.0,
        min_coverage=1.0,
        max_frames=meta["max_frames"],
    )
    assert any(samples.is_video(m) for m in range(len(samples.kinds)))
    media = next(m for m in range(len(samples.kinds)) if not samples.is_video(m))
    stored = read_features(samples, [media], reader)
    assert stored[0].shape == (37, 128)
    prompt = [("user", "Describe the picture.", 1.0)]
    made = answer(vlm, tokenizer, [(prompt, stored)], max_new_tokens=24)[0]
    drawings = [draw(DemoWorld(images=3000), number) for number in range(16)]
    drawing = next(d for d in drawings if hashlib.sha256(d).hexdigest() == samples.key(media))
    (tmp_path / "image.png").write_bytes(drawing)
    options = model.generate.Options(
        prompt=prompt[0][1],
        image=(tmp_path / "image.png",),
        run=str(run),
        max_new_tokens=24,
        device="cpu",
    )
    assert model.generate.generate(options) == made


def test_cached_loss_is_live_loss_and_the_run_is_evaluated(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(world / "runs" / "trained")
    words = ["--run", run, "--features", str(world / "cache"), "--samples", "6", "--device", "cpu"]
    assert encode.check.loss.main(words) == 0
    assert "cached loss = live loss" in capsys.readouterr().out
    words = ["--run", run, "--split", "val", "--device", "cpu", "--limit", "4", "--json"]
    assert train.evaluate.__main__.main([*words, "--max-new-tokens", "4", "--no-blind"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0


def test_the_exported_tower_has_the_trained_blocks(world: Path, tmp_path: Path) -> None:
    run, out = world / "runs" / "trained", tmp_path / "out"
    assert (
        model.export.__main__.main(["--run", str(run), "--out", str(out)]) == 0
    )  # compares logits
    vlm, _, _ = load_final(run / "stage1" / "final")
    assert vlm.tail is not None
    theirs = AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32
    ).model.vision_tower
    names = {name.rpartition("vision_model.")[2]: v for name, v in theirs.state_dict().items()}
    for name, value in block_tensors(vlm.tail).items():
        assert torch.equal(names[name], value), name
    assert json.loads((out / "config.json").read_text())["vision_feature_layer"] == -2
    assert "the last 3 blocks of the vision encoder" in (out / "README.md").read_text()


# ---- refused


def refusal(words: Sequence[str]) -> str:
    with pytest.raises(Exception) as caught:
        train.run.main([*BASE, "--max-steps", "1", *words])
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_space_has_not_is_refused(world: Path, tmp_path: Path) -> None:
    where = ("--features", str(world / "cache"), "--run", str(tmp_path / "r"))
    said = refusal([*where, "--train-vision-blocks", "4"])
    assert "has 3 blocks, 3 to 5; give --train-vision-blocks 3" in said
    plain = tmp_path / "plain"
    assert encode_demo(plain, "--limit", "4") == 0
    said = refusal(["--features", str(plain), "--run", "r", "--train-vision-blocks", "2"])
    assert "has the output of block 5, and no tail of blocks that could train" in said
    assert "--encoder demo-clip" in said
    assert "--block 3 --tail" in said
    other = ("--from", str(world / "runs" / "trained"), "--features", str(plain))
    said = refusal([*other, "--run", str(tmp_path / "r")])
    assert "tail.first 3 there, None here" in said
    assert "--block 2 --tail" in said


@pytest.mark.parametrize("words", [("--block", "2"), ("--tail",)])
def test_block_and_tail_go_together(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--block N and --tail go together"):
        encode_demo(tmp_path, *words)


def test_a_changed_final_model_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "runs" / "frozen" / "stage1" / "final", tmp_path / "final")
    path = tmp_path / "final" / "tail.safetensors"

    def said() -> Any:
        with pytest.raises(UserError) as caught:
            load_final(tmp_path / "final")
        return str(caught.value)

    garble(path, 9000)
    assert "was changed after training" in said()
    path.unlink()
    assert "is missing" in said()
    assert (tmp_path / "final" / META).exists()
