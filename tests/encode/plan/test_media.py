"""The media that samples mention, whole or in parts.

counter = MediaCounter()
list(counter.count(samples))
counter.media, counter.part
"""

from __future__ import annotations

import pytest

from cache.store.samples import MediaRef, Message, Sample
from encode.plan import media as media_module
from encode.plan.media import Media, MediaCounter, Mention, Part

KEY, OTHER = "ab" * 32, "cd" * 32
URL = "https://host.example/a.jpg"


def test_counting_yields_the_samples_and_counts_each_source_once() -> None:
    samples = [
        Sample(
            id=str(i),
            dataset="d",
            messages=(Message(role="user", content="?"),),
            media=(MediaRef(source=f"/{i % 2}"), MediaRef(source="/x")),
        )
        for i in range(5)
    ]
    counter = MediaCounter()
    assert list(counter.count(samples)) == samples
    assert (counter.samples, list(counter.media)) == (5, ["/0", "/x", "/1"])


@pytest.mark.parametrize("at_once", [1, 1000])
def test_the_first_stated_sha256_of_a_source_counts(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "AT_ONCE", at_once)
    counter = MediaCounter()
    for sha256 in (None, KEY, OTHER):
        counter.add(MediaRef(source=URL, sha256=sha256))
    counter.add(MediaRef(source="/film", kind="video"))
    assert list(counter.media) == [URL, "/film"]
    assert [counter.media.mention(i) for i in range(2)] == [
        Mention("image", KEY),
        Mention("video"),
    ]


def test_media_of_a_dict() -> None:
    mentions = {"/a": Mention("video"), "/b": Mention("image", KEY), "/c": Mention("image")}
    media = Media.of(mentions)
    assert {source: media.mention(i) for i, source in enumerate(media)} == mentions


@pytest.mark.parametrize("at_once", [3, 1000])
def test_parts_have_each_source_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "MOST_SOURCES", 30)
    monkeypatch.setattr(media_module, "AT_ONCE", at_once)
    refs = [MediaRef(source=f"/{i}", sha256=KEY if i % 3 else None) for i in range(200)]

    def count(part: Part | None) -> MediaCounter:
        counter = MediaCounter(part)
        for ref in refs + refs[::-1]:
            counter.add(ref)
        return counter

    first = count(None)
    bits = first.part.bits
    assert first.part == Part(0, bits) and first.part.parts >= 200 / 30
    counters = [first, *(count(Part(i, bits)) for i in range(1, first.part.parts))]
    assert list(first.media) == list(count(Part(0, bits)).media)
    assert 0 < len(first.media) <= 30
    found = {
        source: counter.media.mention(i)
        for counter in counters
        for i, source in enumerate(counter.media)
    }
    assert sum(len(counter.media) for counter in counters) == 200
    assert found == {ref.source: Mention("image", ref.sha256) for ref in refs}
