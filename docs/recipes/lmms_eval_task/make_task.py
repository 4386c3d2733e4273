"""Write the questions that train.evaluate asked as a task for lmms-eval: JSON lines, images, YAML.

python docs/recipes/lmms_eval_task/make_task.py RUN SPLIT OUT [MEDIA]

MEDIA is the folder of the images, if another machine encoded them or they have moved.
Questions about videos, and those without an image, are left out and counted.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cache.format.media_marks import split_at_marks
from cache.maintenance.local_media import LocalMedia
from cache.store.ledger import read_media
from cache.store.paths import CacheRoot
from cache.store.samples import Sample, read_samples
from cache.view.thumbnails import MAX_FILE_BYTES
from model.io.runs import find_run
from model.media.images import decode_image
from train.evaluate.result import read
from train.evaluate.run_options import trained_with


def messages(sample: Sample, keys: list[str]) -> list[dict[str, Any]]:
    """Return the turns before the last answer, as lists of texts and keys of images."""
    turns, left, result = [(m.role, m.content) for m in sample.messages], list(keys), []
    for (role, _), (first, *texts) in zip(turns, split_at_marks(turns, len(keys)), strict=True):
        parts = [{"text": first}]
        for text in texts:
            parts += [{"image": left.pop(0)}, {"text": text}]
        result.append({"role": role, "content": [part for part in parts if part.get("text") != ""]})
    return result[: max(i for i, (role, _) in enumerate(turns) if role == "assistant")]


def main(run: str, split: str, out: Path, media: Path | None = None) -> None:
    """Write the task."""
    final, here, lines = find_run(run), Path(__file__).parent, []
    asked = {a.sample: a for a in read(final.parent / f"evaluation-{split}.json").answers}
    root = CacheRoot(Path(trained_with(final).features))
    ledger, local = read_media(root), LocalMedia(root, media=media)
    (out / "images").mkdir(parents=True)
    for dataset in dict.fromkeys(name.split("/", 1)[0] for name in asked):
        for sample in read_samples(root, dataset):
            answer = asked.get(f"{dataset}/{sample.id}")
            if answer is None or {ref.kind for ref in sample.media} != {"image"}:
                continue
            keys = [str(ledger[ref.source].key) for ref in sample.media]
            for ref, key in zip(sample.media, keys, strict=True):
                data = local.read(ref.source, key, most=MAX_FILE_BYTES)
                image = decode_image(data)  # as the encoder does
                image.save(out / "images" / f"{key}.png")
            line = {"id": answer.sample, "messages": json.dumps(messages(sample, keys))}
            lines.append(line | {"answers": [answer.expected, *answer.others]})
    questions = (out / "questions.jsonl").absolute()
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(here / "utils.py", out)
    task = (here / "nanomolmo2.yaml").read_text().replace("QUESTIONS", json.dumps(str(questions)))
    (out / "nanomolmo2.yaml").write_text(task)
    print(f"{out}: {len(lines)} questions, {len(asked) - len(lines)} left out")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:]))
