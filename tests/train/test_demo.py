"""`make demo` runs the commands of configs/demo.yaml and reports exact match, blind and time.

python -m train.demo
"""

from __future__ import annotations

from pathlib import Path

import pytest

import configs
from configs import UserError
from encode import run as encode_run
from encode.sources import demo as sources
from encode.sources.demo_drawings import DemoWorld
from train import demo


@pytest.mark.slow
def test_a_failing_command_ends_the_demo_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {**configs.load("demo"), "encode": {"encoder": "demoo"}}
    monkeypatch.setattr(configs, "load", lambda name: values)
    assert demo.main([]) == 2
    shown = capsys.readouterr()
    assert "$ python -m encode.run --dataset demo" in shown.out
    assert shown.out.count("$ python") == 1
    assert "failed with exit code 2" in shown.err


def test_only_runs_of_the_demo_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    demo.replace_run(mine)
    (mine / "stage1").mkdir()
    demo.replace_run(mine)
    assert [p.name for p in mine.iterdir()] == [demo.MARK]
    (other / "stage1").mkdir(parents=True)
    with pytest.raises(UserError, match="not made by the demo"):
        demo.replace_run(other)
    assert (other / "stage1").is_dir()


def test_the_table_has_the_mean_before_captions() -> None:
    def score(value: float, blind: float) -> dict[str, object]:
        ends = {"interval": [0.7, 0.9], "blind_interval": None, "gain_interval": [0.1, 0.2]}
        return {
            "name": "exact match",
            "value": value,
            "blind": blind,
            "gain": value - blind,
            **ends,
        }

    names = ["caption", *reversed(demo.TYPES)]
    tasks = [{"name": n, "questions": 1_000, "scores": [score(0.8, 0.3)]} for n in names]
    lines = demo.table({"tasks": tasks, "mean": score(0.75, 0.25)}).splitlines()
    assert [line.split()[0] for line in lines[1:9]] == list(demo.TYPES)
    first = [
        "count",
        "1,000",
        "exact",
        "match",
        *["0.80", "±", "0.10", "0.30", "0.50", "±", "0.05"],
    ]
    assert lines[1].split() == first
    assert lines[9].split() == ["mean", "0.75", "±", "0.10", "0.25", "0.50", "±", "0.05"]
    assert [line.split()[0] for line in lines[10:]] == ["not", "caption"]


def test_what_is_reported_is_of_the_split_that_nothing_was_chosen_by() -> None:
    assert configs.load("demo")["evaluate"]["split"] == "test"


def test_configs_demo_names_only_existing_options() -> None:
    """The commands would refuse unknown options too, but minutes later."""
    from train.config import Options as TrainOptions
    from train.evaluate.options import Options as EvaluateOptions

    settings = configs.build(demo.Demo, configs.load("demo"), "configs/demo.yaml")
    train = set(TrainOptions.__dataclass_fields__) | {"batch_size"}
    for flags in (settings.train, settings.experiment, *settings.stages.values()):
        assert set(flags) <= train
    assert set(settings.evaluate) <= set(EvaluateOptions.__dataclass_fields__)
    assert set(settings.encode) <= set(encode_run.Options.__dataclass_fields__)
    named = {
        part.split("=")[0] for s in settings.stages.values() for part in s["datasets"].split(",")
    }
    assert named == set(sources.NAMES)
    assert DemoWorld.load().images > 0
