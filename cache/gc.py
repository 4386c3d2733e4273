"""Remove garbage from a cache, and on request unreferenced rows, damaged files or a whole space.

python -m cache.gc                           # list the garbage; removes nothing
python -m cache.gc --delete                  # remove unfinished files, uncommitted and replaced shards,
                                             # and of rows that are stored twice those that do not count
python -m cache.gc --unreferenced --delete   # also remove rows that no sample refers to
python -m cache.gc --damaged --delete        # also remove what cache.verify --repair set aside
python -m cache.gc --drop-space NAME         # list what a space holds and who uses it; remove: --delete

Nothing is removed without `--delete`, or while a job writes to the cache. Links and special files, which a
cache never has, are removed first, and what they lead to is left alone. Rows that a sample refers to are
removed only with their whole space, or where an older shard has the same row and it can be read. Rows are
removed shard by shard: the remaining rows are copied to a new shard, which replaces the old one in one step,
so an interruption loses nothing.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError, CorruptError, command_line
from cache.format.spec import ARRAYS
from cache.maintenance.compaction import lock_spaces
from cache.maintenance.garbage import (
    Garbage,
    Removal,
    find_garbage,
    find_removals,
    find_strangers,
    remove,
    remove_rows,
    tree_bytes,
    wanted_keys,
)
from cache.maintenance.inventory import open_spaces, summarise_datasets
from cache.store.files import Fence, disk_errors, move, regular_files, remove_tree
from cache.store.index_file import save_index
from cache.store.locks import driver_holder
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.samples import dataset_names
from cache.store.space import Space
from configs import UserError, command, nearest, parse
from configs.console import bytes_text
from configs.progress import Meter
from configs.text import say


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to remove."""

    features: Path = Path("cache")
    """Folder of the cache."""
    delete: bool = False
    """Remove the listed items; without it they are only listed."""
    unreferenced: bool = False
    """Include rows that no sample refers to, under any source."""
    damaged: bool = False
    """Include the files that `cache.verify --repair` set aside."""
    drop_space: str | None = None
    """Remove this space with all its rows, and nothing else. Takes the full name of the space."""


def main() -> None:
    """Run the command."""
    run(parse(Options, prog="python -m cache.gc", description=__doc__))


def run(options: Options) -> None:
    """List or remove what the options select, and print it."""
    root = CacheRoot.existing(options.features)
    if found := find_strangers(root):
        _remove_strangers(root, found, delete=options.delete)
        return
    spaces = root.space_folders()
    fence: Fence | None = None
    with contextlib.ExitStack() as held:
        if options.delete:
            held.enter_context(disk_errors(root.path))
            fence = held.enter_context(lock_spaces(spaces, "cache.gc"))
        else:
            for space in spaces:
                if holder := driver_holder(space):
                    raise UserError(
                        f"{space.root} is being written by {holder}; wait until that ends"
                    )
        if options.drop_space is not None:
            freed = _drop_space(root, options.drop_space, fence)
        else:
            freed = _collect(root, spaces, options, fence)
    verb = "freed" if options.delete else "would be freed"
    way = "" if options.delete or not freed else "; do it: the same command with --delete"
    say(f"{verb}: {bytes_text(freed)}{way}")


def _remove_strangers(root: CacheRoot, found: Sequence[Garbage], *, delete: bool) -> None:
    """List or remove links and special files. No job makes any, so this needs no lock."""
    with disk_errors(root.path):
        for stranger in found:
            say(f"{stranger.path}: {stranger.what}")
            if delete:
                remove(stranger, root)
    count = f"{len(found):,} links and special files"
    if delete:
        say(f"removed: {count}; the same command again looks for everything else")
    else:
        say(f"would be removed: {count}; do it: the same command with --delete")


def _collect(
    root: CacheRoot, spaces: Sequence[SpacePaths], options: Options, fence: Fence | None
) -> int:
    """List or remove garbage and the other requested items; return their bytes.

    `fence` is None where nothing is removed.
    """
    if options.unreferenced:
        _refuse_without_samples(root)
    found = find_garbage(root, spaces)
    described = [space for space in spaces if space.space_json.exists()]
    wanted = wanted_keys(root)
    removals = [
        find_removals(space, wanted, unreferenced=options.unreferenced) for space in described
    ]
    if options.damaged and root.damaged_dir.is_dir():
        found.append(_damaged(root))
    freed = 0
    chosen = [rows for some, _ in removals for rows in some]
    going = sum(garbage.nbytes for garbage in found)
    going += sum(rows.copied + rows.nbytes for rows in chosen)
    meter = Meter("gc", going) if fence is not None else None
    with meter or contextlib.nullcontext():
        for garbage in found:
            say(f"{garbage.path}: {garbage.what}, {bytes_text(garbage.nbytes)}")
            if fence is not None and meter is not None:
                fence()
                remove(garbage, root)
                meter.add(garbage.nbytes)
            freed += garbage.nbytes
        for rows in chosen:
            say(_removal_text(rows, kept=False), flush=True)
            if meter is not None:
                remove_rows(rows, fence, meter.add)
            freed += rows.nbytes
    for rows in (rows for _, others in removals for rows in others):
        say(_removal_text(rows, kept=True), flush=True)
    if fence is not None:
        for paths in described:
            space = Space.open(paths)
            for array in ARRAYS:
                space.grow(array)
            save_index(paths, space.info)  # removing rows removed the index file
    if not options.damaged and root.damaged_dir.is_dir():
        say(f"{root.damaged_dir}: {_damaged(root).what}; kept (remove them: --damaged)")
    return freed


def _removal_text(rows: Removal, *, kept: bool) -> str:
    what = []
    if rows.doubled:
        what.append(f"{rows.doubled:,} {rows.array} rows are in older shards, too")
    if rows.unreferenced:
        what.append(f"no sample refers to {rows.unreferenced:,} {rows.array} rows")
    text = (
        f"{rows.space.paths.name}: {' and '.join(what)} "
        f"({bytes_text(rows.nbytes)} in {rows.shards:,} shards"
    )
    if kept:
        return f"{text}); kept (remove them: --unreferenced)"
    return f"{text}, {bytes_text(rows.copied)} to copy)"


def _damaged(root: CacheRoot) -> Garbage:
    """Return the folder of the files that a repair set aside."""
    files = regular_files(root.damaged_dir, root.path)
    nbytes = tree_bytes(root.damaged_dir, root.path)
    what = f"{len(files):,} files that cache.verify --repair set aside"
    return Garbage(path=root.damaged_dir, what=what, nbytes=nbytes)


def _refuse_without_samples(root: CacheRoot) -> None:
    """Raise where samples are missing or damaged, because every row would look unreferenced."""
    if not dataset_names(root):
        raise UserError(
            f"no samples under {root.samples_dir}, so every row looks unreferenced; to remove a whole space: "
            "--drop-space NAME"
        )
    for lost in (root.samples_dir, root.media_dir):
        aside = root.damaged_dir / lost.name
        if aside.is_dir():
            raise UserError(
                f"{aside} contains damaged tables, so rows in use may look unreferenced; run encode.run "
                "for them, then remove the damaged tables: "
                + command_line("cache.gc", "--damaged", "--delete", "--features", root.path)
            )


def _drop_space(root: CacheRoot, name: str, fence: Fence | None) -> int:
    """List or, with `fence`, remove a whole space; return its bytes."""
    names = [space.name for space in root.space_folders()]
    if name not in names:
        raise UserError(
            f"no space {name!r} under {root.spaces_dir} (--drop-space takes the full name); there: "
            f"{', '.join(names) or 'none'}{nearest(name, names)}"
        )
    paths = root.space(name)
    nbytes = tree_bytes(paths.root, root.path)
    say(f"{paths.root}: {bytes_text(nbytes)}")
    with contextlib.suppress(CorruptError):  # a damaged cache may say nothing but its size
        _print_users(root, name)
    if fence is not None:
        fence()
        going = root.garbage_dir / f"{name}-{secrets.token_hex(4)}"
        move(paths.root, going, root.path)  # one step, so a crash leaves no half of a space
        remove_tree(going, root.path)
    return nbytes


def _print_users(root: CacheRoot, name: str) -> None:
    """Print the rows of a space, and how much of each data set it covers."""
    summaries, readers = open_spaces(root)
    for summary in summaries:
        if summary.name == name:
            rows = ", ".join(f"{count:,} {array} rows" for array, count in summary.rows.items())
            say(f"  {summary.damage or rows}")
    for dataset in summarise_datasets(root, readers):
        if name in dataset.coverage:
            best = max((c for n, c in dataset.coverage.items() if n != name), default=0.0)
            say(
                f"  {dataset.name}: {dataset.coverage[name]:.1%} of {dataset.samples:,} samples; "
                f"without it {best:.1%}, in another space"
            )


if __name__ == "__main__":
    command(main, errors=(CacheError,))
