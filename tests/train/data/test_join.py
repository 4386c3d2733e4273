"""Selecting samples: those that have all their features, of one split.

samples = join(root, reader, {"d": None}, split="train", held_out=0.05, min_coverage=0.95)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.store.samples import MediaRef, Sample
from configs import UserError
from tests.support.feature_caches import World, ask, key_of, names_of, new_world


def test_a_sample_needs_the_features_of_all_its_media(world: World) -> None:
    world.write(
        d=[
            ask("both", ["a", "b"]),
            ask("half", ["a", "unknown"]),
            ask("broken", ["a", "bad"]),
            ask("text"),
        ]
    )
    world.encode(["a", "b"])
    world.fail("bad")
    joined = world.join()
    assert names_of(joined) == ["d/both", "d/text"]
    assert (joined.missing, joined.failed, joined.coverage) == (1, 1, 2 / 3)
    rows = joined.rows[joined.media_of(0)]
    assert rows.tolist() == world.reader.lookup("image", [key_of("a"), key_of("b")]).tolist()
    assert [joined.key(m) for m in joined.media_of(0)] == [key_of("a"), key_of("b")]
    assert "d: 2 train samples of 4 (1 with failed media, 1 not encoded)" in joined.describe()


def test_a_failure_in_another_space_does_not_hide_a_row_of_this_one(world: World) -> None:
    """All spaces share the ledger: an image may overflow in one space and not in another."""
    world.write(d=[ask("s", ["a"])])
    world.encode(["a"])
    world.record("a", key=key_of("a"), status="failed", stage="encode", error="not finite")
    assert names_of(world.join()) == ["d/s"]


def test_a_sample_is_not_paired_with_other_bytes_than_it_means(world: World) -> None:
    """Two data sets may state different hashes for one URL; only one of them has the stored image."""

    def stating(name: str, sha256: str | None) -> Sample:
        return replace(ask(name), media=(MediaRef(source="/a.png", sha256=sha256),))

    world.write(
        right=[stating("1", key_of("a"))],
        silent=[stating("1", None)],
        wrong=[stating("1", key_of("b")), ask("2", ["b"])],
    )
    world.encode(["a", "b"])
    joined = world.join("right", "silent", "wrong")
    assert names_of(joined) == ["right/1", "silent/1", "wrong/2"]
    assert (joined.missing, joined.failed, joined.coverage) == (0, 1, 1)


def test_low_coverage_is_an_error_with_the_failures_and_the_command(world: World) -> None:
    world.write(d=[ask("1", ["a"]), ask("2", ["b"]), ask("3", ["bad"])])
    world.encode(["a"])
    world.fail("bad")
    with pytest.raises(UserError) as refused:
        world.join(min_coverage=0.95)
    message = str(refused.value)
    assert "50.0%" in message  # of the two that have not failed
    assert "/bad.png: decode: truncated" in message
    assert "python -m encode.run --dataset d" in message
    assert "\n" not in message
    assert world.join(min_coverage=0.5).size == 1


def test_data_sets_that_are_not_in_the_cache_leave_the_mix(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.write(d=[ask("1")], e=[ask("1")])
    world.encode(["a"])
    joined = world.join(mix={"d": 0.6, "gone": 0.2, "e": 0.2})
    assert joined.names == ("d", "e")
    assert joined.mix == pytest.approx((0.75, 0.25))
    assert "gone" in caplog.text
    with pytest.raises(UserError, match=r"none of the data sets gone.*there: d, e"):
        world.join("gone")
    with pytest.raises(UserError, match="every data set a share, or none"):
        world.join(mix={"d": 0.5, "e": None})


def test_no_image_is_in_two_splits(world: World) -> None:
    images = [f"p{i}" for i in range(60)]
    rng = np.random.default_rng(0)
    samples = [
        ask(f"{i}", [images[j] for j in rng.choice(60, rng.integers(0, 4), replace=False)])
        for i in range(300)
    ]
    world.write(d=samples[:150], e=samples[150:])
    world.encode(images)
    sides = {
        side: world.join("d", "e", split=side, held_out=0.2, min_coverage=1.0)
        for side in ("train", "val", "test")
    }
    assert sorted(name for side in sides.values() for name in names_of(side)) == sorted(
        f"{'d' if i < 150 else 'e'}/{i}" for i in range(300)
    )
    hashes = {key_of(p): int(key_of(p)[:8], 16) / 2**32 for p in images}  # computed by hand
    val = {key for key, u in hashes.items() if u < 0.2}
    test = {key for key, u in hashes.items() if 0.2 <= u < 0.4}
    for name, side in sides.items():
        for i in range(side.size):
            own = {side.key(m) for m in side.media_of(i)}
            expected = "test" if own & test else "val" if own & val else "train"
            assert not own or name == expected
        text_only = np.diff(side.offsets) == 0  # split by their ids
        assert text_only.any()


def test_an_empty_split_is_an_error(world: World) -> None:
    world.write(d=[ask("1", ["a"])])
    world.encode(["a"])
    with pytest.raises(UserError, match="no sample is in the val split"):
        world.join(split="val")


def test_the_digest_depends_on_texts_and_images_but_not_on_row_numbers(
    world: World, tmp_path: Path
) -> None:
    samples = [ask("1", ["a"]), ask("2", ["b"])]
    world.write(d=samples)
    world.encode(["a", "b"])
    before = world.join().digest
    other = new_world(tmp_path / "other")
    other.write(d=samples)
    other.encode(["x", "b", "a"])
    assert other.join().rows.tolist() != world.join().rows.tolist()
    assert other.join().digest == before
    other.write(d=[*samples[:1], ask("2", ["b"], answer="other")])
    assert other.join().digest != before
    other.write(d=[ask("1", ["b"]), ask("2", ["a"])])
    assert other.join().digest != before


def test_a_frozen_list_ignores_new_samples_and_detects_edited_ones(
    world: World, tmp_path: Path
) -> None:
    samples = [ask(f"{i}", [f"p{i}"]) for i in range(20)]
    world.write(d=samples, t=[ask("words")])
    world.encode([f"p{i}" for i in range(12)])
    first = world.join("d", "t")
    path = tmp_path / "run" / "samples.safetensors"
    first.freeze(path)
    world.encode([f"p{i}" for i in range(12, 20)])
    assert world.join("d", "t").size == 21
    again = world.join("d", "t", frozen=path)
    assert (again.digest, names_of(again)) == (first.digest, names_of(first))
    with pytest.raises(UserError, match="started on d, t, now there are d"):
        world.join("d", frozen=path)
    world.write(d=[*samples[:-1], ask("19", ["p19"], answer="edited")])
    with pytest.raises(UserError, match="not the same any more"):
        world.join("d", "t", frozen=path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        world.join("d", "t", frozen=path)


def test_a_head_has_the_first_samples_of_each_data_set(world: World) -> None:
    world.write(d=[ask(f"{i}") for i in range(5)], e=[ask("x", ["nowhere"]), ask("y"), ask("z")])
    world.encode(["a"])
    assert names_of(world.join("e", "d").head(2)) == ["e/y", "e/z", "d/0", "d/1"]


def test_blind_exchanges_every_image_for_another_one(world: World) -> None:
    world.write(d=[ask(f"{i}", [f"p{i % 7}"]) for i in range(20)])
    world.encode([f"p{i}" for i in range(7)])
    joined = world.join()
    blind = joined.blind(0)
    assert sorted(blind.rows) == sorted(joined.rows)
    assert not (blind.rows == joined.rows).any()
    assert blind.media.tolist() == joined.media.tolist()
    reader = world.reader
    assert [blind.key(m) for m in range(7)] == [
        k for row in blind.rows for k in map(key_of, (f"p{i}" for i in range(7)))
        if reader.lookup("image", [k])[0] == row
    ]  # fmt: skip
    assert world.trees(blind).starts.tolist() == world.trees(joined).starts.tolist()
    world.write(d=[ask("only", ["p0"])])
    with pytest.raises(UserError, match="one image"):
        world.join().blind(0)


def test_answers_to_one_question_are_on_one_side_and_one_sample_of_a_head(world: World) -> None:
    world.write(
        d=[ask(f"{q}-{i}", choice=f"q{q}") for q in range(60) for i in range(3)],
        e=[ask(f"{i}") for i in range(4)],
    )
    world.encode(["a"])
    sides = {
        split: world.join("d", split=split, held_out=0.3) for split in ("train", "val", "test")
    }
    asked = {
        split: {name.split("-")[0] for name in names_of(joined)} for split, joined in sides.items()
    }
    assert set().union(*asked.values()) == {f"d/{q}" for q in range(60)}
    assert sum(map(len, asked.values())) == 60 and min(map(len, asked.values())) > 10
    assert sum(joined.size for joined in sides.values()) == 180

    limited = world.join("d", "e").head(2)
    assert names_of(limited) == ["d/0-0", "d/0-1", "d/0-2", "d/1-0", "d/1-1", "d/1-2", "e/0", "e/1"]
    assert limited.choice.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    both = world.join("e", "d")
    assert both.choice[:4].tolist() == [-1] * 4 and len(set(both.choice[4:].tolist())) == 60


def test_a_frozen_list_keeps_its_answers(world: World, tmp_path: Path) -> None:
    world.write(d=[ask(f"{i}", ["a"], choice="q") for i in range(3)])
    world.encode(["a"])
    before = world.join()
    before.freeze(tmp_path / "samples.safetensors")
    after = world.join(frozen=tmp_path / "samples.safetensors")
    assert (after.digest, after.choice.tolist()) == (before.digest, [0, 0, 0])
    world.write(d=[ask(f"{i}", ["a"], choice=f"q{i}") for i in range(3)])
    with pytest.raises(UserError, match="not the same any more"):
        world.join(frozen=tmp_path / "samples.safetensors")
