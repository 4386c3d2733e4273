"""A cache that is not there is reported before torch is imported, if it is certain that it is needed.

python -m train.run --features nowhere
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.errors import NotFoundError
from train.run import check_cache, read_options

NEW = ["--features", "nowhere", "--run", "new"]


def test_a_new_stage_needs_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="no feature space under nowhere/"):
        check_cache(read_options(NEW))


@pytest.mark.parametrize(
    "words",
    [
        ["--run", "begun"],
        ["--resume"],
        ["--from", "llava"],
        ["--features", "https://example.org/cache"],
    ],
)
def test_what_only_training_knows_is_left_to_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "begun" / "stage1").mkdir(parents=True)
    check_cache(read_options([*NEW, *words]))
