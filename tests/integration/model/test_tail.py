"""The encoder's last blocks, from a cache to an exported model: trained, resumed, asked, measured, exported.

python -m encode.run --dataset demo --encoder demo-clip --block 2 --tail
python -m train.run --train-vision-blocks 3
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import encode.check.loss
import encode.run
import model.export.__main__
import model.generate.live
import model.generate.options
import train.evaluate.__main__
import train.run
from cache.format.tail import Tail, file_bytes, file_sha256
from cache.share import share
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space, read_info
from configs import UserError
from encode.sources.demo_drawings import DemoWorld, draw
from model.inference import answer
from model.io.run_files import META
from model.io.saved_model import load_final
from model.tail import block_tensors
from tests.support import trained_runs
from tests.support.faults import garble
from tests.support.remote_servers import WebServer
from tests.support.spaces import SPEC, TAIL, tail_arrays
from tests.support.trained_runs import BASE, COLORS, losses
from train.data.features import read_features
from train.data.join import join

pytestmark = pytest.mark.slow

BLOCK = ("--block", "2", "--tail", "--pool", "1")
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
    """A cache of images and clips with a tail, and a run of 10 steps on it that trains all of it."""
    folder = tmp_path_factory.mktemp("tail")
    assert encode_demo(folder / "cache", *BLOCK) == 0
    run_stage(folder, "trained", "--max-steps", "10", "--save-every", "5", *ONLY, *TRAINED)
    return folder


@pytest.fixture(scope="module")
def opposite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of coloured images whose patches have the code of the colour, every second one its negative.

    Their mean is 0. The tail's two blocks add 0, so that untrained blocks let nothing of the colour through.
    """
    folder = tmp_path_factory.mktemp("opposite")
    tail = dataclasses.replace(TAIL, blocks=(2,), pool_image=2)
    arrays = tail_arrays(0, tail)
    for name, value in arrays.items():
        if ".out." in name or ".down." in name or name.endswith(".bias"):
            value[:] = 0
        if ".norm_" in name and name.endswith(".weight"):
            value[:] = 1
    data = file_bytes(tail, arrays, SPEC.width)
    tail = dataclasses.replace(tail, sha256=file_sha256(data))

    def features(color: str, _: int) -> np.ndarray:
        code = np.zeros(64, np.float32)
        code[8 * list(COLORS).index(color) :][:8] = 3
        return code * np.float32([[1], [-1], [1], [-1]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_runs, "features", features)
        trained_runs.make(folder, 24, tail_file=data, pool_frame=1, tail=tail)
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
    assert encode_demo(world / "cache", *BLOCK, "--plan") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("tail "))
    assert line == (
        "tail     3 blocks behind block 2, stored once (2.38 MB), are computed in training; so rows are "
        "unpooled, with CLS, and take 1.0 times the bytes of features for an image, 4.3 times for a frame"
    )
    # The same command again has nothing to do, and another tail is refused.
    assert encode_demo(world / "cache", *BLOCK) == 0
    assert "encoded=0" in capsys.readouterr().out
    with pytest.raises(Exception, match="the space has another tail"):
        encode_demo(world / "cache", *BLOCK, "--frame-pool", "1")


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
    assert encode_demo(tmp_path / "cache", *BLOCK) == 0
    assert path.read_bytes() == before


def test_trained_blocks_learn_what_frozen_features_do_not_tell(opposite: Path) -> None:
    """With a language model that trains, too: of four colours it can only learn how frequent they are."""
    last = {}
    for blocks in (0, 2):
        words = ("--train-vision-blocks", str(blocks), "--vision-learning-rate", "1e-2")
        words += ("--max-steps", "120", "--connector-learning-rate", "3e-3")
        found = losses(run_stage(opposite, f"blocks-{blocks}", *words))
        last[blocks] = sum(found[-10:]) / 10
    print(
        f"loss of the last 10 of 120 steps: frozen {last[0]:.4f}, two blocks trained {last[2]:.4f}"
    )
    # An answer has 7.25 tokens in the mean, and without the image the colour costs ln(4) of each.
    assert last[0] > 0.9 * math.log(4) / 7.25
    assert last[2] < 0.3 * last[0]
    stored = load_file(find_space(CacheRoot(opposite / "cache"), None).tail)
    kept, changed = (final_tail(opposite / "runs" / f"blocks-{n}" / "stage1") for n in (0, 2))
    assert stored.keys() == kept.keys() == changed.keys()
    assert all(torch.equal(kept[name], stored[name]) for name in stored)
    assert not any(torch.equal(changed[name], stored[name]) for name in stored)


def test_adapters_and_blocks_train_together(opposite: Path, tmp_path: Path) -> None:
    """Saved apart, resumed to the bit, merged into the model that another run starts from."""
    (tmp_path / "cache").symlink_to(opposite / "cache")
    words = ("--lora", "4", "--train-vision-blocks", "1", "--vision-learning-rate", "1e-3")
    words += ("--max-steps", "6", "--save-every", "3")
    stage = run_stage(tmp_path, "both", *words)
    before = {path.name: path.read_bytes() for path in (stage / "final").glob("*.safetensors")}
    assert before.keys() >= {"adapter_model.safetensors", "tail.safetensors"}
    assert "model.safetensors" not in before
    stored = load_file(find_space(CacheRoot(opposite / "cache"), None).tail)
    found = final_tail(stage)
    differ = {name.split(".")[1] for name in stored if not torch.equal(found[name], stored[name])}
    assert differ == {"2"}
    expected = losses(stage)
    shutil.rmtree(stage / "final")
    shutil.rmtree(stage / "checkpoints" / "step-00000006")
    assert run_stage(tmp_path, "both", *words, "--resume") == stage
    assert losses(stage) == expected
    after = {path.name: path.read_bytes() for path in (stage / "final").glob("*.safetensors")}
    assert after == before
    vlm, _, _ = load_final(stage / "final")
    assert vlm.tail is not None and not any("lora" in name for name, _ in vlm.named_parameters())
    for origin in (stage / "final", stage / "checkpoints" / "step-00000006"):
        still = ("--learning-rate", "0", "--connector-learning-rate", "0", "--max-steps", "1")
        name = f"next-{origin.name}"
        another = run_stage(tmp_path, name, "--from", str(origin), *still)
        ours = load_final(another / "final")[0].state_dict()
        for key, value in vlm.state_dict().items():
            torch.testing.assert_close(ours[key], value, msg=key)


def test_fewer_blocks_leave_the_first_ones_as_they_are(world: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(world / "cache")
    stage = run_stage(tmp_path, "one", "--max-steps", "2", "--train-vision-blocks", "1")
    stored = load_file(find_space(CacheRoot(world / "cache"), None).tail)
    found = final_tail(stage)
    differ = {name.split(".")[1] for name in stored if not torch.equal(found[name], stored[name])}
    assert differ == {"5"}


def test_a_resumed_run_is_the_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    """From its checkpoint of step 5, to the bit."""
    shutil.copytree(world / "runs" / "trained", tmp_path / "runs" / "trained")
    stage = tmp_path / "runs" / "trained" / "stage1"
    shutil.move(stage / "final", stage / "kept")
    shutil.rmtree(stage / "checkpoints" / "step-00000010")
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
    for number, origin in enumerate((stage / "final", stage / "checkpoints" / "step-00000010")):
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
    options = model.generate.options.Options(
        prompt=prompt[0][1],
        image=(tmp_path / "image.png",),
        run=str(run),
        max_new_tokens=24,
        device="cpu",
    )
    assert model.generate.live.generate(options) == made


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
    shutil.copytree(world / "runs" / "trained" / "stage1" / "final", tmp_path / "final")
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
