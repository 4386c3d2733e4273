"""Decoding in a process: equal to decoding in a thread, and no crash, hang or kill harms more than one item.

decoder = ProcessDecoder(Setup(fit=InputFit.of(spec)), 120.0, lambda: True)
decoder.take(item)
decoder.needed(), decoder.image()
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache.store.ledger import MediaRecord
from encode.sources.demo_drawings import DemoWorld
from encode.sources.demo_videos import draw_video
from encode.worker import process_decoder
from encode.worker.decode_log import DecodeLog
from encode.worker.decode_process import SLOTS, DecodeImage, Load, LoadImages, Request, Setup
from encode.worker.decoders import NICE_BESIDE_GPU, Decoded, Decoder, ThreadDecoder, setup_for
from encode.worker.media_item import EncoderInput, MediaItem
from encode.worker.messages import SourceTask
from encode.worker.prefetch import BUNCH_BYTES, Prefetcher
from encode.worker.process_decoder import DecodeProcessError, ProcessDecoder
from model.media.fit import InputFit
from model.media.images import BadMediaError
from model.vision.encoder import load_encoder
from tests.support.encode_jobs import CONFIG, draw
from tests.support.photos import image_files

FIT = InputFit(size=28, fit="pad", mean=(0.1, 0.5, 0.9), shorter_side=28)
SETUP = Setup(fit=FIT)
ODD = """
import json, os, signal, sys, time
from pathlib import Path
path, *numbers = json.loads(sys.argv[1])
sys.path[:] = path
from encode.worker import decode_process
first = Path({flag!r})
prepare = decode_process.InputFit.prepare
def odd(self, image):
    side = getattr(image, "image", image).width
    if side == 31:
        os.kill(os.getpid(), signal.SIGSEGV)
    elif side == 32:
        time.sleep(600)
    elif side == 33:
        os.kill(os.getpid(), signal.SIGKILL)
    elif side == 34:
        raise RuntimeError("no memory\\nfor it")
    elif side == 35 and not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif side == 36:
        count = len(first.read_text()) if first.exists() else 0
        first.write_text("." * (count + 1))
        if count == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
    elif side == 37:
        os.write(numbers[1], b"\\xff" * 64)
        time.sleep(600)
    elif side == 38:
        answer = decode_process.Found(width=1, height=1, duration_s=1.0, note=None)
        decode_process.Channel(decode_process.socket.socket(fileno=os.dup(numbers[1]))).send(answer)
    return prepare(self, image)
decode_process.InputFit.prepare = odd
decode_process.main(*numbers)
"""
"""A process that behaves as the width of an image says."""

Start = Callable[..., ProcessDecoder]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    made: list[ProcessDecoder] = []

    def make(*, odd: bool = False, timeout_s: float = 60.0, **values: Any) -> ProcessDecoder:
        if odd:
            program = ODD.format(flag=str(tmp_path / "flag"))
            monkeypatch.setattr(process_decoder, "PROGRAM", program)
        made.append(ProcessDecoder(values.get("setup", SETUP), timeout_s, lambda: True))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


def item_of(data: bytes | Path, kind: str = "image") -> MediaItem:
    task = SourceTask(source=str(data) if isinstance(data, Path) else "/some", kind=kind)
    record = MediaRecord(source=task.source, kind=kind, key="0" * 64)
    return MediaItem(task=task, record=record, data=data)


def square(folder: Path, side: int) -> MediaItem:
    (path,) = draw(folder / str(side), 1, side=side)
    return item_of(path.read_bytes())


def outcome(decoder: Decoder, item: MediaItem) -> object:
    """Return all that decoding an item gives, as values that can be compared."""
    decoder.take(item)
    needed = decoder.needed()
    try:
        if item.task.kind == "image":
            size, decoded = decoder.size(), decoder.image()
            return needed, size, decoded.size, decoded.note, decoded.pixels.tobytes()
        info = decoder.probe()
        wanted = [0, 700_000, 1_000_000, 1_000_000, 9_000_000]
        found = [(f.wanted_us, f.time_s, f.pixels.tobytes()) for f in decoder.frames(wanted)]
        return needed, info, found, [f.wanted_us for f in decoder.frames(wanted[3:])]
    except BadMediaError as error:
        return needed, error.failure


@pytest.mark.parametrize("compiled", [False, True])
def test_a_process_gives_what_a_thread_gives(compiled: bool, start: Start, tmp_path: Path) -> None:
    files = image_files()
    files["cut"] = files["jpeg"][:-2]
    files["damaged"] = files["png"][: len(files["png"]) // 2]
    files["nothing"] = b""
    files["large"] = Image.effect_noise((900, 700), 90).tobytes() * 2  # beyond a socket's buffer
    video = draw_video(DemoWorld(images=9, side=24, video_frames=7), 0)
    path = tmp_path / "vidéo \udce9.y4m"  # no valid UTF-8
    path.write_bytes(video)
    items = [item_of(data) for data in files.values()]
    items += [item_of(video, "video"), item_of(path, "video"), item_of(b"text", "video")]
    process = start(setup=Setup(fit=replace(FIT, compiled=compiled)))
    thread = ThreadDecoder(FIT.decode, FIT.prepare)
    for item in items:
        assert outcome(process, item) == outcome(thread, item)
    assert process._process is not None and process._process.poll() is None, "one did them all"


def test_the_encoder_input_is_that_of_the_encoder() -> None:
    """A process decodes and fits by the spec of the space, which is what the encoder's entry says."""
    recipes: list[dict[str, Any]] = [
        {"fit": "pad", "mean": (0.2, 0.4, 0.9)},
        {"fit": "squash"},
        {"fit": "crop", "shorter_side": 40, "decode": "reduced"},
    ]
    for values in recipes:
        config = replace(CONFIG, encoder=replace(CONFIG.encoder, **values), decode_apart=True)
        encoder = load_encoder(config.encoder, device="cpu")
        setup = setup_for(config, encoder.spec("int8"), "cpu")
        assert setup is not None and setup.nice == 0
        assert setup.fit == encoder.input
        many = setup_for(replace(config, compiled=True), encoder.spec("int8"), "cpu")
        assert many is not None and many.fit == replace(encoder.input, compiled=True)
    assert setup_for(CONFIG, encoder.spec("int8"), "cpu") is None


def test_an_image_that_crashes_its_process_twice_has_failed_and_the_next_one_has_not(
    start: Start, tmp_path: Path
) -> None:
    decoder = start(odd=True)
    for side in (31, 24, 31):
        decoder.take(square(tmp_path, side))
        assert decoder.needed() > 0
        if side == 24:
            assert decoder.image().size == (24, 24)
            continue
        with pytest.raises(BadMediaError) as bad:
            decoder.image()
        assert bad.value.stage == "decode"
        assert bad.value.reason == (
            "crashed the process that decodes it, also at a second try (SIGSEGV)"
        )


def test_an_image_that_hangs_its_process_twice_has_failed(start: Start, tmp_path: Path) -> None:
    decoder = start(odd=True, timeout_s=0.6)
    decoder.take(square(tmp_path, 32))
    decoder.needed()
    with pytest.raises(BadMediaError, match="hung the process that decodes it, also at a second"):
        decoder.image()


def test_a_process_that_waits_for_a_core_does_not_hang(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps in this test; what the kernel says it has used of a core is replaced."""
    decoder = start(odd=True)
    decoder.take(square(tmp_path, 32))
    decoder.needed()
    decoder._timeout_s = 0.12
    monkeypatch.setattr(process_decoder, "POLL_S", 0.05)
    used = itertools.chain([5.0, 5.001, 5.002, 9.0], itertools.count(100, 100))
    seen: list[float] = []

    def core_s(process: int) -> float:
        seen.append(next(used))
        return seen[-1]

    monkeypatch.setattr(process_decoder, "_core_s", core_s)
    with pytest.raises(BadMediaError, match=r"hung .* \(no progress for 0 s\)"):
        decoder.image()
    assert 9.0 in seen, "it counted as hanging only once it had had a core"
    monkeypatch.undo()
    assert decoder._process is None
    mine = process_decoder._core_s(os.getpid())  # this thread runs
    assert sys.platform != "linux" or (mine is not None and mine > 0)
    assert process_decoder._core_s(2**30) is None


def test_a_killed_process_is_no_fault_of_the_image(start: Start, tmp_path: Path) -> None:
    decoder = start(odd=True)
    decoder.take(square(tmp_path, 35))
    decoder.needed()
    assert decoder.image().size == (35, 35), "killed once, then decoded"
    decoder.take(square(tmp_path, 33))
    decoder.needed()
    with pytest.raises(DecodeProcessError, match=r"killed 3 times \(SIGKILL\); .*--threads N"):
        decoder.image()
    decoder.take(square(tmp_path, 34))
    decoder.needed()
    with pytest.raises(DecodeProcessError, match="RuntimeError: no memory for it"):
        decoder.image()


def test_a_process_out_of_control_counts_as_crashed(start: Start, tmp_path: Path) -> None:
    decoder = start(odd=True)
    for side in (37, 38):
        decoder.take(square(tmp_path, side))
        decoder.needed()
        with pytest.raises(BadMediaError, match="crashed the process that decodes it"):
            decoder.image()


def test_a_video_goes_on_behind_the_frame_that_crashed_its_process(
    start: Start, tmp_path: Path
) -> None:
    data = draw_video(DemoWorld(images=9, side=36, video_frames=7), 0)
    wanted = [0, 500_000, 1_000_000, 1_500_000, 2_000_000]
    found = []
    for decoder in (start(odd=True), ThreadDecoder(FIT.decode, FIT.prepare)):
        decoder.take(item_of(data, "video"))
        decoder.needed()
        assert decoder.probe().duration_s == 3.0
        found.append([(f.wanted_us, f.time_s, f.pixels.tobytes()) for f in decoder.frames(wanted)])
    assert found[0] == found[1] and len(found[0]) == 5
    assert len((tmp_path / "flag").read_text()) == 6, "the third of them was tried twice"


def test_frames_that_nobody_takes_end_the_process(start: Start) -> None:
    decoder = start()
    decoder.take(item_of(draw_video(DemoWorld(images=9, side=24, video_frames=9), 0), "video"))
    decoder.needed()
    decoder.probe()
    for _frame in decoder.frames([0, 500_000, 1_000_000, 1_500_000]):
        break
    assert decoder._process is None


def test_a_program_that_does_not_start_is_no_fault_of_the_image(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = start()
    monkeypatch.setattr(process_decoder, "PROGRAM", "raise SystemExit(3)")
    decoder.take(square(tmp_path, 24))
    with pytest.raises(DecodeProcessError, match=r"does not start \(exit code 3\)"):
        decoder.needed()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_process_ends_with_what_started_it_also_while_it_hangs(
    start: Start, tmp_path: Path
) -> None:
    decoder = start(odd=True)
    decoder.take(square(tmp_path, 32))

    def work() -> None:
        decoder.needed()
        decoder._send(DecodeImage())

    starter = threading.Thread(target=work)
    starter.start()
    starter.join(60)
    process = decoder._process
    assert process is not None
    assert process.wait(20) == -signal.SIGKILL
    decoder._end()


def test_a_process_keeps_the_memory_that_it_frees(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "kept"
    program = f"""
import json, pathlib, sys
path, *numbers = json.loads(sys.argv[1])
sys.path[:] = path
from encode.worker import decode_process
decode_process.keep_memory = pathlib.Path({str(flag)!r}).touch
decode_process.main(*numbers)
"""
    monkeypatch.setattr(process_decoder, "PROGRAM", program)
    decoder = start()
    decoder.take(square(tmp_path, 24))
    assert not flag.exists()
    decoder.needed()
    assert flag.exists()


def test_processes_yield_to_the_thread_that_feeds_a_gpu(start: Start, tmp_path: Path) -> None:
    lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE_BESIDE_GPU)
    decoder = start(setup=Setup(fit=FIT, nice=NICE_BESIDE_GPU))
    decoder.take(square(tmp_path, 24))
    decoder.needed()
    assert decoder._process is not None
    assert os.getpriority(os.PRIO_PROCESS, decoder._process.pid) == lower


class Reserving:
    """What a prefetcher asks of a worker that encodes everything."""

    def reserve(self, ids: list[str]) -> list[bool]:
        return [True] * len(ids)

    def our_error(self, error: Exception) -> str:
        return str(error)


@contextlib.contextmanager
def prefetching(folder: Path, ahead: int = 8, timeout_s: float = 60.0) -> Iterator[Prefetcher]:
    """Open a prefetcher that decodes in processes, with two threads."""
    log = DecodeLog(folder / "worker.decoding", threads=2)
    config = replace(CONFIG, timeout_s=timeout_s)
    prefetcher = Prefetcher(Reserving(), config, log, ahead=ahead, batch_size=2, apart=SETUP)  # type: ignore[arg-type]
    try:
        yield prefetcher
    finally:
        prefetcher.close()
        log.close()


def delivered(
    prefetcher: Prefetcher, paths: Sequence[Path]
) -> list[tuple[EncoderInput | None, MediaItem]]:
    """Put files and return, for each item in the order of its arrival, its encoder input and itself."""
    for path in paths:
        prefetcher.put(SourceTask(source=str(path)))
    found: list[tuple[EncoderInput | None, MediaItem]] = []
    only = None
    while len(found) < len(paths):
        one = prefetcher.get(timeout_s=100)
        assert one is not None, f"nothing follows {len(found)} items"
        if isinstance(one, EncoderInput):
            only = one
        else:
            found.append((only, one))
            only = None
    return found


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that are sent to processes, in order."""
    requests: list[Request] = []
    send = ProcessDecoder._send

    def recorded(decoder: ProcessDecoder, request: Request, *data: bytes) -> None:
        requests.append(request)
        send(decoder, request, *data)

    monkeypatch.setattr(ProcessDecoder, "_send", recorded)
    return requests


def test_a_prefetcher_asks_once_for_an_image_that_needs_little_memory(
    tmp_path: Path, sent: list[Request]
) -> None:
    (path,) = draw(tmp_path, 1)
    for little, more in ((1 << 20, []), (10, [Load, DecodeImage])):
        sent.clear()
        with prefetching(tmp_path) as prefetcher:
            prefetcher._budget.little = little
            ((only, item),) = delivered(prefetcher, [path])
        assert only is not None and item.failure is None
        assert [type(one) for one in sent] == [Setup, LoadImages, *more]


def test_images_that_are_decoded_together_are_what_they_are_alone(start: Start) -> None:
    files = image_files()
    files["cut"] = files["jpeg"][:-2]
    files["damaged"] = files["png"][: len(files["png"]) // 2]
    files["nothing"] = b""
    files["large"] = Image.effect_noise((900, 700), 90).tobytes() * 2  # beyond a socket's buffer
    items = [item_of(data) for data in files.values()]
    alone, together = start(), start()
    kinds = set()
    for at in range(0, len(items), SLOTS):
        some = items[at : at + SLOTS]
        for item, found in zip(some, together.images(some, 4 << 20), strict=True):
            alone.take(item)
            kinds.add(type(found))
            if found is None:
                assert alone.needed() > 4 << 20
            elif isinstance(found, Exception):
                with pytest.raises(type(found), match=re.escape(str(found))):
                    alone.needed(), alone.image()
            else:
                one = alone.image()
                assert (found.size, found.note) == (one.size, one.note)
                assert np.array_equal(found.pixels, one.pixels)
    assert {Decoded, BadMediaError} <= kinds
    assert together.images(items[:2], 1) == [None, None], "each needs more"
    together.take(items[0])  # nothing is left of them
    assert together.needed() > 1


def test_images_that_lose_their_process_are_each_to_be_taken_alone(
    start: Start, tmp_path: Path
) -> None:
    decoder = start(odd=True)
    assert decoder.images([square(tmp_path, side) for side in (24, 31)], 1 << 20) == [None, None]
    (found,) = decoder.images([square(tmp_path, 26)], 1 << 20)
    assert isinstance(found, Decoded)


def test_a_prefetcher_sends_small_images_together_and_keeps_their_order(
    tmp_path: Path, sent: list[Request]
) -> None:
    paths = [draw(tmp_path / str(side), 1, side=side)[0] for side in range(40, 61)]
    large = tmp_path / "large.png"
    Image.effect_noise((1200, 1200), 90).save(large)
    assert large.stat().st_size > BUNCH_BYTES
    paths.insert(7, large)
    with prefetching(tmp_path, ahead=1) as prefetcher:
        # Turns, and a queue that is full at once, must not wait for each other.
        prefetcher._budget.little, prefetcher._budget.total = 9000, 1
        found = delivered(prefetcher, paths)
    assert [item.task.source for _, item in found] == [str(path) for path in paths]
    for path, (only, item) in zip(paths, found, strict=True):
        assert only is not None and only.item is item and item.failure is None
        decoded = FIT.decode(path.read_bytes())
        assert np.array_equal(only.pixels, FIT.prepare(decoded))
        assert (item.record.width, item.record.height) == decoded.size
    together = [len(one.sizes) for one in sent if isinstance(one, LoadImages)]
    assert together and max(together) == SLOTS
    assert next(one.nbytes for one in sent if isinstance(one, Load)) > 0, "what needs more, alone"


def test_what_cannot_be_read_keeps_its_place_among_images_decoded_together(tmp_path: Path) -> None:
    paths = [draw(tmp_path / str(side), 1, side=side)[0] for side in range(40, 46)]
    paths.insert(1, tmp_path / "missing.png")
    with prefetching(tmp_path) as prefetcher:
        found = delivered(prefetcher, paths)
    assert [item.task.source for _, item in found] == [str(path) for path in paths]
    assert [item.failure is not None for _, item in found] == [False, True, *5 * [False]]
    assert all((only is None) == (item.failure is not None) for only, item in found)


@pytest.mark.parametrize("side", [31, 32, 33, 34, 37])
def test_an_image_harms_none_that_it_is_decoded_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[Request], side: int
) -> None:
    monkeypatch.setattr(process_decoder, "PROGRAM", ODD.format(flag=str(tmp_path / "flag")))
    sides = [24, 25, side, 26]
    paths = [draw(tmp_path / str(one), 1, side=one)[0] for one in sides]
    with prefetching(tmp_path, timeout_s=2.0 if side == 32 else 60.0) as prefetcher:  # 32 hangs
        found = delivered(prefetcher, paths)
    assert any(isinstance(one, LoadImages) for one in sent)
    failed = [item.task.source for _, item in found if item.failure is not None]
    assert failed == [str(paths[2])]
    assert [only is not None for only, _ in found] == [True, True, False, True]


def test_a_prefetcher_closes_while_a_process_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_decoder, "PROGRAM", ODD.format(flag=str(tmp_path / "flag")))
    good, bad = (draw(tmp_path / str(side), 1, side=side)[0] for side in (24, 32))
    with prefetching(tmp_path) as prefetcher:
        ((only, _),) = delivered(prefetcher, [good])
        assert only is not None and only.pixels.shape == (28, 28, 3)
        prefetcher.put(SourceTask(source=str(bad)))
        time.sleep(0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 10
