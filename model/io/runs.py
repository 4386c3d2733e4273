"""Find the finished models of runs, and read what they were trained on. Importing it takes no torch.

    final = find_run("default")             # runs/default/stage2/final
    meta = read_meta(final)                 # nanomolmo2.json, checked

Somebody else may have made a run: links are refused, and what its files say is bounded and typed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from cache.format.checksums import read_sealed_json
from cache.format.gate import fit
from configs import UserError, nearest, one_line, read_yaml
from configs.command_line import command_text
from model.io.base_model import Base, check_base
from model.io.run_files import META, MOST, Count, Name, refuse_links, refuse_links_beside
from model.language.files import check_file, check_folder
from model.language.records import FOLDER_TEMPLATE, VERSIONS, AdaptersMeta

RUNS = Path("runs")
FORMAT = 2
"""Version of the folder `final` and of `nanomolmo2.json`."""


class _Marks(TypedDict):
    image: str
    ends: list[int]


class _File(TypedDict):
    bytes: Count
    crc32c: Count


class _Space(TypedDict):
    """Content of space.json; `spec` is checked where it is used."""

    name: NotRequired[Name]
    spec: NotRequired[dict[str, Any]]
    load: NotRequired[dict[str, Any] | None]


class Meta(TypedDict):
    """What nanomolmo2.json, and state.json of a checkpoint, say of a model."""

    connector: str
    llm: str
    space: _Space | None
    stage: Annotated[int, msgspec.Meta(ge=0, le=99)]
    step: Count
    template: str
    vision_width: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    max_frames: NotRequired[int | None]
    lora: NotRequired[AdaptersMeta]


class _FinalMeta(Meta):
    files: dict[Name, _File]
    marks: NotRequired[_Marks]
    base: NotRequired[Base]
    positions: NotRequired[Count | None]


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of nanomolmo2.json.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    path = folder / META
    if not (path.exists() or path.is_symlink()):
        raise UserError(
            f"{folder}: not a trained model (looked for {META}); train one: python -m train.run --stage 1"
        )
    check_folder(folder)
    refuse_links_beside(folder)
    if check_file(path) > MOST:
        raise UserError(f"{path}: more than the {MOST:,} bytes that are read; {again(folder)}")
    try:
        meta = read_sealed_json(path)
    except (
        Exception
    ) as error:  # CorruptError of the cache, of which this package imports the format alone
        what = one_line(getattr(error, "what", error))
        raise UserError(f"{path}: {what}; {again(folder)}") from None
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {one_line(meta.get('format'), 40)}, this version reads {FORMAT}"
        )
    try:
        fit(meta, _FinalMeta)
        if "base" in meta:
            check_base(meta["base"])
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}; {again(folder)}") from None
    if ("lora" in meta) != ("base" in meta):
        raise UserError(f"{path}: has only one of lora and base; {again(folder)}")
    check_template_version(path, meta["template"])
    if meta["template"] == FOLDER_TEMPLATE and "marks" not in meta:
        raise UserError(f"{path}: no marks; {again(folder)}")
    return meta


def check_template_version(path: Path, version: object) -> None:
    """Raise UserError if a model was trained with a template that this version does not have."""
    if version not in VERSIONS:
        raise UserError(
            f"{path}: trained with chat template {version}, this version uses "
            f"{VERSIONS[0]}; use the version that trained it"
        )


def again(folder: Path) -> str:
    """Return what to do about a saved model that is damaged."""
    return f"copy {folder} again, or train the stage again"


def find_run(run: str, stage: int | None = None) -> Path:
    """Return the `final` folder of a stage of a run.

    Args:
        run: a name below runs/, the path of a run, of a stage, or of a `final` folder.
        stage: number of the stage; None for the last finished one.

    Raises:
        UserError: there is no such run, or the stage is not finished.
    """
    root = Path(run)
    if (root / META).is_file():
        refuse_links_beside(root)
        return root
    if (root / "final" / META).is_file():
        refuse_links(root)
        return root / "final"
    root = find_root(run)
    found = {
        int(path.parent.parent.name.removeprefix("stage")): path.parent
        for path in root.glob(f"stage[0-9]/final/{META}")
    }
    wanted = stage if stage is not None else max(found, default=1)
    refuse_links(root / f"stage{wanted}")
    if wanted not in found:
        words = ["--stage", str(wanted), "--run", run, *_features_of(root, wanted), "--resume"]
        raise UserError(
            f"run {run}: stage {wanted} is not finished (no {root}/stage{wanted}/final); "
            f"continue with: {command_text('python -m train.run', words)}"
        )
    return found[wanted]


def find_root(run: str) -> Path:
    """Return the folder of a run.

    Args:
        run: its path, or its name below runs/.

    Raises:
        UserError: there is no such run.
    """
    root = Path(run)
    if not root.is_dir() or not any(root.glob("stage*")):
        root = RUNS / run
    if not root.is_dir():
        names = sorted(p.name for p in RUNS.glob("*") if any(p.glob("stage*")))
        raise UserError(
            f"no run {run} (looked in {root}){nearest(run, names)}; "
            f"{'there are: ' + ', '.join(names) if names else 'train one: python -m train.run --stage 1'}"
        )
    return root


def _features_of(root: Path, stage: int) -> list[str]:
    """Return the option that names the cache of a run: that of a stage, or of the last one before it."""
    for number in range(stage, 0, -1):
        path = root / f"stage{number}" / "config.yaml"
        with contextlib.suppress(OSError, UserError, KeyError):
            return ["--features", str(read_yaml(path)["features"])]
    return []
