"""Records of a run: the line on the screen, and metrics.jsonl after a resume.

screen_line(window, last_step=1000)    # "step   10/1000  loss 1.5000  lr 1.00e-04 ..."
"""

from __future__ import annotations

from pathlib import Path

from train.metrics import METRICS, StepRecord, cut_metrics, read_metrics, screen_line


def test_the_line_on_the_screen_averages_the_steps_since_the_previous_one() -> None:
    def record(step: int, loss: float, step_s: float) -> StepRecord:
        rates = {"lr": 1e-4, "connector_lr": 0.0, "grad_norm": 2.0, "epoch": 0.0}
        sizes = {"samples": 8, "tokens": 500, "wait_s": 0.1, "memory_gib": 1.5}
        return StepRecord(step=step, loss=loss, step_s=step_s, **rates, **sizes)

    line = screen_line([record(9, 1.0, 0.5), record(10, 2.0, 1.5)], 3610)
    assert line == (
        "step   10/3610  loss 1.5000  lr 1.00e-04  grad 2.00  500 tok/s  8.0 samples/s  wait 10.0%  "
        "1000 ms  1.5 GiB  ETA 1 h 00 min"
    )


def test_metrics_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 2, "held_out_loss": 1.5}\n{"step": 3}\n{"st'
    )
    assert len(read_metrics(tmp_path)) == 4  # the incomplete last line is ignored
    cut_metrics(tmp_path, 2)
    expected = '{"step": 1}\n{"step": 2}\n{"step": 2, "held_out_loss": 1.5}\n'
    assert (tmp_path / METRICS).read_text() == expected
