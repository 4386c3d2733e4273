"""The estimates of a plan against what the jobs then took: images, clips and URLs.

python -m tests.benchmarks.scale.estimates                       # about 5 minutes on two cores
python -m tests.benchmarks.scale.estimates --images 300 --clips 20 --urls 300

Photographs of 300 to 1,600 pixels, clips of 2 to 20 seconds cut from two films, and photographs on a server
of this machine that takes 0.1 to 0.5 seconds for each, and lacks one in ten. Each kind is planned and then
encoded, by commands as a user gives them. A figure is right within a third.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, run
from tests.support import ROOT
from tests.support.photos import make_folder
from tests.support.videos import BIKES, BUNNY, ffmpeg

OFF = 1 / 3
"""Share by which an estimate may be off."""

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
SIZES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
MISSING = 10
"""The server lacks one in this many of its images."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    images: int = 1500
    """Images on the disk."""
    clips: int = 60
    """Video clips."""
    urls: int = 800
    """Images on the server."""
    encoder: str = "demo"
    """Entry of configs/encoders.yaml."""


def originals() -> list[Image.Image]:
    """Return photographs."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        names = ("astronaut.jpg", "china.jpg", "flower.jpg", "rocket.jpg", "chelsea.webp")
        return [Image.open(Path(folder) / name).convert("RGB") for name in names]


def photographs(count: int, seed: int) -> Iterator[bytes]:
    """Yield different JPEGs of mixed sizes."""
    dice, images = random.Random(seed), originals()
    for _ in range(count):
        image = dice.choice(images)
        width, height = image.size
        left, top = dice.randrange(width // 3), dice.randrange(height // 3)
        part = image.crop((left, top, left + width * 2 // 3, top + height * 2 // 3))
        scale = dice.randrange(300, 1600) / part.width
        part = part.resize((int(part.width * scale), int(part.height * scale)))
        file = io.BytesIO()
        part.save(file, "JPEG", quality=dice.randrange(75, 95))
        yield file.getvalue()


def make_images(folder: Path, count: int) -> None:
    """Write photographs."""
    folder.mkdir()
    for number, data in enumerate(photographs(count, 0)):
        (folder / f"{number:05d}.jpg").write_bytes(data)


def make_clips(folder: Path, count: int) -> None:
    """Write clips of mixed lengths and sizes."""
    folder.mkdir()
    dice = random.Random(1)
    jobs: list[list[str | Path]] = []
    for number in range(count):
        film, length, loops = dice.choice([(BIKES, 10.0, 2), (BUNNY, 5.2, 4)])
        seconds = dice.uniform(2, 20)
        start, width = dice.uniform(0, length / 2), dice.choice([240, 320, 480, 640])
        cut = (
            f"-stream_loop {loops} -ss {start:.2f} -i {film} -t {seconds:.2f} -an -preset ultrafast"
        )
        jobs.append([*cut.split(), "-vf", f"scale={width}:-2", folder / f"{number:04d}.mp4"])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda words: ffmpeg(*words), jobs))


@contextmanager
def server(count: int) -> Iterator[list[str]]:
    """Serve photographs slowly; yield their URLs."""
    bodies = list(photographs(count, 2))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = int(self.path[1:].partition(".")[0])
            time.sleep(0.1 + 0.4 * random.Random(number).random())
            if number % MISSING == 0:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(bodies[number])))
            self.end_headers()
            self.wfile.write(bodies[number])

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        try:
            base = f"http://127.0.0.1:{found.server_address[1]}"
            yield [f"{base}/{number}.jpg" for number in range(count)]
        finally:
            found.shutdown()


def command(*words: str) -> str:
    """Run encode.run; return what it printed."""
    line = [sys.executable, "-m", "encode.run", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stdout}{done.stderr}")
    return done.stdout


def seconds_of(text: str) -> float:
    """Return the seconds of a duration as it is printed."""
    return sum(float(n) * UNITS[unit] for n, unit in re.findall(r"(\d+) (s|min|h|d)\b", text))


def planned(out: str) -> tuple[float, float, str]:
    """Return the seconds and bytes of a printed plan, and its line of time."""
    time_line = next(line for line in out.splitlines() if line.startswith("time "))
    disk = re.search(r"^disk     (?:about |at most )?([\d.]+) (B|kB|MB|GB)", out, re.MULTILINE)
    assert disk is not None, out
    return (
        seconds_of(time_line.partition("(")[0]),
        float(disk[1]) * SIZES[disk[2]],
        time_line,
    )


def compare(name: str, words: tuple[str, ...], folder: Path, requirements: Requirements) -> None:
    """Plan a job, run it, and compare."""
    features = folder / f"cache-{name}"
    words = (*words, "--features", str(features))
    estimated_s, estimated_bytes, line = planned(command(*words, "--plan"))
    out = command(*words)
    closing = re.search(r"encoded=\d+ .* bound=(\w+) seconds=([\d.]+)", out)
    assert closing is not None, out
    stored = sum(p.stat().st_size for p in (features / "spaces").rglob("*") if p.is_file())
    print(f"  {line}\n  took     {closing[2]} s, bound by {closing[1]}", flush=True)
    off_s = abs(estimated_s / float(closing[2]) - 1)
    requirements.at_most(f"{name}: estimate of seconds, off by", off_s, OFF)
    off_bytes = abs(estimated_bytes / stored - 1)
    requirements.at_most(f"{name}: estimate of bytes, off by", off_bytes, OFF)


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Compare the estimates of three jobs with what they take."""
    common = ("--encoder", options.encoder, "--device", "cpu")
    if options.images:
        make_images(folder / "images", options.images)
        compare("images", ("--dataset", f"folder:{folder}/images", *common), folder, requirements)
    if options.clips:
        make_clips(folder / "clips", options.clips)
        compare("clips", ("--dataset", f"folder:{folder}/clips", *common), folder, requirements)
    if options.urls:
        with server(options.urls) as urls:
            lines = [json.dumps({"image": url, "caption": "A photograph."}) for url in urls]
            (folder / "urls.jsonl").write_text("\n".join(lines))
            words = ("--dataset", f"json:{folder}/urls.jsonl", "--allow-private", *common)
            compare("urls", words, folder, requirements)


if __name__ == "__main__":
    run("scale.estimates", __doc__, measure, Options)
