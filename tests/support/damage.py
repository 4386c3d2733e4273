"""Ways to damage a cache, for the tests of those who look after it."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file: number `bit`, counted from its first byte's lowest."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def garble(path: Path, at: int, length: int = 20) -> None:
    """Change `length` bytes, every second bit of them: what no single flip explains."""
    data = bytearray(path.read_bytes())
    for place in range(at, at + length):
        data[place] ^= 0x55
    path.write_bytes(data)
