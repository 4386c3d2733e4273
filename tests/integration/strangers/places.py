"""Change the tree of a cache as a stranger may: links, special files, odd names, files in wrong places.

said = PLACE_KINDS["link"](root, outside, dice)
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from tests.integration.strangers.values import TEXTS, Unchangeable, short

Change = Callable[[Path, Path, random.Random], str]


def places(root: Path) -> list[Path]:
    """Return every file and folder of a cache, and some that may be absent, sorted."""
    found = sorted(path for path in root.rglob("*") if not path.name.startswith("."))
    usual = [
        root / name for name in ("locks", "damaged", "garbage", "samples", "media", "listing.json")
    ]
    for space in sorted((root / "spaces").glob("*/")):
        usual += [space / "index", root / "locks" / space.name]
        usual += [root / "locks" / space.name / name for name in ("driver.lock", "workers.lock")]
        usual += [
            root / "locks" / space.name / "worker-0.lock",
            root / "locks" / space.name / "decode",
        ]
        usual += [root / "damaged" / "spaces" / space.name, root / "garbage" / space.name]
        usual += [
            root / "damaged" / "spaces",
            root / "damaged" / "samples",
            root / "damaged" / "media",
        ]
    return [*found, *(path for path in usual if not os.path.lexists(path))]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)


def _draw(root: Path, dice: random.Random) -> Path:
    # Folders and files near the root as often as the many below.
    found = places(root)
    depth = dice.choice(sorted({len(path.relative_to(root).parts) for path in found}))
    path = dice.choice([p for p in found if len(p.relative_to(root).parts) == depth])
    if any(above.is_symlink() for above in path.parents if above.is_relative_to(root)):
        raise Unchangeable
    return path


def link(root: Path, outside: Path, dice: random.Random) -> str:
    """Replace a file or folder by a link: outside, to the same in another cache, to nothing, to itself."""
    path = _draw(root, dice)
    here = path.relative_to(root)
    folder = path.is_dir()
    targets: list[Path | str] = [outside / "folder", outside / "secret.txt", outside / "absent"]
    targets += [outside / "cache" / here] * 3
    targets += [path.name, "..", "/dev/zero", outside / "fifo", outside / "absent" / "x"]
    target = dice.choice(targets)
    if dice.random() < 0.2 and os.path.lexists(path):
        # What was here is moved outside, and linked from here: a link that can be followed.
        moved = outside / "moved"
        _remove(moved)
        shutil.move(path, moved)
        target = moved
    elif isinstance(target, Path) and dice.random() < 0.4:
        target = os.path.relpath(target, path.parent)
    _remove(path)
    path.symlink_to(target)
    return f"{here} ({'folder' if folder else 'file'}) -> {target}"


def special(root: Path, outside: Path, dice: random.Random) -> str:
    """Replace a file or folder by a FIFO, a socket, a folder, a file, or make it unreadably named."""
    path = _draw(root, dice)
    kind = dice.choice(["FIFO", "socket", "folder", "full folder", "file", "FIFO"])
    _remove(path)
    with contextlib.suppress(FileExistsError):
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        elif kind == "file":
            path.write_bytes(dice.choice([b"", b"x", b"sha256:" + b"0" * 64, bytes(100_000)]))
        else:
            path.mkdir()
            if kind == "full folder":
                (path / "x").write_text("x")
    return f"{path.relative_to(root)} is a {kind}"


def _below(root: Path) -> list[Path]:
    folders = [root, *(path for path in places(root) if path.is_dir() and not path.is_symlink())]
    return [folder for folder in folders if folder.is_dir()]


_NAMES = (
    *(
        b"\xff\xfe",
        b"\x1b[31mred",
        b"a\nFORGED: line",
        "\u202eevil".encode(),
        b"x" * 255,
        b"-rf",
        b"...",
    ),
    *(
        b" ",
        b"\\",
        b"$(touch x)",
        b"a\x85FORGED: line",
        b'"><script>FORGED</script>'.replace(b"/", b"-"),
    ),
    *(
        b"part-00000.parquet",
        b"part-00001.parquet",
        b"part-x.parquet",
        b"part-.parquet",
        b"part--.parquet",
    ),
    *(
        b"part-99999999999999999999-x.parquet",
        b"part-00000000000000000001-x.parquet",
        b"part-5-\x1b[3m.parquet",
    ),
    *(
        b"image-99999999.parquet",
        b"image-00000099.parquet",
        b"frame-00000000.parquet",
        b"image-x.parquet",
    ),
    *(
        b"99999999999999999999",
        b"9" * 200,
        b"99999999",
        b"-1",
        b"007",
        "\u0663".encode(),
        "\u00b2".encode(),
    ),
    *(
        b"space.json",
        b"zarr.json",
        b"image.bin",
        b"listing.json",
        b"worker-x.lock",
        b"worker-\x1b.lock",
    ),
    *(
        b"x.partial",
        b"image-00000009.parquet.deadbeef.partial",
        b"features",
        b"commits",
        b"index",
        b"c",
        b"0",
    ),
    *(
        b"photos",
        "a\u0301".encode(),
        b"samples",
        b"media",
        b"spaces",
        b"locks",
        b"damaged",
        b"garbage",
    ),
)


def extra(root: Path, outside: Path, dice: random.Random) -> str:
    """Add a file, folder, link or special file with an odd name, or with one that belongs elsewhere."""
    folder = dice.choice(_below(root))
    name = dice.choice(_NAMES)
    path = folder / os.fsdecode(name)
    if os.path.lexists(path):
        raise Unchangeable
    kind = dice.choice(["file", "folder", "link", "FIFO", "copy", "copy", "tree"])
    try:
        match kind:
            case "file":
                path.write_bytes(dice.choice([b"", b"x" * 50]))
            case "folder":
                path.mkdir()
            case "link":
                target = dice.choice(["folder", "secret.txt", "absent", "cache"])
                path.symlink_to(outside / target)
            case "FIFO":
                os.mkfifo(path)
            case "copy":
                files = [
                    p for p in sorted(root.rglob("*")) if p.is_file() and p.stat().st_size < 1 << 22
                ]
                like = [p for p in files if p.suffix == path.suffix]
                if not files:
                    raise Unchangeable
                shutil.copyfile(dice.choice(like or files), path)
            case "tree":
                others = [p for p in _below(root) if p != root and not folder.is_relative_to(p)]
                if not others:
                    raise Unchangeable
                shutil.copytree(dice.choice(others), path, symlinks=True)
    except (OSError, shutil.Error):
        raise Unchangeable from None
    return f"{kind} {short(name)} in {folder.relative_to(root)}"


def renamed(root: Path, outside: Path, dice: random.Random) -> str:
    """Rename a file or folder to an odd name, exchange two of them, or remove one."""
    path = _draw(root, dice)
    if not os.path.lexists(path):
        raise Unchangeable
    way = dice.choice(["rename", "rename", "remove", "exchange"])
    said = f"{way} {path.relative_to(root)}"
    if way == "remove":
        _remove(path)
    elif way == "rename":
        name = dice.choice(_NAMES)
        new = path.with_name(os.fsdecode(name))
        if os.path.lexists(new):
            raise Unchangeable
        path.rename(new)
        said += f" to {short(name)}"
    else:
        others = [p for p in path.parent.iterdir() if p != path]
        if not others:
            raise Unchangeable
        other = dice.choice(sorted(others))
        between = path.with_name("between")
        path.rename(between)
        other.rename(path)
        between.rename(other)
        said += f" and {other.name}"
    return said


def locks(root: Path, outside: Path, dice: random.Random) -> str:
    """Put content into the locks of a space: what is no JSON, of another type, huge, or hostile text."""
    spaces = sorted(path.name for path in (root / "spaces").glob("*/"))
    folder = root / "locks" / dice.choice(spaces or ["x"])
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir() or folder.is_symlink():
        raise Unchangeable
    name = dice.choice(
        ["driver.lock", "workers.lock", "worker-0.lock", "worker-1.lock", "decode-0.log"]
    )
    text = dice.choice(
        [
            *(
                "",
                "[]",
                "1",
                "null",
                "{}",
                '{"holder": 1}',
                '{"holder": [], "token": {}}',
                "[" * 99999,
            ),
            *('{"token": "x"}', "\x1b[31m", "\x00" * 100_000, "9" * 5000, "{" * 10),
            json.dumps({"holder": dice.choice(TEXTS), "token": dice.choice(TEXTS)}),
        ]
    )
    path = folder / name
    if path.is_dir() or path.is_symlink() or path.is_fifo() or path.is_socket():
        raise Unchangeable
    path.write_text(text)
    return f"{path.relative_to(root)}: {short(text)}"


def shard(root: Path, outside: Path, dice: random.Random) -> str:
    """Cut, grow, replace or flip a shard."""
    found = sorted(
        p for p in root.glob("spaces/*/features/*/c/**/*") if p.is_file() and not p.is_symlink()
    )
    if not found:
        raise Unchangeable
    path = dice.choice(found)
    data = bytearray(path.read_bytes())
    way = dice.choice(["cut", "grown", "flip", "empty", "other", "8 MB", "sparse"])
    match way:
        case "cut":
            data = data[: dice.randrange(len(data) + 1)]
        case "grown":
            data += dice.randbytes(100)
        case "flip" if data:
            data[dice.randrange(len(data))] ^= 0xFF
        case "empty":
            data = bytearray()
        case "other":
            data = bytearray(dice.choice(found).read_bytes())
        case "8 MB":
            data = data + bytes(8 << 20)
    path.write_bytes(data)
    if way == "sparse":
        os.truncate(path, 1 << 40)
    return f"{path.relative_to(root)}: {way}"


PLACE_KINDS: dict[str, Change] = {
    "link": link,
    "special": special,
    "extra": extra,
    "renamed": renamed,
    "locks": locks,
    "shard": shard,
}
