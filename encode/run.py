"""Encode data sets into the feature cache: each image once, however many data sets and runs use it.

python -m encode.run --dataset demo --encoder demo            # a laptop, offline, 20 seconds
python -m encode.run --dataset folder:photos                  # your images and videos, CLIP ViT-L/14@336
python -m encode.run --dataset json:llava.json --media images # conversations that name their images
python -m encode.run --dataset folder:photos --encoder hf:dinov2-small    # a tower of transformers
python -m encode.run --dataset pixmo                          # from the hub's lists and the open web
python -m encode.run --dataset pixmo --source lists           # from lists/pixmo-cap/data/*.parquet, ...
python -m encode.run --dataset pixmo --retry-failed           # try again what failed
python -m encode.run --dataset pixmo-cap --sample 1000        # 1,000 samples, spread over the data set
python -m encode.run --dataset folder:photos --format webdataset    # shards are tars
python -m encode.run --dataset folder:photos --block 19 --tail      # the last blocks are trained later
python -m encode.run --dataset folder:photos demo --plan      # print what it would cost, and stop
python -m encode.run --dataset folder:photos --ray-address auto     # on all nodes of a Ray cluster
python -m encode.run --check 50                               # encode 50 media again, compare with the stored
python -m encode.run --list                                   # data sets by name, with their sizes

A job may be killed at any moment. The same command continues it, and does nothing once all is done.
Exit 0: every image is in the space or, with its reason, in the ledger (python -m cache.ls --failures).
1: --check found rows that differ. 2: an error that you can fix, in one line. 130: interrupted; what was
encoded is kept.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import configs
from cache.errors import CacheError
from cache.format.frame_sampling import MAX_FRAMES
from cache.maintenance.local_media import LocalMedia, remember
from cache.store.files import disk_full
from cache.store.locks import DriverLock, holder_text
from cache.store.paths import CacheRoot
from configs.command_line import CommandLine
from configs.hardware import keep_memory
from configs.signals import Interrupts, importing
from encode.datasets import Reading, listing, parts, read_datasets
from encode.download.config import DownloadConfig
from encode.driver.cluster import LOCAL, cluster_address
from encode.driver.progress import OnProgress
from encode.fetch_only import fetch_only
from encode.sources.catalogue import Dataset, choose, open_datasets
from encode.worker.config import WorkerConfig, spin_briefly
from model.vision.config import encoder_config

if TYPE_CHECKING:
    from encode.driver.nodes import NodeLayouts

DEFAULT_ENCODER = "clip-vit-l14-336"
STOPPING = "stopping: what is encoded is committed first; Ctrl-C again ends at once\n"
COUNTS = ("max_frames", "connections", "connections_per_host", "fetch_tries")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Encode data sets into the feature cache."""

    dataset: tuple[str, ...] = ()
    """Data sets: a name or group (see --list), or folder:PATH, json:FILE, hf:ORG/NAME[:CONFIG],
    webdataset:GLOB, each also as NAME=folder:PATH. May be repeated."""
    encoder: str = DEFAULT_ENCODER
    """Vision tower: an entry of configs/encoders.yaml, or hf:FOLDER (hf:ORG/NAME of the hub) with CLIP,
    SigLIP, DINOv2 or DINOv3 as transformers saves them, also in a LLaVA: the blocks that it names, else the
    last but one."""
    codec: Literal["int8", "int4", "fp16"] = "int8"
    """How rows are stored: int8 takes half of fp16, error 0.5 %; int4 a quarter, 5-8 % (CLIP: unproven)."""
    format: Literal["zarr", "webdataset"] = "zarr"
    """Format of a shard: part of a Zarr v3 array, or a tar that the webdataset library streams."""
    pool: int | None = None
    """Average n x n patches of an image before storing. Default: the encoder's entry."""
    frame_pool: int | None = None
    """Average n x n patches of a video's frame before storing. Default: the encoder's entry."""
    decode: Literal["whole", "reduced"] | None = None
    """reduced: decode a JPEG far larger than the encoder's input at 1/2, 1/4 or 1/8 of its size. Faster, with
    other features, so another space. Default: the encoder's entry, else whole."""
    block: int | None = None
    """With --tail: the block (from 0) whose output is stored, unpooled and with CLS."""
    tail: bool = False
    """Store what --block N puts out, and once the blocks behind it, up to the features: train.run
    --train-vision-blocks trains these, drops CLS and pools. Rows are larger: see --plan."""
    features: Path = Path("cache")
    """Folder of the feature cache."""
    source: Path | None = None
    """Folder of downloaded lists or data sets, one folder a data set (PixMo, hf:), instead of the hub."""
    media: Path | None = None
    """Folder of the media that a data set names (json:, hf:). Default: the folder of its file. With --check:
    a folder of media of the cache that were not encoded on this machine, or have moved."""
    config: Path | None = None
    """Your own data sets and encoders, over ours. Default: nanomolmo2.yaml in this folder, if any."""
    max_frames: int = MAX_FRAMES
    """Frames of one video, at most: 2 a second, or this many evenly spaced if the video is longer."""
    keep_media: Path | None = None
    """Folder that keeps downloads. A file in it is not downloaded again."""
    fetch_only: bool = False
    """Download into --keep-media, and stop. No encoder is loaded."""
    retry_failed: bool = False
    """Try again the sources that the ledger records as failed."""
    allow_private: bool = False
    """Also download from private networks and from this machine."""
    connections: int = DownloadConfig.connections
    """Largest number of simultaneous downloads of all workers."""
    connections_per_host: int = DownloadConfig.per_host
    """Largest number of simultaneous downloads from one host."""
    fetch_timeout_s: float = DownloadConfig.read_s
    """Seconds without data before a download times out. The total limit is three times this."""
    fetch_tries: int = DownloadConfig.tries
    """Attempts for a URL whose failure may be temporary."""
    limit: int | None = None
    """Take only the first N samples of each data set. Until it is encoded again, the cache has only these."""
    sample: int | None = None
    """Take only N samples of each data set, spread over it: the same ones each time. Reads it twice."""
    seed: int = 0
    """Which samples --sample takes."""
    bad_lines: Literal["refuse", "leave-out"] = "refuse"
    """Lines that would lose text or media: refuse the data set, or leave-out: go on without them."""
    ignore_keys: str = ""
    """Keys of lines that are counted and not used, separated by commas. A key inside another is named by its
    path: hint,messages.reasoning_content."""
    rehash: bool = False
    """Read every file again, even if its size, times and inode are unchanged."""
    check: int | None = None
    """Encode N media of the cache again, compare with the stored rows, and stop. Uses files on this disk and
    those in --keep-media, of all data sets if none is named."""
    check_urls: bool = False
    """With --check, also download media that are not on this disk."""
    plan: bool = False
    """Print what the job would do and cost, and stop. Writes nothing."""
    list: bool = False
    """Print the data sets by name, with their sizes, and stop."""
    random_weights: bool = False
    """Use untrained weights: to try commands without a download, never for features to train on."""
    weights: str | None = None
    """File or folder with the encoder's weights, instead of the hub."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int | Literal["auto"] = "auto"
    """Worker processes, on a cluster of all nodes; 0: encode in this process, without Ray. auto: one for each
    GPU; on CPUs one for 8 cores, but on one machine 0 for jobs under 2 minutes."""
    ray_address: str | None = None
    """Ray cluster to encode on: HOST:PORT, auto (this machine is a node of it) or local (none).
    Default: RAY_ADDRESS, which `ray job submit` sets, else local."""
    threads: int | None = None
    """Reading threads of each worker, and as many that decode (processes, in jobs of over 10 seconds).
    Default: by the number of cores."""
    timeout_s: float = 120.0
    """Seconds without progress after which decoding a file counts as hanging. What decodes it is replaced,
    and the file is retried once."""
    commit_every_s: float = WorkerConfig.commit_every_s
    """Seconds after which a shard is committed although it is not full: the most work a crash can lose."""

    def __post_init__(self) -> None:
        for name in (*COUNTS, "pool", "frame_pool", "limit", "sample", "threads", "check"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if self.tail != (self.block is not None):
            raise ValueError(
                "--block N and --tail go together: which block is stored, and that training computes the rest"
            )
        if self.limit is not None and self.sample is not None:
            raise ValueError(
                "--limit takes the first samples, --sample some of all: use one of them"
            )
        if isinstance(self.workers, int) and self.workers < 0:
            raise ValueError(f"--workers {self.workers}: must be 0 or more, or auto")
        if min(self.timeout_s, self.fetch_timeout_s) <= 0 or self.commit_every_s < 0:
            raise ValueError(
                "--timeout-s, --fetch-timeout-s, --commit-every-s are seconds, above 0"
            )
        if self.fetch_only and self.keep_media is None:
            raise ValueError(
                "--fetch-only stores what it downloads: give the folder with --keep-media DIR"
            )
        if self.ray_address not in (None, LOCAL) and (
            self.workers == 0 or self.check or self.fetch_only
        ):
            raise ValueError(
                "--ray-address: --workers 0, --check and --fetch-only work on this machine alone"
            )
        if not self.dataset and not self.list and not self.check:
            raise ValueError("name at least one data set: --dataset NAME or --dataset folder:PATH")


def main(argv: list[str] | None = None, *, on_progress: OnProgress | None = None) -> int:
    """Run the command; return its exit code.

    Args:
        argv: the words of the command line; None: those of this process.
        on_progress: gets the progress, for a notebook; otherwise it is printed to standard error.

    Raises:
        UserError, CacheError: what the command prints in one line.
    """
    start = time.monotonic()
    options = configs.parse(Options, argv, prog="python -m encode.run", description=__doc__)
    if options.list:
        print(listing())
        return 0
    try:
        root = CacheRoot(options.features.expanduser().absolute())
        words = sys.argv[1:] if argv is None else argv
        with contextlib.ExitStack() as stack:  # of the connection to a cluster, if there is one
            return encode(root, options, start, words, stack, on_progress=on_progress)
    except OSError as error:
        raise disk_full(error, options.features) or error from None


def encode(
    root: CacheRoot,
    options: Options,
    start: float,
    words: Sequence[str],
    stack: contextlib.ExitStack,
    *,
    on_progress: OnProgress | None = None,
) -> int:
    """Run the whole job, step by step; return the exit code.

    Args:
        root: the cache.
        options: of the command.
        start: time of the start, `time.monotonic()`.
        words: the command line, after the program's name.
        stack: closed after the job.
        on_progress: gets the progress, which is printed otherwise.
    """
    command = CommandLine("python -m encode.run", tuple(words))
    media = (
        options.media if options.check is None else None
    )  # with --check, any data set may need it
    datasets = open_datasets(options.dataset, root.path, options.source, media, command)
    config = worker_config(options)
    if options.check is not None:
        return check(root, options, config, datasets)
    nodes, config = stack.enter_context(cluster(options, config))
    reading = how_to_read(options, command)
    choices = {choice.name: choice for choice in choose(options.dataset)}
    counter = read_datasets(root, datasets, choices, reading, write=not options.plan)
    if not options.plan:
        remember(root, [folder for dataset in datasets for folder in dataset.folders])
    names = [dataset.name for dataset in datasets]
    if options.fetch_only:
        for part in parts(root, names, counter):
            code = fetch_only(
                root,
                part.media,
                config,
                retry_failed=options.retry_failed,
                again=command.text(),
                on_progress=on_progress,
            )
            if code:
                return code
        return 0

    spin_briefly()
    keep_memory()
    with importing():
        from encode.driver.resources import choose_layout
        from encode.job import Job

    job = Job(
        root,
        counter,
        codec=options.codec,
        container=options.format,
        config=config,
        on_cluster=nodes is not None,
    )
    repeat = {"rehash": options.rehash, "retry_failed": options.retry_failed}
    show = partial(job.show, command=command, workers=options.workers, datasets=len(datasets))
    if options.plan:
        show(job.plan(**repeat), always_measure=True, spent_s=time.monotonic() - start)
        return 0
    interrupts = Interrupts(STOPPING)
    with DriverLock(job.paths, holder_text("encode.run")) as lock:
        for part in parts(root, names, counter):
            job.take(part)
            plan = job.plan(**repeat)
            seconds = show(plan, spent_s=time.monotonic() - start)
            job.open_space(plan)
            if plan.todo:
                layout = nodes or choose_layout(
                    options.workers,
                    options.threads,
                    device=options.device,
                    device_type=job.device_type,
                    seconds=seconds,
                )
                with interrupts:
                    job.run(
                        layout,
                        lock.token,
                        interrupts,
                        timeout_s=options.timeout_s,
                        on_progress=on_progress,
                    )
            if interrupts.stopping():
                break
        # Points in pixels can be written as text only now that the sizes of the images are known.
        sized = [dataset for dataset in datasets if dataset.needs_sizes]
        read_datasets(root, sized, choices, reading, quiet=True)
        return job.close(time.monotonic() - start, interrupts, again=command.text())


@contextlib.contextmanager
def cluster(
    options: Options, config: WorkerConfig
) -> Iterator[tuple[NodeLayouts | None, WorkerConfig]]:
    """Connect to the cluster that the options or RAY_ADDRESS name, if any.

    Yields:
        the workers of its nodes, or None without a cluster; and `config` with the device and the precision
        of all workers, which this machine may not have.
    """
    here = options.workers == 0 or options.fetch_only
    address = None if here else cluster_address(options.ray_address, os.environ)
    if address is None:
        yield None, config
        return
    import torch

    from encode.driver import ray_pool
    from encode.driver.nodes import NodeLayouts, use_gpus
    from model.io.device import native_dtype

    with ray_pool.cluster_session(address):
        nodes = list(ray_pool.nodes().values())
        gpus = use_gpus(nodes, options.device)
        layouts = NodeLayouts(options.workers, options.threads, gpus)
        layouts.check(nodes)
        print(layouts.describe(nodes), flush=True)
        device, encoder = "cuda" if gpus else "cpu", config.encoder
        if encoder.compute_dtype == "auto":
            native: Any = str(native_dtype(torch.device(device))).removeprefix("torch.")
            encoder = replace(encoder, compute_dtype=native)
        yield layouts, replace(config, device=device, encoder=encoder)


def how_to_read(options: Options, command: CommandLine) -> Reading:
    """Return which samples of each data set are used."""
    return Reading(
        limit=options.limit,
        sample=options.sample,
        seed=options.seed,
        leave_out=options.bad_lines == "leave-out",
        ignore_keys=frozenset(filter(None, options.ignore_keys.split(","))),
        source=options.source,
        media=options.media,
        command=command,
    )


def worker_config(options: Options) -> WorkerConfig:
    """Return how workers are made, without what is known only once there is a space."""
    encoder = encoder_config(
        options.encoder,
        pool_image=options.pool,
        pool_frame=options.frame_pool,
        decode=options.decode,
    )
    encoder.check_weights(options.weights, options.random_weights)
    if options.block is not None:
        encoder = encoder.with_tail(options.block)
    keep_media = options.keep_media
    return WorkerConfig(
        encoder=encoder,
        max_frames=options.max_frames,
        download=DownloadConfig(
            connections=options.connections,
            per_host=options.connections_per_host,
            connect_s=min(DownloadConfig.connect_s, options.fetch_timeout_s),
            read_s=options.fetch_timeout_s,
            total_s=3 * options.fetch_timeout_s,
            tries=options.fetch_tries,
            allow_private=options.allow_private,
        ),
        media_store=keep_media.expanduser().absolute() if keep_media else None,
        device=options.device,
        random_weights=options.random_weights,
        weights=options.weights,
        commit_every_s=options.commit_every_s,
    )


def check(
    root: CacheRoot, options: Options, config: WorkerConfig, datasets: Sequence[Dataset]
) -> int:
    """Compare stored rows with rows encoded now; return the exit code."""
    from encode.check.media import CheckConfig
    from encode.check.stored import check_space, choose_space

    encoder = config.encoder
    wanted: dict[str, tuple[object, ...]] = {
        "container": (options.format,),
        "encoder": (encoder.space_name, f"random-{encoder.space_name}"),
        "codec": (options.codec,),
        "decode": (encoder.decode,),
        "pool_image": (1 if encoder.tail else encoder.pool_image,),
        "pool_frame": (1 if encoder.tail else encoder.pool_frame,),
    }
    if encoder.tail:
        wanted["blocks"] = (encoder.blocks,)
    assert options.check is not None, "the caller checks it"
    folders = [folder for dataset in datasets for folder in dataset.folders]
    local = LocalMedia(root, media=options.media, folders=folders)
    loading = CheckConfig(
        local=local,
        max_frames=config.max_frames,
        keep_media=config.media_store,
        download=config.download if options.check_urls else None,
        device=config.device,
        weights=config.weights,
    )
    space = choose_space(root, wanted)
    names = [dataset.name for dataset in datasets]
    report = check_space(root, space, loading, media=options.check, datasets=names)
    print(report.text())
    return 0 if report.ok else 1


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
