"""Videos in packed micro-batches: loss and gradients equal those of samples that are not packed.

world.encode_videos({"video a": 2.2})
trees = world.trees(world.join("d"))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.store.samples import Sample
from configs import UserError
from model.attention.batch import PackedBatch
from model.language.chat_template import prompt_ids
from model.vlm import VLM, build_vlm
from tests.support.feature_caches import (
    SPEC,
    World,
    ask,
    features,
    frame_time,
    key_of,
    names_of,
    new_world,
)
from tests.support.trained_runs import turns
from train.data.loader import feature_order
from train.data.schedule import SinglePass
from train.step import Forward

VIDEOS = {"video a": 2.2, "video b": 0.0, "video c": 4.1}
IMAGES = ["p", "q"]


def samples() -> list[Sample]:
    """Return samples with videos alone, shared, beside images, and twice; with text only; and with an answer
    before an image."""
    talk = ask("late", ["p", "video b"])
    return [
        ask("one", ["video a"], "<image>what?", "red"),
        ask("same", ["video a"], "<image>where?", "there it is", weight=0.5),
        ask("again", ["video a"], "<image>where then?", "no"),
        ask("mixed", ["p", "video c", "q"], "<image> in <image> or <image>?", "both"),
        ask("twice", ["video b", "video b"], "<image><image>?", "same"),
        ask("image", ["p"], "<image>what?", "a dog"),
        ask("words", [], "hello", "hi"),
        replace(talk, messages=turns("<image> first", "yes", "then <image>?", "no", "why?")),
        replace(ask("early", ["q"]), messages=turns("hm", "an answer", "<image> now?")),
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = new_world(tmp_path_factory.mktemp("videos"))
    world.write(d=samples(), e=[ask("other", ["video a", "q"], "<image> <image>", "x")])
    world.encode(IMAGES)
    world.encode_videos(VIDEOS)
    return world


def frames_of(name: str) -> list[tuple[float, np.ndarray]]:
    """Return times and features of a video's frames, worked out by hand: two a second and the last one."""
    asked = [i * 500_000 for i in range(int(VIDEOS[name] / 0.5) + 1)]
    times = sorted({frame_time(us) for us in (*asked, round(VIDEOS[name] * 1e6))})
    return [(t, features(name, t)) for t in times]


def whole(world: World, sample: Sample) -> tuple[PackedBatch, Tensor | None]:
    """Return a sample as a batch of its own, made by hand with all its tokens, and its features."""
    tokenizer = world.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")

    def text_ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids: list[int] = []
    weights: list[float] = []
    seen: list[np.ndarray] = []
    media = iter([Path(ref.source).stem for ref in sample.media])
    marks = any("<image>" in m.content for m in sample.messages)
    assert marks or not sample.media

    def add(new: Sequence[int], weight: float) -> None:
        ids.extend(new)
        weights.extend([weight] * len(new))

    for message in sample.messages:
        weight = message.weight * sample.weight if message.role == "assistant" else 0.0
        add(text_ids(f"<|im_start|>{message.role}\n"), 0.0)
        parts = message.content.split("<image>")
        add(text_ids(parts[0]), weight)
        for part in parts[1:]:
            name = next(media)
            if name.startswith("video"):
                for time_s, frame in frames_of(name):
                    add([*text_ids(f"{time_s:.1f} "), *[image] * len(frame)], 0.0)
                    seen.append(frame)
            else:
                add([image] * SPEC.tokens("image"), 0.0)
                seen.append(features(name))
            add(text_ids(part), weight)
        add(text_ids("<|im_end|>"), weight)
        add(text_ids("\n"), 0.0)
    batch = PackedBatch.one_sample(torch.tensor(ids), torch.tensor(weights), image)
    return batch, torch.from_numpy(np.concatenate(seen)) if seen else None


def forward_of(vlm: VLM) -> Forward:
    return Forward(vlm=vlm, spec=SPEC, device=torch.device("cpu"), autocast=None)


def random_model() -> VLM:
    """Return a model with all parameters perturbed, so that its losses depend on every input."""
    vlm, _ = build_vlm(SPEC.width, "random:qwen3-tiny", "linear", seed=0)
    generator = torch.Generator().manual_seed(5)
    for p in vlm.parameters():
        p.data += (0.2 if p.dim() == 1 else 0.05) * torch.randn(p.shape, generator=generator)
    return vlm


def gradients(vlm: VLM) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    return found


@pytest.mark.parametrize(
    ("max_branches", "max_tokens"), [(1, 120), (4, 150), (4, 4096)], ids=["alone", "few", "all"]
)
def test_packed_loss_and_gradients_equal_those_of_single_samples(
    world: World, max_branches: int, max_tokens: int
) -> None:
    """The packed sequences leave out tokens that predict nothing; the single samples have all tokens."""
    vlm = random_model()
    total = weight = 0.0
    length = 0
    for sample in samples():
        batch, seen = whole(world, sample)
        loss, part = vlm.loss(batch, seen)
        loss.backward()
        total, weight = total + float(loss.detach()), weight + float(part)
        length += len(batch.input_ids)
    wanted = gradients(vlm)
    joined = world.join("d")
    assert joined.size == len(samples())
    trees = world.trees(joined, 120, max_branches=max_branches)
    plan = SinglePass(trees, 100)
    found, read = 0.0, 0
    with world.load(plan, max_tokens=max_tokens) as loader:
        for micro in loader:
            loss = forward_of(vlm).loss(micro)
            loss.backward()
            found += float(loss.detach())
            read += micro.tokens
            assert micro.step_weight == pytest.approx(weight)
    assert found == pytest.approx(total / weight, rel=1e-6)
    packed = gradients(vlm)
    assert packed.keys() == wanted.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, wanted[name] / weight, rtol=1e-4, atol=2e-6)
    # At least each sample's last end mark and newline are left out.
    assert read <= length - 2 * len(samples())
    assert read == sum(one.tokens for one in trees.slices(np.arange(len(trees))))


def test_tokens_after_the_last_prediction_are_left_out(world: World) -> None:
    """Lengths worked out by hand: up to the last predictor, or to the end of the last image."""
    joined = world.join("d")
    trees = world.trees(joined, 512, max_branches=1)
    lengths = dict(zip(names_of(joined), trees.length.tolist(), strict=True))
    for sample in samples():
        batch, _ = whole(world, sample)
        needed = [*batch.loss_positions.tolist(), *batch.image_slots.tolist()]
        assert lengths[f"d/{sample.id}"] == max(needed) + 1
    full = len(whole(world, samples()[6])[0].input_ids)
    assert lengths["d/words"] == full - 2
    prompt = prompt_ids(world.tokenizer, [("user", "hello", 1.0)], 0)
    assert lengths["d/words"] == len(prompt) + len("hi")


def test_samples_with_one_video_share_a_tree(world: World) -> None:
    joined = world.join("d")
    trees = world.trees(joined, 512)
    shared = trees.slices(np.array([0]))[0]
    assert [joined.name_of(int(m)) for m in shared.members] == ["d/one", "d/same", "d/again"]
    video = len(trees.placeholders.contents(joined, joined.media_of(0).tolist())[0])
    assert shared.prefix == len(["<|im_start|>", "user", "\n"]) + video
    assert shared.tokens == int(trees.length[shared.members].sum()) - 2 * shared.prefix


def test_a_micro_batch_has_rows_of_both_arrays(world: World) -> None:
    joined = world.join("d", "e")
    trees = world.trees(joined, 512)
    with world.load(SinglePass(trees, 100), max_tokens=4096) as loader:
        (micro,) = loader
    rows = forward_of(build_vlm(SPEC.width, "random:qwen3-tiny", "linear", 0)[0]).features(micro)
    assert rows is not None
    wanted = []
    for tree in micro.layouts:
        for m in tree.media:
            name = next(n for n in (*VIDEOS, *IMAGES) if key_of(n) == joined.key(m))
            if joined.is_video(m):
                wanted += [frame for _, frame in frames_of(name)]
            else:
                wanted.append(features(name))
    assert torch.equal(rows, torch.from_numpy(np.concatenate(wanted)))
    assert len(rows) == len(micro.packed.image_slots)
    # Each image and each frame is read once, however many samples show it.
    assert {k: len(c) for k, c in micro.codes.items()} == {
        "image": 2,
        "frame": sum(len(frames_of(name)) for name in VIDEOS),
    }


def test_the_frames_of_a_video_take_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = new_world(tmp_path)
    world.write(d=[ask("1", ["video"], "<image>?", "yes")])
    world.encode_videos({"video": 7.0})
    joined = world.join()
    assert len(joined.rows_of(0)) == 15
    calls: list[int] = []
    preadv = os.preadv

    def spy(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return preadv(fd, buffers, offset)

    with world.load(SinglePass(world.trees(joined), 1)) as loader:
        monkeypatch.setattr(os, "preadv", spy)
        next(loader)
    assert len(calls) == 1


@pytest.mark.parametrize("seed", range(3))
def test_feature_order_with_rows_of_different_sizes(world: World, seed: int) -> None:
    """Images of 4 tokens and frames of 16: each position of the sequence gets its own feature token."""
    spec = replace(SPEC, image_size=8, pool_image=2, pool_frame=1)
    assert (spec.tokens("image"), spec.tokens("frame")) == (4, 16)
    joined = world.join("d", "e")
    rng = np.random.default_rng(seed)
    media = rng.integers(0, len(joined.kinds), 9)
    rows, order = feature_order(joined, media, spec)
    tokens = [(k, int(row), t) for k in rows for row in rows[k] for t in range(spec.tokens(k))]
    expected = []
    for m in media.tolist():
        array = "frame" if joined.is_video(m) else "image"
        expected += [
            (array, int(row), t) for row in joined.rows_of(m) for t in range(spec.tokens(array))
        ]
    assert [tokens[i] for i in order] == expected
    assert all((np.diff(of) > 0).all() for of in rows.values())


def test_a_video_longer_than_the_window_is_an_error_with_remedies(world: World) -> None:
    joined = world.join("d")
    with pytest.raises(UserError) as refused:
        world.trees(joined, max_tokens=60)
    message = str(refused.value)
    frames = len(frames_of("video c"))
    assert "d/mixed is " in message
    tokens = frames * len("0.0 ") + frames  # a time is four characters, a frame one token
    assert f"(2 x 4 for images, {tokens} for {frames} frames of videos, " in message
    assert "--max-frames, here and in encode.run" in message
    assert "\n" not in message


def test_first_rows_order_images_before_frames(world: World) -> None:
    joined = world.join("d", "e")
    trees = world.trees(joined, 512, max_branches=1)
    rows: dict[int, tuple[str, int]] = {}
    for t in range(len(trees)):
        sample = int(trees.slices(np.array([t]))[0].members[0])
        if len(joined.media_of(sample)):
            m = int(joined.media_of(sample)[0])
            array = "frame" if joined.is_video(m) else "image"
            rows.setdefault(int(trees.first_row[t]), (array, int(joined.rows_of(m)[0])))
            assert rows[int(trees.first_row[t])] == (array, int(joined.rows_of(m)[0]))
    ordered = [rows[number] for number in sorted(rows)]
    assert ordered == sorted(ordered, key=lambda one: (one[0] == "frame", one[1]))
