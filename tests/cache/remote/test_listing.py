"""A listing made to harm ends in one line.

read_listing(b'{"format": 1, "files": {"../../x": [4, "00..."]}, "seal": "sha256:..."}', url)    # CacheError
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cache.errors import CacheError
from cache.format.checksums import UNSEALED, seal, sealed_json
from cache.remote.listing import is_table, read_listing
from tests.support.faults import in_time

DIGEST = "0" * 64
TABLE = "samples/a/part-00000.parquet"


def sealed(text: str) -> bytes:
    return seal(text.replace("SEAL", UNSEALED).encode())


LISTINGS: dict[str, Callable[[], bytes]] = {
    "no JSON": lambda: sealed('{"SEAL'),
    "a number": lambda: b"7",
    "empty": lambda: b"",
    "a list": lambda: sealed('["SEAL"]'),
    "no UTF-8": lambda: seal(b'{"format": 1, "\xff": 1, "seal": "' + UNSEALED.encode() + b'"}'),
    "deep": lambda: sealed(f'{{"format": 1, "x": {"[" * 10**6}, "seal": "SEAL"}}'),
    "deep and closed": lambda: sealed(
        '{"format": 1, "files": %s, "seal": "SEAL"}' % ("[" * 10**5 + "]" * 10**5)
    ),
    "a key twice": lambda: sealed('{"format": 1, "files": {}, "files": {}, "seal": "SEAL"}'),
    "another key": lambda: sealed_json({"format": 1, "files": {}, "more": 1}),
    "half a character": lambda: sealed_json({"format": 1, "files": {"\ud800": [4, DIGEST]}}),
    "NaN": lambda: sealed('{"format": NaN, "files": {}, "seal": "SEAL"}'),
    "a long number": lambda: sealed(
        f'{{"format": 1, "files": {{"{TABLE}": [{"9" * 9999}, "{DIGEST}"]}}, "seal": "SEAL"}}'
    ),
    "no files": lambda: sealed_json({"format": 1}),
    "a list of files": lambda: sealed_json({"format": 1, "files": [TABLE]}),
    "files are null": lambda: sealed_json({"format": 1, "files": None}),
    "format is true": lambda: sealed_json({"format": True, "files": {}}),
    "format is a list": lambda: sealed_json({"format": [1], "files": {}}),
    "format 2": lambda: sealed_json({"format": 2, "files": {}}),
    "seal is a number": lambda: sealed('{"format": 1, "files": {}, "x": "SEAL", "seal": 1}'),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_listing_of_another_form_is_refused(kind: str) -> None:
    with in_time(20), pytest.raises(CacheError) as error:
        read_listing(LISTINGS[kind](), "https://h/x")
    text = str(error.value)
    assert text.startswith("https://h/x/listing.json: ") and "\n" not in text and len(text) < 400


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 4, "4", [], {}, [4], [DIGEST, 4], [4, DIGEST, 0], {"0": 4, "1": DIGEST}),
        *([True, DIGEST], [0, DIGEST], [-4, DIGEST], [4.0, DIGEST], ["4", DIGEST], [None, DIGEST]),
        *([2**60, DIGEST], [2**63, DIGEST], [2**64, DIGEST], [10**40, DIGEST], [1e300, DIGEST]),
        *([4, DIGEST + "\n"], [4, DIGEST[:-1]], [4, DIGEST[:-1] + "G"], [4, None], [4, [DIGEST]]),
    ],
)
def test_a_size_or_sha256_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(CacheError, match=r"no valid size and sha256|bytes, at most .* are copied"):
        read_listing(sealed_json({"format": 1, "files": {TABLE: value}}), "https://h/x")


@pytest.mark.parametrize(
    "name",
    [
        "samples/a/part-000000.parquet",
        "samples/a/part-٠٠٠٠٠.parquet",
        "samples/\x1b[31m/part-00000.parquet",
        "samples/a\u202eb/part-00000.parquet",
        f"samples/{'a' * 300}/part-00000.parquet",
        f"samples/{'a' * 10**6}/part-00000.parquet",
        f"media/part-{'0' * 20}-{'a' * 250}.parquet",
        f"media/part-{'9' * 21}-a.parquet",
        "spaces/x/commits/image-999999999.parquet",
        "spaces/CON/../x/space.json",
        "spaces/x/space.json/",
        "spaces//space.json",
        "SPACES/x/space.json",
        "spaces/x/index/a/b",
        "damaged/x/space.json",
        "garbage/x",
        "listing.json",
    ],
)
def test_other_names_are_refused_and_printed_short(name: str) -> None:
    assert not is_table(name)
    with pytest.raises(CacheError, match="which is no table of a cache") as error:
        read_listing(sealed_json({"format": 1, "files": {name: [4, DIGEST]}}), "https://h/x")
    assert str(error.value).isascii() and len(str(error.value)) < 700
