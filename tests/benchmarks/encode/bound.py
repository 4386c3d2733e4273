"""Encode jobs beside what the cores allow: 1 / (t_encode + cpu_s_of_the_rest / cores), each measured alone.

    t_encode             seconds of an image in bare forward passes, which use all cores
    cpu_s_of_the_rest    processor time to read, hash, decode, fit, pack, write and commit an image

A GPU is a tower that sleeps: a batch takes the time it would take at 1,000 images/s. It leaves all cores to
decoding. What the decoders can deliver is measured with a process a core that reads, hashes, decodes and
fits, all at once, since they share caches and memory. Where that is below 1,000 images/s, it is the bound.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from encode.driver import resources
from encode.worker import process_decoder
from model.media.fit import InputFit
from model.quantize import pack
from model.vision import pipeline
from model.vision.config import DemoTowerConfig, EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vision.replay import Replay
from tests.benchmarks.bench import Requirements, take_turns
from tests.benchmarks.encode.jobs import (
    Jobs,
    Photos,
    Speed,
    decode_cpu_s,
    decoders_alone,
    encode_seconds,
    median,
    store_cpu_s,
    worker_speed,
)
from tests.benchmarks.encode.peer_loops import pixels_of

GPU_RATE = 1000
"""Images a second of the GPU that sleeps."""
SLEEPERS = 16
"""Decoding processes of a machine with this many cores, for which processes that sleep stand."""
SLEEP_S = 0.012
"""Seconds that one of them takes for an image."""

CHEAP = EncoderConfig(
    name="cheap",
    library="demo",
    activation="gelu",
    blocks=(1,),
    fit="pad",
    tower=DemoTowerConfig(image_size=336, patch_size=28, width=384, depth=2, heads=6),
)
"""A tower that takes about a fiftieth of ViT-L/14@336's time, for inputs of the same size."""

GPU = dataclasses.replace(
    CHEAP,
    name="gpu",
    blocks=(0,),
    pool_frame=1,
    tower=DemoTowerConfig(image_size=336, patch_size=168, width=64, depth=1, heads=1),
)
"""The entry of the tower that sleeps: the input of ViT-L/14@336, and rows that cost the host nothing."""

# The program of a decoding process that takes some time and no core.
SLEEPING_PROGRAM = f"""
import json, sys, time
path, *numbers = json.loads(sys.argv[1])
sys.path[:] = path
from encode.worker import decode_process
import numpy as np
from PIL import Image
grey = decode_process.DecodedImage(Image.new("RGB", (336, 336)))
pixels = np.full((336, 336, 3), 128, np.uint8)
def decode(fit, data):
    time.sleep({SLEEP_S})
    return grey
decode_process.InputFit.decode = decode
decode_process.InputFit.prepare = lambda fit, image: pixels
decode_process.main(*numbers)
"""


def vit_l() -> tuple[EncoderConfig, VisionEncoder]:
    """Return ViT-L/14@336 with random weights."""
    config = encoder_config("clip-vit-l14-336")
    return config, load_encoder(config, device="cpu", random_weights=True)


class SleepingEncoder(VisionEncoder):
    """Sleeps as long as a GPU computes. Its features are zeros."""

    rate = GPU_RATE

    def features(self, pixels: torch.Tensor, array: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Sleep, and return features of zeros."""
        time.sleep(len(pixels) / self.rate)
        spec = self.spec("fp16")
        features = torch.zeros(len(pixels), spec.tokens(array), spec.width)
        return features, torch.zeros(len(pixels), dtype=torch.int64)


class SleepingReplay(Replay):
    """What CUDA has recorded, packing included: a call of the host, one after the other on the GPU.

    A GPU has the calls in a queue, and begins the next when one ends, whatever the host does then.
    """

    lock = threading.Lock()
    free_s = 0.0
    """When the GPU will have nothing to do, monotonic seconds."""

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Sleep until the GPU has done it, and return the rows of the first batch."""
        with self.lock:
            if not self._outputs:
                self._outputs = self._work(x)
            ends_s = max(SleepingReplay.free_s, time.monotonic()) + len(x) / GPU_RATE
            SleepingReplay.free_s = ends_s
        time.sleep(max(0.0, ends_s - time.monotonic()))
        return self._outputs


def sleeping_encoder() -> VisionEncoder:
    """Return the tower that sleeps."""
    encoder = load_encoder(GPU, device="cpu")
    encoder.__class__ = SleepingEncoder
    return encoder


@dataclasses.dataclass(kw_only=True)
class Rounds:
    """What the rounds of one encoder measured."""

    name: str
    encode_s: list[float] = dataclasses.field(default_factory=list)
    decode_s: list[float] = dataclasses.field(default_factory=list)
    by_pillow_s: list[float] = dataclasses.field(default_factory=list)
    """What `decode_s` would be if Pillow resized."""
    store_s: list[float] = dataclasses.field(default_factory=list)
    speeds: dict[str, list[Speed]] = dataclasses.field(default_factory=dict)

    def bounds(self) -> list[float]:
        """Return the seconds of an image that the cores allow, by round."""
        cores = resources.cores()
        parts = zip(self.encode_s, self.decode_s, self.store_s, strict=True)
        return [encode + (decode + store) / cores for encode, decode, store in parts]

    def share(self, case: str, bounds: list[float] | None = None) -> float:
        """Return the median of bound / time of the rounds."""
        times = [speed.image_s for speed in self.speeds[case]]
        return statistics.median(
            bound / time for bound, time in zip(bounds or self.bounds(), times, strict=True)
        )

    def show(self) -> None:
        """Print the figures of the parts and of each case."""
        parts = self.encode_s, self.decode_s, self.by_pillow_s, self.store_s
        encode, decode, by_pillow, store = (1e3 * statistics.median(part) for part in parts)
        bound = statistics.median(self.bounds())
        print(
            f"{self.name}: encode {encode:.1f} ms of all cores; one core: decode {decode:.1f} ms "
            f"({by_pillow:.1f} if Pillow resizes), store {store:.2f} ms; "
            f"the cores allow {1 / bound:.1f} images/s",
            flush=True,
        )
        for case, speeds in self.speeds.items():
            speed = median(speeds)
            print(
                f"  {case:<34}{1 / speed.image_s:8.1f} images/s, start-up {speed.start_s:5.1f} s",
                flush=True,
            )


def measure_rounds(
    name: str,
    encoder: VisionEncoder,
    photos: Photos,
    cases: dict[str, Callable[[], Speed]],
    *,
    rounds: int,
    batches: int,
) -> Rounds:
    """Measure the parts and all cases in every round; the order of cases is reversed in every second one."""
    found = Rounds(name=name, speeds={case: [] for case in cases})
    for number in range(rounds):
        found.encode_s.append(encode_seconds(encoder, batches))
        found.decode_s.append(decode_cpu_s(encoder, photos.long))
        found.by_pillow_s.append(decode_cpu_s(encoder, photos.short, compiled=False))
        found.store_s.append(store_cpu_s(encoder, photos.folder / "alone", batches))
        for case in list(cases)[:: -1 if number % 2 else 1]:
            found.speeds[case].append(cases[case]())
    found.show()
    return found


class Pair:
    """Our job and a peer, one right after the other: the speed of a machine changes from minute to minute."""

    def __init__(self, ours: Callable[[], Speed], theirs: Callable[[], Speed]) -> None:
        """Measure nothing yet.

        Args:
            ours: measures our job.
            theirs: measures the peer.
        """
        self._ours, self._theirs = ours, theirs
        self.ratios: list[float] = []
        """The peer's time of an image over ours, of each turn."""

    def measure(self) -> Speed:
        """Measure both, the peer first in every second turn; return the peer's speed."""
        turn = [self._ours, self._theirs][:: -1 if len(self.ratios) % 2 else 1]
        speeds = {work: work() for work in turn}
        self.ratios.append(speeds[self._theirs].image_s / speeds[self._ours].image_s)
        return speeds[self._theirs]


def measure_vit_l(
    photos: Photos, paths: Sequence[Path], rounds: int, requirements: Requirements
) -> None:
    """Compare a job with ViT-L/14@336 on the CPU with its bound, and reduced decoding with whole.

    Args:
        photos: for the jobs.
        paths: more photographs, of which the large ones are decoded in both ways.
        rounds: turns of each case.
        requirements: printed as they are measured.
    """
    config, encoder = vit_l()
    jobs = Jobs(photos.folder / "vit-l", config, encoder)
    words = ("--device", "cpu", "--random-weights", "--workers", "0")
    cases = {"inline": lambda: photos.measure(lambda name: jobs.run(*_where(photos, name), *words))}
    found = measure_rounds("ViT-L/14@336", encoder, photos, cases, rounds=rounds, batches=3)
    requirements.at_least(
        "ViT-L/14@336 on the CPU, of what the cores allow", found.share("inline"), 0.97
    )
    measure_reduced(encoder, paths, rounds, requirements)


def measure_reduced(
    encoder: VisionEncoder, paths: Sequence[Path], rounds: int, requirements: Requirements
) -> None:
    """Compare `--decode reduced` with decoding whole, on the photographs that are large enough for it.

    The error of features is that of this encoder's weights; int8's is printed beside it.
    """
    whole = dataclasses.replace(encoder.input, compiled=True)
    whole.compile()
    reduced = dataclasses.replace(whole, reduces=True)
    large = []
    for path in paths:
        with Image.open(path) as image:
            if reduced.scale(*image.size) > 1:
                large.append(path.read_bytes())
    large = large[: 4 * encoder.spec("int8").batch_size]
    if not large:
        print("--decode reduced: no photograph is large enough", flush=True)
        return
    pixels: dict[str, list[npt.NDArray[np.uint8]]] = {}

    def decode(name: str, fit: InputFit) -> None:
        pixels[name] = [fit.prepare(fit.decode(data)) for data in large]

    ways = {"whole": whole, "reduced": reduced}
    taken = take_turns(
        {name: (lambda name=name, fit=fit: decode(name, fit)) for name, fit in ways.items()},
        rounds,
    )
    ratio = statistics.median(a / b for a, b in zip(taken["whole"], taken["reduced"], strict=True))
    features = {name: encoder.encode(np.stack(images)) for name, images in pixels.items()}
    lost = (features["reduced"] - features["whole"]).flatten(1).norm(dim=1)
    error = float((lost / features["whole"].flatten(1).norm(dim=1)).mean())
    int8 = float(pack(features["whole"], "int8").error.mean())
    print(
        f"--decode reduced: {len(large)} photographs; error of features {error:.4f}, int8's {int8:.4f}",
        flush=True,
    )
    requirements.at_least("--decode reduced, speed beside decoding whole", ratio, 1.0)


def measure_cheap(
    photos: Photos,
    rounds: int,
    peers: dict[str, Callable[[], Speed]],
    requirements: Requirements,
) -> None:
    """Compare jobs with a cheap tower, inline and over Ray, with their bound and with other libraries."""
    encoder = load_encoder(CHEAP, device="cpu")
    fit = dataclasses.replace(encoder.input, compiled=True)
    for path in photos.short[:8]:
        data = path.read_bytes()
        if not np.array_equal(pixels_of(encoder, data), fit.prepare(fit.decode(data))):
            raise SystemExit(f"{path}: the other libraries get other pixels than our jobs")
    inline = Jobs(photos.folder / "cheap", CHEAP, encoder)
    over_ray = Jobs(photos.folder / "cheap-ray", CHEAP)
    words = ("--device", "cpu", "--workers")

    def ray() -> Speed:
        # The start of Ray varies more than the jobs take.
        return worker_speed(photos, lambda name: over_ray.run(*_where(photos, name), *words, "2"))

    def ours() -> Speed:
        return photos.measure(lambda name: inline.run(*_where(photos, name), *words, "0"))

    pairs = {peer: Pair(ours, measure) for peer, measure in peers.items()}
    cases: dict[str, Callable[[], Speed]] = {
        "inline": ours,
        "over Ray, 2 workers": ray,
        **{peer: pair.measure for peer, pair in pairs.items()},
    }
    found = measure_rounds("cheap tower", encoder, photos, cases, rounds=rounds, batches=20)
    for case in ("inline", "over Ray, 2 workers"):
        requirements.at_least(
            f"cheap tower, {case}, of what the cores allow", found.share(case), 0.9
        )
    for peer, pair in pairs.items():
        ratio = statistics.median(pair.ratios)
        requirements.at_least(f"cheap tower, inline, speed beside {peer}", ratio, 1.0)


def measure_gpu(photos: Photos, many: Photos, rounds: int, requirements: Requirements) -> None:
    """Compare jobs of a GPU that sleeps with what the decoders deliver.

    Args:
        photos: for decoders that decode.
        many: small files, for decoders that sleep.
        rounds: turns of each case.
        requirements: printed as they are measured.
    """
    encoder = sleeping_encoder()
    jobs = Jobs(photos.folder / "gpu", GPU, encoder)
    words = ("--device", "cpu", "--workers", "0")
    torch.set_num_threads(pipeline.IN_FLIGHT)  # a thread for each batch in flight, which only waits

    def asleep() -> Speed:
        more = (*words, "--threads", str(SLEEPERS))
        with mock.patch.object(process_decoder, "PROGRAM", SLEEPING_PROGRAM):
            # A job probes one source in fifty, 200 at most, by decoders that do not sleep.
            return worker_speed(many, lambda name: jobs.run(*_where(many, name), *more))

    cases: dict[str, Callable[[], Speed]] = {
        "decoders alone, a process a core": lambda: decoders_alone(encoder, photos.long),
        "decoders on the cores": lambda: photos.measure(
            lambda name: jobs.run(*_where(photos, name), *words)
        ),
        f"{SLEEPERS} decoders that sleep": asleep,
    }
    with mock.patch.object(pipeline, "Replay", SleepingReplay):
        found = measure_rounds("GPU that sleeps", encoder, photos, cases, rounds=rounds, batches=3)
    gpu_s = 1 / GPU_RATE
    alone = found.speeds["decoders alone, a process a core"]
    delivered = [max(gpu_s, speed.image_s) for speed in alone]
    requirements.at_least(
        "GPU that sleeps, of what the decoders deliver",
        found.share("decoders on the cores", delivered),
        0.9,
    )
    sleepers = max(gpu_s, SLEEP_S / SLEEPERS)
    requirements.at_least(
        f"GPU that sleeps, of {1 / sleepers:.0f}/s by {SLEEPERS} decoders that sleep",
        found.share(f"{SLEEPERS} decoders that sleep", [sleepers] * rounds),
        0.9,
    )


def _where(photos: Photos, name: str) -> tuple[Path, int]:
    """Return the folder and the number of the photographs of a job."""
    return photos.folder / name, len(photos.short if name == "short" else photos.long)
