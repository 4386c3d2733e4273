"""Two batches in flight: rows equal those of one batch after another, in order, and nothing asks for a value.

pipeline = Pipeline(encoder, "int8")
done = pipeline.put(pixels, "image", "a")      # [] until two are in flight
done += pipeline.drain()

The copies of CUDA are run with streams and events that are recorded. On a card: tests/gpu/encoding.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache.format.codec import CODECS
from model import quantize
from model.vision import encoder as encoding
from model.vision import pipeline as pipelines
from model.vision.config import EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vision.pipeline import IN_FLIGHT, Done, Pipeline
from model.vision.replay import Replay
from tests.support import tiny_clip
from tests.support.encode_jobs import TINY

BATCH, SIDE = TINY.batch_size, 28


def encoder_of(**values: Any) -> VisionEncoder:
    config = dataclasses.replace(TINY, compute_dtype="float32", pool_frame=2, **values)
    return load_encoder(config, device="cpu")


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return encoder_of()


def inputs(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(tiny_clip.noise(count, SIDE, seed=seed))


def expected(encoder: VisionEncoder, pixels: list[np.ndarray], codec: str, array: str) -> Any:
    packed = quantize.pack(encoder.encode(np.stack(pixels), array), codec)
    return packed.rows.numpy()


def through(pipeline: Pipeline[Any], *batches: tuple[list[np.ndarray], str]) -> list[Done[Any]]:
    """Put batches labelled 0, 1, 2, ...; return all of them."""
    done = [
        one
        for label, (pixels, array) in enumerate(batches)
        for one in pipeline.put(pixels, array, label)
    ]
    return done + pipeline.drain()


@pytest.mark.parametrize("codec", CODECS)
def test_rows_equal_those_of_one_batch_after_another(encoder: VisionEncoder, codec: str) -> None:
    """Images and frames in turn, and batches that are not full."""
    sizes = [BATCH, 1, BATCH, BATCH - 1, 2, BATCH]
    batches = [
        (inputs(n, seed), ("image", "frame")[seed % 2 or seed == 4]) for seed, n in enumerate(sizes)
    ]
    done = through(Pipeline(encoder, codec), *batches)
    assert [one.label for one in done] == list(range(len(sizes)))
    for one, (pixels, array) in zip(done, batches, strict=True):
        assert one.failure is None and one.finite.all() and len(one.rows) == len(pixels)
        assert np.array_equal(one.rows, expected(encoder, pixels, codec, array))
        error = quantize.pack(encoder.encode(np.stack(pixels), array), codec).error
        assert np.allclose(one.error, error.numpy(), rtol=1e-6)
        assert one.clipped.tolist() == [0] * len(pixels)


def test_two_batches_are_in_flight(encoder: VisionEncoder) -> None:
    pipeline: Pipeline[str] = Pipeline(encoder, "int8")
    labels = [[d.label for d in pipeline.put(inputs(1), "image", name)] for name in "abcd"]
    assert IN_FLIGHT == 2 and labels == [[], [], ["a"], ["b"]]
    assert [one.label for one in pipeline.drain()] == ["c", "d"]
    assert pipeline.drain() == []
    assert pipeline.put(inputs(1), "image", "e") == []


def test_rows_stay_as_they_are_while_later_batches_use_the_buffers(encoder: VisionEncoder) -> None:
    pipeline: Pipeline[Any] = Pipeline(encoder, "int8")
    batches = [(inputs(BATCH, seed), "image") for seed in range(8)]
    done = through(pipeline, *batches)
    for one, (pixels, array) in zip(done, batches, strict=True):
        assert np.array_equal(one.rows, expected(encoder, pixels, "int8", array))


class Late(pipelines._Copies):
    """Does all work of a batch when it is waited for, as a GPU may: what it needs must be there still."""

    def compute(self, slot: Any, array: str, work: Replay) -> None:
        slot.outputs[array] = work  # type: ignore[assignment]

    def down(self, slot: Any, array: str) -> None:
        pass

    def wait(self, slot: Any, array: str, count: int) -> Any:
        super().compute(slot, array, slot.outputs[array])
        super().down(slot, array)
        return super().wait(slot, array, count)


def test_no_buffer_is_used_again_before_its_batch_is_done(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "_Copies", Late)
    batches = [
        (inputs(BATCH - seed % 2, seed), ("image", "frame")[seed % 3 == 0]) for seed in range(7)
    ]
    done = through(Pipeline(encoder, "int8", side_by_side=False), *batches)
    for one, (pixels, array) in zip(done, batches, strict=True):
        assert np.array_equal(one.rows, expected(encoder, pixels, "int8", array))


@pytest.mark.parametrize("brief_s", [pipelines.BRIEF_S, 0.0])
def test_a_cpu_computes_two_batches_side_by_side_unless_they_take_long(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch, brief_s: float
) -> None:
    """Each has half of the threads, and waits here until the other one computes too."""
    together, threads = threading.Barrier(2, timeout=30), []
    original = encoder.features

    def features(pixels: torch.Tensor, array: str) -> Any:
        threads.append(torch.get_num_threads())
        if threads[-1] == 2:
            together.wait()
        return original(pixels, array)

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(pipelines, "BRIEF_S", brief_s)
    monkeypatch.setattr(encoder, "features", features)
    try:
        with contextlib.closing(Pipeline[int](encoder, "int8")) as pipeline:
            done = through(pipeline, *[(inputs(BATCH, seed), "image") for seed in range(5)])
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
        monkeypatch.undo()
    assert threads == ([4, 2, 2, 2, 2] if brief_s else [4] * 5)
    assert [one.label for one in done] == list(range(5))
    for one in done:
        pixels = inputs(BATCH, one.label)
        assert np.array_equal(one.rows, expected(encoder, pixels, "int8", "image"))


# ---- failures


@pytest.mark.parametrize("way", ["side by side", "at once", "late"])
@pytest.mark.parametrize("broken", [0, 1, 2, 4])
def test_a_batch_that_fails_takes_no_other_with_it(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch, broken: int, way: str
) -> None:
    """Out of memory when it is started, or a kernel's error when its rows are waited for."""
    if way == "late":
        monkeypatch.setattr(pipelines, "_Copies", Late)
    batches = [(inputs(BATCH, seed), "image") for seed in range(5)]
    bad = int(np.stack(batches[broken][0]).sum())
    original = encoder.features

    def features(pixels: torch.Tensor, array: str) -> Any:
        if int(pixels.sum()) == bad:
            raise torch.OutOfMemoryError("no memory")
        return original(pixels, array)

    monkeypatch.setattr(encoder, "features", features)
    pipeline: Pipeline[int] = Pipeline(encoder, "int8", side_by_side=way == "side by side")
    done = through(pipeline, *batches)
    monkeypatch.undo()
    assert [one.label for one in done] == list(range(5))
    for one, (pixels, _) in zip(done, batches, strict=True):
        if one.label == broken:
            assert str(one.failure) == "no memory"
            assert len(one.rows) == len(one.error) == len(one.finite) == len(one.clipped) == 0
        else:
            assert np.array_equal(one.rows, expected(encoder, pixels, "int8", "image"))


def test_only_torchs_errors_are_failures_of_a_batch(encoder: VisionEncoder) -> None:
    pipeline: Pipeline[int] = Pipeline(encoder, "int8")
    with pytest.raises(ValueError, match="shape"):
        pipeline.put(list(tiny_clip.noise(2, SIDE + 1)), "image", 0)
    assert pipeline.drain() == []


def test_values_that_are_not_finite_or_are_clipped_are_known_for_each_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also before pooling; and nothing is counted of the inputs that fill up a batch."""
    encoder = encoder_of(pool_image=1)
    tower = encoder._tower.forward

    def odd(x: torch.Tensor) -> list[torch.Tensor]:
        (features,) = tower(x)
        features[0, 1, 2], features[1, 0, :3], features[3] = float("nan"), 1e6, 1e6
        return [features]

    monkeypatch.setattr(encoder._tower, "forward", odd)
    for array in ("image", "frame"):
        (done,) = through(Pipeline(encoder, "int8"), (inputs(3), array))
        assert done.finite.tolist() == [False, True, True]
        assert done.clipped.tolist() == [0, 3, 0]
        rows = expected(encoder, inputs(3), "int8", array)
        assert np.array_equal(done.rows[1:], rows[1:])


# ---- nothing waits for a GPU


class Asked(TorchDispatchMode):
    """Notes operations whose result the host must know, for which it would wait for a GPU."""

    names: tuple[str, ...] = ()
    WAITS = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "equal",
        "unique",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += (func.overloadpacket.__name__,)
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        return [
            name for name in self.names if name.lstrip("_") in {w.lstrip("_") for w in self.WAITS}
        ]


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take every branch for rare values, as a GPU does."""
    with monkeypatch.context() as patched:
        for module in (quantize, encoding):
            patched.setattr(module, "occurs", lambda _rare: True)
        yield


TOWERS: dict[str, EncoderConfig] = {
    "demo": TINY,
    "open_clip": tiny_clip.entry(pool_frame=2),
    "timm": tiny_clip.entry(model="tiny-siglip", activation="gelu", pool_frame=2),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("array", ["image", "frame"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_batch_asks_for_no_value(
    tower: str, array: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(TOWERS[tower], device="cpu", random_weights=tower != "demo")
    pixels = list(tiny_clip.noise(2, encoder.tower.image_size))
    rows = expected(encoder, pixels, codec, array)  # also makes the constants of the codec
    pipeline: Pipeline[int] = Pipeline(encoder, codec, side_by_side=False)
    with as_on_a_gpu(monkeypatch), Asked() as asked:
        assert pipeline.put(pixels, array, 0) == []
    assert len(asked.names) > 20 and asked.waits == []
    (done,) = pipeline.drain()
    assert np.array_equal(done.rows, rows)
    with Asked() as asked:  # as a CPU does, which shows that asking is noticed
        quantize.pack(torch.ones(1, 4, 64), codec)
    assert asked.waits


@pytest.mark.parametrize("tower", [*TOWERS, "clip", "siglip", "dinov2", "dinov3"])
def test_every_tower_computes_attention_in_one_operation(tower: str, tmp_path: Any) -> None:
    """`_native_multi_head_attention` computes it by the same kernels, on CUDA."""
    config = TOWERS.get(tower)
    if config is None:
        place = tiny_clip.save_tower(tmp_path / tower, tiny_clip.transformers_tower(tower))
        config = encoder_config(f"hf:{place}", compute_dtype="float32")
    encoder = load_encoder(config, device="cpu", random_weights=tower in ("open_clip", "timm"))
    pixels = torch.from_numpy(tiny_clip.noise(1, encoder.tower.image_size))
    with Asked() as asked:
        encoder.features(pixels, "image")
    fused = ("native_multi_head_attention", "scaled_dot_product")
    found = [name for name in asked.names if any(word in name for word in fused)]
    assert len(found) == max(config.blocks) + 1
    assert not any("softmax" in name for name in asked.names)


# ---- CUDA's copies, with streams and events that are recorded


class Cuda:
    """Streams and events that note what is asked of them, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.compute = self.stream_named("compute")
        self.made = iter(("up", "down"))
        self.events = 0

    def stream_named(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_event=lambda event: self.said.append(f"{name} waits for {event.name}"),
            wait_stream=lambda other: self.said.append(f"{name} waits for {other.name}"),
            synchronize=lambda: self.said.append(f"host waits for {name}"),
        )

    def Stream(self, _device: Any) -> Any:
        return self.stream_named(next(self.made))

    def Event(self, *, blocking: bool = False) -> Any:
        slot, number = divmod(self.events, 3)
        self.events += 1
        name = f"{('copied', 'computed', 'arrived')[number]} {slot}"
        assert blocking == (number == 2), "only the event that the host waits for"
        return SimpleNamespace(
            name=name,
            record=lambda stream: self.said.append(f"{stream.name} records {name}"),
            synchronize=lambda: self.said.append(f"host waits for {name}"),
        )

    def current_stream(self, _device: Any) -> Any:
        return self.compute

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.said.append(f"on {stream.name}")
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(pipelines, "cuda", fake)
    monkeypatch.setattr(pipelines, "_Copies", pipelines._CudaCopies)
    for name in ("zeros", "empty"):
        plain = getattr(torch, name)

        def unpinned(*given: Any, plain: Any = plain, pin_memory: bool = False, **more: Any) -> Any:
            fake.said += ["pinned"] if pin_memory else []
            return plain(*given, **more)

        monkeypatch.setattr(torch, name, unpinned)
    return fake


def test_the_copies_of_a_gpu_are_in_order_and_use_their_memory_again(
    encoder: VisionEncoder, cuda: Cuda
) -> None:
    pipeline: Pipeline[int] = Pipeline(encoder, "int8", side_by_side=False)
    allocated = ["pinned", "up waits for compute"]
    assert cuda.said == 2 * allocated
    batches = [(inputs(BATCH - seed, seed), "image") for seed in range(4)]
    said = []
    done = []
    for label, (pixels, array) in enumerate(batches):
        cuda.said.clear()
        done += pipeline.put(pixels, array, label)
        said.append(list(cuda.said))

    def batch(slot: int) -> list[str]:
        return [
            "on up",
            f"up records copied {slot}",
            f"compute waits for copied {slot}",
            f"compute records computed {slot}",
            "on down",
            f"down waits for computed {slot}",
            f"down records arrived {slot}",
        ]

    first = [*batch(0)[:4], "pinned", "pinned", *batch(0)[4:]]
    assert said[0] == first and said[1] == [line.replace(" 0", " 1") for line in first]
    assert said[2] == ["host waits for arrived 0", *batch(0)]
    assert said[3] == ["host waits for arrived 1", *batch(1)]
    cuda.said.clear()
    done += pipeline.drain()
    pipeline.close()
    assert cuda.said[:2] == ["host waits for arrived 0", "host waits for arrived 1"]
    assert cuda.said[2:] == ["host waits for up", "host waits for down"]
    for one, (pixels, array) in zip(done, batches, strict=True):
        assert np.array_equal(one.rows, expected(encoder, pixels, "int8", array))


def test_an_error_of_a_kernel_is_found_with_its_batch(encoder: VisionEncoder, cuda: Cuda) -> None:
    pipeline: Pipeline[int] = Pipeline(encoder, "int8", side_by_side=False)
    pipeline.put(inputs(2), "image", 0)
    pipeline.put(inputs(3, 1), "image", 1)

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    copies: Any = pipeline._copies
    next(iter(copies._events.values()))[2].synchronize = fail
    failed, done = pipeline.drain()
    assert "illegal memory access" in str(failed.failure) and done.failure is None
    assert np.array_equal(done.rows, expected(encoder, inputs(3, 1), "int8", "image"))
