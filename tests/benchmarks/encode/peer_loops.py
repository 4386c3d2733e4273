"""One other library that encodes photographs, in a process of its own: `peers.py` starts this script.

The first argument names a function. Without input it imports the library alone; exit code 3: not installed.
With a job as JSON on standard input it encodes the first, the short and the long list of photographs, and
prints {"first": seconds, "short": seconds, "long": seconds}. Imports and loading the tower do not count.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MISSING = 3
BATCH = 8
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Run = Callable[[Sequence[str], Path], None]


def tower(config: dict[str, Any]) -> Any:
    """Return the tower of an entry, as our jobs have it."""
    from configs import build
    from model.vision.config import EncoderConfig
    from model.vision.encoder import load_encoder

    return load_encoder(build(EncoderConfig, config, "the benchmark"), device="cpu")


def pixels_of(encoder: Any, data: bytes) -> Any:
    """Decode an image with Pillow, as the examples of these libraries do, and fit it as our jobs do."""
    from PIL import Image

    return encoder.prepare(Image.open(io.BytesIO(data)).convert("RGB"))


def rows_of(encoder: Any, pixels: Any) -> Any:
    """Return the features of a batch, (B, M, V) float16."""
    return encoder.encode(pixels).half().cpu().numpy()


def dataloader(config: dict[str, Any] | None) -> Run | None:
    """A loop over torch's DataLoader with a process a core; each row is an .npy file."""
    import numpy as np
    from torch.utils.data import DataLoader, Dataset

    if config is None:
        return None
    encoder = tower(config)

    class Photos(Dataset):  # type: ignore[type-arg]
        def __init__(self, paths: Sequence[str]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int) -> Any:
            return number, pixels_of(encoder, Path(self.paths[number]).read_bytes())

    def run(paths: Sequence[str], folder: Path) -> None:
        for numbers, pixels in DataLoader(Photos(paths), BATCH, num_workers=CORES):
            rows = rows_of(encoder, pixels.numpy())
            for number, row in zip(numbers.tolist(), rows, strict=True):
                np.save(folder / f"{number}.npy", row)

    return run


def datasets(config: dict[str, Any] | None) -> Run | None:
    """`Dataset.map` in batches, in one process."""
    return _map(config, None)


def datasets_processes(config: dict[str, Any] | None) -> Run | None:
    """`Dataset.map` in batches, in a process a core, each with its own tower of one thread."""
    return _map(config, CORES)


def _map(config: dict[str, Any] | None, processes: int | None) -> Run | None:
    import datasets as library

    if config is None:
        return None
    library.disable_progress_bars()
    library.disable_caching()
    import numpy as np
    import torch

    encoder = tower(config)

    def step(batch: dict[str, list[Any]]) -> dict[str, Any]:
        if processes is not None:
            torch.set_num_threads(1)
        pixels = np.stack([pixels_of(encoder, Path(path).read_bytes()) for path in batch["path"]])
        return {"features": rows_of(encoder, pixels)}

    def run(paths: Sequence[str], folder: Path) -> None:
        spec = encoder.spec("fp16")
        shape = (spec.tokens("image"), spec.width)
        features = library.Features(
            {"path": library.Value("string"), "features": library.Array2D(shape, "float16")}
        )
        data = library.Dataset.from_dict({"path": list(paths)})
        data.map(
            step,
            batched=True,
            batch_size=BATCH,
            num_proc=processes,
            features=features,
            cache_file_name=str(folder / "features.arrow"),
            new_fingerprint=folder.name,
        )

    return run


def ray_data(config: dict[str, Any] | None) -> Run | None:
    """Ray Data: tasks decode, one actor encodes in `map_batches`, and the rows are written as Parquet."""
    import ray
    import ray.data

    if config is None:
        return None
    import numpy as np
    import torch

    class Encode:
        def __init__(self) -> None:
            torch.set_num_threads(CORES)
            self.encoder = tower(config)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            rows = rows_of(self.encoder, np.ascontiguousarray(batch["pixels"]))
            return {"path": batch["path"], "features": rows}

    encoder = tower(config)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        path = row["item"]
        return {"path": path, "pixels": pixels_of(encoder, Path(path).read_bytes())}

    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(paths: Sequence[str], folder: Path) -> None:
        data = ray.data.from_items(list(paths), override_num_blocks=max(2, len(paths) // 16))
        data = data.map(decode)
        data = data.map_batches(Encode, batch_size=BATCH, concurrency=1, num_cpus=1)
        data.write_parquet(str(folder))

    return run


def clip_retrieval(config: dict[str, Any] | None) -> Run | None:
    """clip-retrieval's Runner with its reader and its writer of .npy files; the mapper has our tower."""
    found = importlib.util.find_spec("clip_retrieval")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'clip_retrieval'")
    # Its own __init__ imports its server, its index and its client, with all that these need.
    folder_of_it = Path(found.origin).parent / "clip_inference"
    reader, runner, writer = (
        _module(folder_of_it / f"{n}.py") for n in ("reader", "runner", "writer")
    )
    if config is None:
        import fsspec  # noqa: F401  what its writer imports when it runs
        import pandas  # noqa: F401

        return None
    encoder = tower(config)

    class Mapper:
        def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
            rows = rows_of(encoder, item["image_tensor"].numpy())
            return {
                "image_embs": rows.reshape(len(rows), -1),
                "image_filename": item["image_filename"],
            }

    class NoLogger:  # its own starts a process and sends statistics to a service
        def start(self) -> None: ...

        def end(self) -> None: ...

        def __call__(self, stats: object) -> None: ...

    def run(paths: Sequence[str], folder: Path) -> None:
        images = folder / "images"
        images.mkdir()
        for path in paths:
            (images / Path(path).name).hardlink_to(path)
        parts = {"enable_text": False, "enable_image": True, "enable_metadata": False}
        runner.Runner(
            reader_builder=lambda sampler: reader.FilesReader(
                sampler,
                lambda image: encoder.prepare(image.convert("RGB")),
                None,
                str(images),
                BATCH,
                CORES,
                **parts,
            ),
            mapper_builder=Mapper,
            writer_builder=lambda number: writer.NumpyWriter(
                partition_id=number,
                output_folder=str(folder / "out"),
                output_partition_count=1,
                **parts,
            ),
            logger_builder=lambda number: NoLogger(),
            output_partition_count=1,
        )(0)

    return run


def _module(path: Path) -> Any:
    """Import one file of a package without the package."""
    spec = importlib.util.spec_from_file_location(f"one_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    peer = globals()[sys.argv[1]]
    try:
        peer(None)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    text = sys.stdin.read()
    if not text:
        return
    job = json.loads(text)
    run = peer(job["encoder"])
    taken = {}
    for name in ("first", "short", "long"):
        folder = Path(job["folder"]) / f"{sys.argv[1]}-{name}"
        folder.mkdir(parents=True)
        started = time.perf_counter()
        run(job[name], folder)
        taken[name] = time.perf_counter() - started
        shutil.rmtree(folder)
    print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main()
