"""The encoder's last blocks in a run: whether the space has them, and their weights as encoded.

    check_blocks(options, reader)              # UserError if more are to train than there are
    tail = open_tail(options, reader)          # None for a space without a tail

The rest of training treats them as any part of the model: `vlm.tail`.
"""

from __future__ import annotations

import configs
from cache.errors import CacheError, CorruptError
from cache.format.tail import read_tail
from cache.maintenance.encode_command import encode_command
from cache.remote.open import cache_root
from cache.store.paths import is_url
from cache.store.reader import FeatureReader
from configs import UserError
from model.tail import VisionTail, load_tail
from train.config import Options


def check_blocks(options: Options, reader: FeatureReader) -> None:
    """Raise UserError if more of the encoder's blocks are to train than the space has behind its rows."""
    spec, wanted = reader.spec, options.train_vision_blocks
    have = 0 if spec.tail is None else len(spec.tail.numbers)
    if wanted <= have:
        return
    if spec.tail is not None:
        numbers = f"{spec.tail.numbers[0]} to {spec.tail.numbers[-1]}"
        raise UserError(
            f"--train-vision-blocks {wanted}: the tail of space {spec.name} has {have} blocks, {numbers}; "
            f"give --train-vision-blocks {have}"
        )
    way_out = ""
    if (block := max(spec.blocks) - wanted) >= 0:
        more = ("--block", str(block), "--tail")
        command = encode_command(cache_root(reader), None, reader, configs.load("encoders"), *more)
        way_out = f"; encode what precedes them: {command}"
    raise UserError(
        f"--train-vision-blocks {wanted}: space {spec.name} has the output of block "
        f"{', '.join(map(str, spec.blocks))}, and no tail of blocks that could train{way_out}"
    )


def open_tail(options: Options, reader: FeatureReader) -> VisionTail | None:
    """Return the blocks behind the stored one as they were encoded; None for a space without a tail.

    Raises:
        CacheError: their file is missing or damaged.
    """
    spec, paths = reader.spec, reader.paths
    if spec.tail is None:
        return None
    try:
        return load_tail(spec, read_tail(paths.tail, paths.cache_root, spec.tail, spec.width))
    except CorruptError as error:
        if not is_url(options.features):
            raise
        raise CacheError(  # the file here is a copy
            f"{options.features}/spaces/{spec.name}/{paths.tail.name}: {error.what}; there: python -m "
            "cache.verify --features DIR, then python -m cache.share --features DIR"
        ) from None
