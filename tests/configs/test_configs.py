"""The parser of every command: presets, options, and one line for each mistake.

options = parse(Options, prog="python -m some.run")
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

import configs
from cache.errors import CacheError, NotFoundError
from configs import UserError, build, command, load, one_line, parse
from configs.command_line import command_text, merge, only, with_options
from configs.commands import GUARD, find_commands, list_commands
from configs.console import duration_text
from configs.text import KEPT, json_text, quoted, unguarded, visible
from tests.support import ROOT


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command that exists for this test."""

    dataset: tuple[str, ...] = ()
    """Data sets."""
    learning_rate: float = 1e-4
    codec: Literal["fp16", "int8"] = "int8"
    stage: int = 1
    limit: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    save: bool = False
    features: Path = Path("cache")
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError("learning_rate is negative")


def read(*argv: str) -> Options:
    return parse(Options, argv, prog="python -m some.run")


def test_command_line_overrides_defaults() -> None:
    """With underscores or equals signs, too."""
    options = read("--learning_rate=2e-3", "--limit", "5", "--save", "--betas", "0.8", "0.9")
    assert options == Options(learning_rate=2e-3, limit=5, save=True, betas=(0.8, 0.9))


@pytest.mark.parametrize(
    "argv",
    [
        ("--dataset", "a", "b"),
        ("--dataset", "a", "--dataset", "b"),
        ("--dataset=a", "--stage", "1", "--dataset=b"),
    ],
)
def test_options_with_several_values_may_be_repeated(argv: tuple[str, ...]) -> None:
    assert read(*argv).dataset == ("a", "b")


def test_a_preset_overrides_defaults_and_the_command_line_overrides_it() -> None:
    seen: list[dict[str, str]] = []

    def preset(selected: dict[str, str]) -> Mapping[str, Any]:
        seen.append(selected)
        return {"learning_rate": "5e-5", "limit": 7}  # YAML 1.1 reads 5e-5 as text

    options = parse(
        Options, ["--stage", "2", "--limit", "9"], prog="x", preset=preset, selectors=["stage"]
    )
    assert seen == [{"stage": "2"}]
    assert (options.stage, options.learning_rate, options.limit) == (2, 5e-5, 9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--datset", "a"], "no option --datset; nearest: --dataset"),
        (["--codec", "int9"], "--codec: 'int9' is none of fp16, int8; nearest: int8; see"),
        (["--stage", "one"], "--stage: invalid literal for int() with base 10: 'one'"),
        (["--stage"], "--stage: too few values"),
        (["--limit", "x"], "--limit: no type matching {None}|INT"),
        (["stray"], "no option stray"),
        (["--learning-rate", "-1"], "python -m some.run: learning_rate is negative; see"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        read(*argv)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value) and str(refused.value).isascii()


def test_an_option_that_must_be_given_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy:
        prompt: str

    with pytest.raises(UserError, match="python -m x: --prompt must be given"):
        parse(Needy, [], prog="python -m x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; nearest: learning_rate"),
        ({"stage": "1"}, "stage: expected int, found '1'"),
        ({"stage": True}, "stage: expected int, found True"),
        ({"betas": [0.9]}, "expected 2 values, found 1"),
        ({"codec": "zip"}, "'zip' is none of fp16, int8"),
        ({"inner": {"siz": 3}}, "inner: unknown key 'siz'; nearest: size"),
        ({"learning_rate": -1}, "learning_rate is negative"),
    ],
)
def test_a_wrong_preset_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"somewhere\.yaml: ") as refused:
        build(Options, values, "somewhere.yaml")
    assert message in str(refused.value)


def test_build_converts_lists_integers_and_text() -> None:
    built = build(Options, {"betas": [1, 0.5], "features": "f", "inner": {"size": 2}}, "x")
    assert built == Options(betas=(1.0, 0.5), features=Path("f"), inner=Inner(size=2))


def test_a_config_survives_dump_and_build() -> None:
    import yaml

    options = Options(dataset=("a",), limit=3, inner=Inner(size=9))
    assert build(Options, yaml.safe_load(configs.dump(options)), "x") == options


def test_every_shipped_file_loads_and_a_missing_one_lists_them() -> None:
    names = {path.stem for path in configs.FOLDER.glob("*.yaml")}
    assert {"encoders", "datasets", "model", "train", "demo"} <= names
    for name in names:
        assert load(name)
    with pytest.raises(UserError, match="encoders"):
        load("encoder")


@pytest.mark.parametrize("error", [UserError, NotFoundError])
def test_a_user_error_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def main() -> None:
        raise error("no such thing; make one: python -m x")

    with pytest.raises(SystemExit) as stop:
        command(main, errors=(CacheError,))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; make one: python -m x\n"


def test_a_file_where_a_folder_is_needed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "file"
    place.touch()
    message = rf"error: {place}\S*: there is a file where a folder is needed\n"
    for within in (place, place / "deeper"):
        with pytest.raises(SystemExit) as leaving:
            command(lambda within=within: (within / "runs").mkdir(parents=True))
        assert leaving.value.code == 2
        assert re.fullmatch(message, capsys.readouterr().err)


def test_any_other_error_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        command(lambda: int((tmp_path / "gone").read_text()))


def test_help_prints_each_command_on_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    described = "What it does.\n\npython -m x --a    # one\npython -m x --b    # two\n\nMore."
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], prog="python -m x", description=described)
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "$ python -m x --a    # one" in lines
    assert "$ python -m x --b    # two" in lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "under a second"), (1, "1 s"), (59.4, "59 s"), (75, "1 min 15 s"), (3599.7, "1 h 00 min"),
     (7500, "2 h 05 min"), (532_800, "6 d 4 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# ---- command lines in messages


def test_a_message_repeats_the_words_of_the_user_with_some_options_changed() -> None:
    words = ["--features", "my cache", "--log", "a", "b", "--learning_rate=1e12", "--resume"]
    changed = with_options(words, learning_rate=1e-4, resume=None, run="ран 2", from_="a'b")
    assert shlex.split(command_text("python -m train.run", changed)) == [
        *("python", "-m", "train.run", "--features", "my cache", "--log", "a", "b"),
        *("--learning-rate", "0.0001", "--run", "ран 2", "--from", "a'b"),
    ]
    flags = with_options(["--no-train-llm", "--log", "a", "--log", "b"], train_llm=True)
    assert flags == ["--log", "a", "--log", "b", "--train-llm"]
    assert with_options(words, log=("c", "d"))[-3:] == ["--log", "c", "d"]
    assert merge(["--a", "1", "--b", "2"], ["--b=3"]) == ["--a", "1", "--b=3"]
    assert only(words, {"features", "resume"}) == ["--features", "my cache", "--resume"]


# ---- text from outside


HOSTILE = {
    "photo\x1b]0;pwned\x07.jpg": r"photo\x1b]0;pwned\x07.jpg",
    "a\nb\rc\td": r"a\nb\rc\td",
    "\x9b31m\x7f\x85\x00": r"\x9b31m\x7f\x85\x00",
    "\u202egpj.exe\u2066\u200f\u061c": r"\u202egpj.exe\u2066\u200f\u061c",
    "\u2028\u2029": r"\u2028\u2029",
    "caf\udce9": r"caf\udce9",
    "pay\u200bp\u200dal\ufe0f\u3164\u2800": r"pay\u200bp\u200dal\ufe0f\u3164\u2800",
    "\U000e0041\ufeff\xad\xa0": r"\U000e0041\ufeff\xad\xa0",
    "\u0627\u200d\u200d\u0627": "\u0627\\u200d\\u200d\u0627",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_acts_on_a_terminal_is_escaped(text: str) -> None:
    assert visible(text) == HOSTILE[text]
    assert quoted(text) == f"'{HOSTILE[text]}'"
    assert one_line(f"\r\n x \n {text}").startswith("x ") and one_line(text).isprintable()
    assert json.loads(json_text(text)) == text and json_text(text).isprintable()


@pytest.mark.parametrize(
    "text",
    ["plain [x] \\ 'name'.jpg", "Grüße, ελληνικά, кот", "日本語の写真。", "שלום עולם", "e\u0301",
     "می\u200cخواهم", "क\u094d\u200dष", "👩\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 1\ufe0f\u20e3", "葛\U000e0100"],
)  # fmt: skip
def test_letters_of_every_script_stay(text: str) -> None:
    assert visible(text) == quoted(text) == one_line(text) == text


def test_text_is_bounded() -> None:
    assert visible("\x1b" * 10**7, 12) == r"\x1b\x1b\..." and visible("abc", 3) == "abc"
    assert one_line("abcd", 3) == "..." and one_line(ValueError()) == "ValueError"


def test_a_command_prints_nothing_that_acts_on_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever it prints, logs or refuses; what it draws itself is not changed."""

    def main() -> None:
        log = logging.StreamHandler()
        for text in HOSTILE:
            print(text)
            sys.stderr.writelines([text, "\n"])
            log.handle(logging.makeLogRecord({"msg": text}))
        print("日本語\u3000\tx\n")
        unguarded(sys.stderr).write("\r\x1b[K")
        raise UserError(*HOSTILE)

    for _ in range(2):
        with pytest.raises(SystemExit) as leaving:
            command(main)
        out, err = capsys.readouterr()
        assert leaving.value.code == 2 and "日本語\u3000\tx\n" in out and err.count("\r\x1b[K") == 1
        for text in (out, err.replace("\r\x1b[K", "")):
            assert visible(text, keep=KEPT) == text
            assert all(visible(one, keep=KEPT) in text for one in HOSTILE)
        lines = err.replace("\r\x1b[K", "").splitlines()[-len(HOSTILE) :]
        assert lines == ["error: " * (not i) + one for i, one in enumerate(HOSTILE.values())]


def test_a_traceback_prints_nothing_that_acts_on_a_terminal() -> None:
    code = r"import configs; configs.command(lambda: {}['\x1b]0;x\x07 \u202e \udcff'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and r"\x1b]0;x\x07 \u202e \udcff" in done.stderr
    assert visible(done.stderr, keep="\n") == done.stderr


# ---- Ctrl-C while a command imports


COMMANDS = [
    *("cache.ls", "cache.verify", "cache.gc", "cache.merge", "cache.convert", "cache.share"),
    *("cache.view", "cache.export", "encode.run", "encode.check.loss", "model.generate"),
    *("model.verify", "train.run", "train.evaluate", "train.report", "train.demo"),
    "train.compare",
]


def press_ctrl_c(
    folder: Path, importing: str, *words: str, swallowed: bool = False
) -> tuple[int, str]:
    """Start `python WORDS`, with Ctrl-C when it imports a module; return exit code and standard error.

    With `swallowed`, what imports the module drops every exception, as some libraries do.
    """
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Press:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == {importing!r}:\n"
        "            try: os.kill(os.getpid(), signal.SIGINT)\n"
        "            except BaseException:\n"
        f"                if not {swallowed}: raise\n"
        "sys.meta_path.insert(0, Press)\n"
    )
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        # A shell's background job ignores Ctrl-C, and so do the processes it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    return done.returncode, done.stderr


REMOTE = "https://example.org/cache"
"""Where `train.run` looks after its imports; a folder without a cache is reported before."""


@pytest.mark.parametrize("module", COMMANDS)
def test_ctrl_c_while_a_command_imports(module: str, tmp_path: Path) -> None:
    assert press_ctrl_c(tmp_path, "yaml", "-m", module) == (130, "interrupted\n")


def test_ctrl_c_later(tmp_path: Path) -> None:
    """Imports of `main` itself, of a heavy library, and of a program that has our packages as a library."""
    assert press_ctrl_c(tmp_path, "tyro", "-m", "cache.ls") == (130, "interrupted\n")
    photo = tmp_path / "photos" / "red.png"
    photo.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(photo)
    for words in (
        ["train.run", "--features", REMOTE],
        ["model.verify"],
        ["encode.run", "--dataset", f"folder:{photo.parent}", "--encoder", "demo"],
    ):
        found = press_ctrl_c(tmp_path, "torch", "-m", *words, swallowed=True)
        assert found == (130, "interrupted\n"), words
    code = f"from train.run import main; main(['--features', '{REMOTE}'])"  # somebody's program
    assert "KeyboardInterrupt" in press_ctrl_c(tmp_path, "torch", "-c", code)[1]
    for package in ("cache.store.reader", "train", "encode", "model", "configs"):
        code, error = press_ctrl_c(tmp_path, "late", "-c", f"import {package}; import late")
        assert code == -signal.SIGINT and "KeyboardInterrupt" in error
    handler = (
        "import signal; import train; print(signal.getsignal(2) is signal.default_int_handler)"
    )
    (tmp_path / "program.py").write_text(handler)
    done = subprocess.run(
        [sys.executable, "-m", "program", "-m", "train.run"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.stdout == "True\n", done.stderr


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    code = "import signal; signal.signal(2, signal.SIG_IGN); import os; os.execvp({0!r}, {1!r})"
    words = [sys.executable, "-m", "cache.ls", "--features", str(tmp_path / "none")]
    status, error = press_ctrl_c(tmp_path, "yaml", "-c", code.format(sys.executable, words))
    assert status == 2 and "no cache at" in error


# ---- the commands of a package


@pytest.mark.parametrize("package", ["cache", "encode", "model", "train"])
@pytest.mark.parametrize("words", [[], ["--help"]])
def test_a_package_lists_its_commands_without_importing_them(
    package: str, words: list[str]
) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', *sys.argv[1:]]\n"
        f"try: runpy.run_module('{package}', run_name='__main__', alter_sys=False)\n"
        "finally: print({'torch', 'pyarrow', 'numpy', 'ray'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "set()\n")
    lines = done.stdout.partition("\n\n")[0].splitlines()
    listed = {line.split()[2]: line.split("   ", 1)[1].strip() for line in lines}
    for name, about in listed.items():
        assert about.endswith(".") and about == find_commands(ROOT / package)[name]
        help_text = f"python -m {name} "
        assert any(help_text in page.read_text() for page in (ROOT / package).rglob("*.py"))
    run = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / package).rglob("*.py")
        if GUARD in path.read_text().splitlines()
    }
    assert listed.keys() == run - {package}


def test_words_behind_a_package_name_the_command_that_is_meant() -> None:
    with pytest.raises(UserError, match=r"takes no 'ls'; write python -m cache\.ls"):
        list_commands(ROOT / "cache", ["ls"])
    with pytest.raises(UserError, match=r"takes no 'vrify'; nearest: cache\.verify"):
        list_commands(ROOT / "cache", ["vrify"])
