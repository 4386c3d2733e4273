"""Compare the answers that lmms-eval logged with those of train.evaluate, one by one.

python docs/recipes/lmms_eval_task/compare.py RUN SPLIT TASK LOGS

TASK is what make_task.py wrote, LOGS the --output_path of lmms_eval. It logs an error as an empty answer and
goes on: an empty answer is an error unless train.evaluate has it too. The exit code is 1 if an answer differs
or is missing.
"""

import json
import sys
from pathlib import Path

from model.io.runs import find_run
from train.evaluate.result import read


def main(run: str, split: str, task: Path, logs: Path) -> int:
    """Compare; return the exit code."""
    asked = read(find_run(run).parent / f"evaluation-{split}.json").answers
    given = {answer.sample: answer.given for answer in asked}
    lines = (task / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)["id"] for line in lines]
    found = max(logs.rglob("*_samples_nanomolmo2.jsonl"), default=None)
    if found is None:
        print(f"{logs}: no *_samples_nanomolmo2.jsonl; run lmms_eval with --log_samples")
        return 1
    logged = map(json.loads, found.read_text(encoding="utf-8").splitlines())
    theirs = {names[one["doc_id"]]: str(one["filtered_resps"]).strip() for one in logged}
    other = [name for name in names if theirs.get(name) != given[name].strip()]
    empty = sum(not theirs.get(name) for name in other)
    same = len(names) - len(other)
    print(f"{found}: {same} of {len(names)} answers equal, {empty} missing or empty by an error")
    for name in other[:5]:
        print(f"{name}: lmms-eval {theirs.get(name)!r}, train.evaluate {given[name]!r}")
    return int(bool(other) or not names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))
