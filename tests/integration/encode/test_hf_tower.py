"""A folder of transformers as the encoder, from the command line: encoded, listed, checked, trained, asked.

python -m encode.run --dataset folder:photos --encoder hf:dinov2-small
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cache import ls
from cache.store.paths import CacheRoot
from cache.store.space import read_info
from configs import UserError
from encode.run import main
from tests.support.encode_jobs import draw
from tests.support.tiny_clip import save_tower, transformers_tower


def run(*words: str) -> int:
    return main(["--dataset", "folder:photos", "--device", "cpu", "--workers", "0", *words])


def test_a_folder_is_an_encoder_of_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos", 5)
    save_tower(tmp_path / "my tower", transformers_tower("dinov2"))
    words = ["--encoder", "hf:my tower", "--pool", "2", "--codec", "int8"]
    assert run(*words, "--plan") == 0 and not (tmp_path / "cache/spaces").exists()
    tower = "tower    Dinov2Model-heads2-eps1e-06: block 2 (from 0), fit: squash, 32 x 32 pixels"
    assert tower in capsys.readouterr().out.splitlines()
    assert run(*words) == 0 and "encoded=5 " in capsys.readouterr().out
    assert run(*words) == 0 and "encoded=0 reused=5" in capsys.readouterr().out
    root = CacheRoot(tmp_path / "cache")
    (space,) = root.space_names()
    assert space.startswith("hf-my-tower-int8-")
    assert read_info(root.space(space)).spec.tokens("image") == 4

    assert run(*words, "--check", "5") == 0 and "5" in capsys.readouterr().out
    (tmp_path / "photos/bad.png").write_bytes(b"no image")
    assert run(*words) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["cache.ls", "--failures"])
    assert not ls.main()
    printed = re.search(r"python -m encode\.run (.*)", capsys.readouterr().out)
    assert printed is not None
    command = shlex.split(printed[1])
    assert command[command.index("--encoder") + 1] == f"hf:{tmp_path / 'my tower'}"
    assert "--weights" not in command
    assert main([*command, "--device", "cpu", "--workers", "0"]) == 0
    assert root.space_names() == [space]

    # A second space: the message about which is meant names both, as they can be typed.
    save_tower(tmp_path / "other", transformers_tower("siglip"))
    assert run("--encoder", "hf:other") == 0
    with pytest.raises(UserError) as caught:
        run("--encoder", "demo", "--check", "1")
    assert f"--encoder 'hf:{tmp_path / 'my tower'}' --codec int8" in str(caught.value)


def test_other_weights_in_a_folder_of_that_name_make_another_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos", 2)
    for seed in (0, 1):
        save_tower(tmp_path / f"{seed}/tower", transformers_tower("clip", seed=seed))
        assert run("--encoder", f"hf:{seed}/tower", "--codec", "fp16") == 0
        assert "encoded=2 reused=0" in capsys.readouterr().out
    assert len(CacheRoot(tmp_path / "cache").space_names()) == 2
