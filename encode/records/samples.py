"""Records as samples of a data set.

samples = to_samples(records, id="a.jpg#0", dataset="photos", resolve=find_file)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from cache.store.samples import MediaRef, Message, Sample
from encode.records.record import CAPTION_PROMPT, VIDEO_PROMPT, MediaName, Record


def to_samples(
    records: Iterable[Record],
    *,
    id: str,  # noqa: A002 - the name of the field
    dataset: str,
    resolve: Callable[[MediaName], MediaRef],
) -> Iterator[Sample]:
    """Yield the samples of the records of one line.

    Several answers to a question are several samples with one `choice`.

    Args:
        records: what `read_records` returns.
        id: begin of the samples' ids, unique in the data set.
        dataset: name of the data set.
        resolve: finds a media item. It may raise FaultError, which passes.
    """
    for record in records:
        name = id + record.suffix
        media = tuple(map(resolve, record.media))
        messages = record.messages
        if record.task == "caption" and media and media[0].kind == "video":
            messages = tuple(map(_of_video, messages))
        sample = Sample(
            id=name,
            dataset=dataset,
            messages=messages,
            media=media,
            weight=record.weight,
            task=record.task,
        )
        if not record.answers:
            yield sample
            continue
        *asked, last = messages
        for number, answer in enumerate((last.content, *record.answers)):
            told = (*asked, replace(last, content=answer))
            yield replace(sample, id=f"{name}.a{number}", messages=told, choice=name)


def _of_video(message: Message) -> Message:
    """Ask about a video, where a caption's prompt asks about an image."""
    if message.role != "user" or not message.content.endswith(CAPTION_PROMPT):
        return message
    asked = message.content.removesuffix(CAPTION_PROMPT) + VIDEO_PROMPT
    return replace(message, content=asked)
