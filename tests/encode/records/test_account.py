"""An account is one line, is stored as JSON, and refuses a data set with faults.

account.text()                # photos: 2 lines (LLaVA), 1 image; left out: 4 .heic
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import UserError
from encode.records.account import Account, FaultError

counts = st.dictionaries(st.text(max_size=8), st.integers(1, 10**6), max_size=3)


@given(lines=counts, left_out=counts, ignored=counts, notes=counts, faults=counts)
def test_an_account_is_one_line_and_survives_json(
    lines: dict[str, int],
    left_out: dict[str, int],
    ignored: dict[str, int],
    notes: dict[str, int],
    faults: dict[str, int],
) -> None:
    """Keys and names are other people's: none of their characters acts on a terminal."""
    account = Account(name="d")
    for counter, values in (
        (account.lines, lines),
        (account.left_out, left_out),
        (account.ignored, ignored),
        (account.notes, notes),
        (account.faults, faults),
    ):
        counter.update(values)
    assert account.text().isprintable()
    again = Account.from_json("d", json.loads(json.dumps(account.to_json())))
    assert again.text() == account.text()
    assert again.to_json() == account.to_json()


def test_faults_are_totalled_by_kind() -> None:
    account = Account(name="d")
    for number in range(30):
        kind = "unknown key" if number % 3 else "no text"
        account.fault(f"d.jsonl:{number}", FaultError(kind, f"{kind} {number}"))
    with pytest.raises(UserError) as refused:
        account.close()
    lines = str(refused.value).splitlines()
    assert lines[0] == "d.jsonl:0: no text 0" and lines[19] == "d.jsonl:19: unknown key 19"
    assert lines[20] == "... and 10 more"
    assert lines[21].startswith("d: 30 lines cannot be used (unknown key: 20, no text: 10); ")
