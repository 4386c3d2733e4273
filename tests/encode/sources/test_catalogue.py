"""What --dataset accepts: names, groups, and a kind with its place, each under a name of the user's choice.

(photos,) = choose(["my-photos=folder:photos"])
photos.word                                     # my-photos=folder:/home/me/photos
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import configs
from cache.store.paths import CacheRoot
from cache.store.samples import Origin, write_samples
from configs import UserError
from configs.command_line import CommandLine
from encode.sources import catalogue
from encode.sources.catalogue import Entry, choose, open_datasets, read_catalogue


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and afterwards no user's file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configs, "_user", None)
    return tmp_path


def refusal(*specs: str) -> str:
    with pytest.raises(UserError) as refused:
        choose(specs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("photos", "photos"),
        ("My photos (2024)", "My-photos-2024"),
        ("фото", "фото"),
        ("写真 2024", "写真-2024"),
        ("तस्वीरें", "तस्वीरें"),
        ("e\u0301te\u0301", "été"),
        (".hidden", "hidden"),
        ("...", "folder"),
    ],
)
def test_a_folder_of_any_script_has_its_own_name(here: Path, folder: str, name: str) -> None:
    (here / folder).mkdir()
    (choice,) = choose([f"folder:{folder}"])
    assert choice.name == name
    assert choice.word == f"{name}=folder:{here / folder}"
    (dataset,) = open_datasets([choice.word], here / "cache")
    assert dataset.name == name


def test_two_folders_that_cannot_give_a_name_are_not_one_data_set(here: Path) -> None:
    (here / "...").mkdir()
    (here / "!!!").mkdir()
    said = refusal("folder:...", "folder:!!!")
    assert "would both be the data set 'folder'" in said
    fixed = shlex.split(said.partition("name one of them: ")[2])[1]
    assert [c.name for c in choose(["folder:...", fixed])] == ["folder", "folder-2"]


def test_one_folder_by_two_ways_is_one_data_set(here: Path) -> None:
    (here / "photos").mkdir()
    (here / "link").symlink_to("photos")
    assert len(choose(["folder:photos", f"folder:{here}/photos/", "photos=folder:link"])) == 1


def test_a_name_with_spaces_is_answered_with_one_that_works(here: Path) -> None:
    (here / "a b").mkdir()
    said = refusal("my photos=folder:a b")
    assert "letters and digits" in said
    fixed = shlex.split(said.partition("for example: ")[2])[1]
    assert fixed == "my-photos=folder:a b"
    assert [c.name for c in choose([fixed])] == ["my-photos"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("foldr:/x", "no kind 'foldr'; there are folder:PATH, .*nearest: folder"),
        ("folder:", "write it as folder:PATH"),
        ("x=folder:  ", "write it as folder:PATH"),
        ("=folder:/x", "'' cannot be the name"),
        ("../x=folder:/x", "cannot be the name of a data set.*--dataset x=folder:/x"),
        (".x=folder:/x", "cannot be the name of a data set.*--dataset x=folder:/x"),
        ("a/b=folder:/x", "cannot be the name of a data set.*--dataset a-b=folder:/x"),
        ("pixmo=folder:/x", "belongs to a data set of configs/datasets.yaml.*my-pixmo=folder:/x"),
        ("dmeo", "no such data set; there are .*nearest: demo"),
        ("", "no such data set"),
        ("https://example.com/x.jpg", "no kind 'https'"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_wrong_word_is_answered_in_one_line(spec: str, says: str) -> None:
    import re

    assert re.search(says, refusal(spec))


@given(st.text(max_size=30) | st.text("ab=:folder/ .'\"$", max_size=40))
@example("folder:/a=folder:/b")
@example("~nobody-of-this-name")
@example("json:~nobody-of-this-name/a.json")
@example("x" * 5000)
@example("folder:/" + "x" * 5000)
@settings(deadline=None)
def test_any_word_is_accepted_with_a_word_for_it_or_refused(spec: str) -> None:
    try:
        found = choose([spec])
    except UserError:
        return
    for choice in found:
        assert choose([choice.word]) == [choice]


def test_a_local_copy_of_a_hub_data_set_is_found_by_its_path(here: Path) -> None:
    (here / "copies" / "mine").mkdir(parents=True)
    local = Entry(source="hf", path=str(here / "copies" / "mine"), config="part")
    assert choose(["hf:copies/mine:part"])[0].entry == local
    assert choose(["hf:./copies/mine:part"])[0].word == f"mine-part=hf:{local.path}:part"
    (hub,) = choose(["hf:copies/other:part"])
    assert (hub.name, hub.entry.hub, hub.entry.config) == ("other-part", "copies/other", "part")


def test_the_name_of_a_stored_data_set_is_answered_with_the_words_that_made_it(here: Path) -> None:
    root = CacheRoot(here / "cache")
    words = ("--dataset", "photos=folder:/my photos", "--limit", "3")
    write_samples(root, "photos", [], Origin(words=words))
    with pytest.raises(
        UserError, match=r"--dataset photos: it was made by other words: "
    ) as refused:
        choose(["photos"], root.path)
    again = ["python", "-m", "encode.run"]
    assert shlex.split(str(refused.value).partition("words: ")[2]) == [
        *again,
        *words[2:],
        *words[:2],
    ]
    command = CommandLine("python -m encode.run", ("--pool", "2", "--dataset", "demo", "photos"))
    with pytest.raises(UserError) as refused:
        choose(["demo", "photos"], root.path, command)
    given = ["--pool", "2", "--limit", "3", "--dataset", "demo", words[1]]
    assert shlex.split(str(refused.value).partition("words: ")[2]) == again + given
    words = ("--dataset", "photos", "--config", "/my/file.yaml")
    write_samples(root, "photos", [], Origin(words=words))
    with pytest.raises(UserError, match=r"run --config /my/file\.yaml --dataset photos$"):
        choose(["photos"], root.path)
    write_samples(root, "old", [])
    with pytest.raises(UserError, match="no such data set"):
        choose(["old"], root.path)


def test_a_path_with_an_equals_sign_is_a_path(here: Path) -> None:
    (here / "a=folder:b").mkdir(parents=True)
    (choice,) = choose(["folder:a=folder:b"])
    assert choice.entry.path == str(here / "a=folder:b")


# ---- the user's own file


def test_the_users_file_adds_and_replaces(here: Path) -> None:
    (here / "else" / "photos").mkdir(parents=True)
    (here / "else" / "mine.yaml").write_text(
        "datasets:\n"
        "  holidays: {source: folder, path: photos, about: mine}\n"
        "  pixmo-cap: {source: pixmo, hub: me/my-copy}\n"
        "groups: {all: [holidays, pixmo-cap]}\n"
    )
    ours, _ = read_catalogue()
    configs.use_file("else/mine.yaml")
    entries, groups = read_catalogue()
    assert entries["holidays"].path == str(here / "else" / "photos"), "beside the file"
    assert entries["pixmo-cap"].hub == "me/my-copy" != ours["pixmo-cap"].hub
    assert entries["pixmo-points"] == ours["pixmo-points"]
    assert groups["all"] == ("holidays", "pixmo-cap") and "pixmo" in groups
    assert [c.word for c in choose(["all"])] == ["holidays", "pixmo-cap"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset: {}", "unknown section 'dataset'; there are datasets, .*nearest: datasets"),
        ("datasets: [a]", "datasets: expected names"),
        ("datasets: {a: folder}", "datasets: a: expected keys and values"),
        ("datasets: {a: {source: foldr}}", "datasets: a: source: 'foldr' is none of"),
        ("datasets: {a: {source: folder, path: p, hub: x/y}}", "datasets: a: hub does not go"),
        ("datasets: {a: {source: folder}}", "datasets: a: source: folder needs path"),
        (
            "datasets: {a: {source: hf, path: p, hub: x/y}}",
            "datasets: a: source: hf needs path or hub",
        ),
        ('datasets: {a: {source: hf, path: p, where: "n >= 4"}}', r'where: .* list: \["n >= 4"\]'),
        ("datasets: {a: {source: folder, pth: p}}", "datasets: a: unknown key 'pth'"),
        ("datasets: {a b: {source: folder, path: p}}", "datasets: a b: a name has letters"),
        ("datasets: {1: {source: folder, path: p}}", "datasets: 1: a name has letters"),
        ("datasets: {a: {source: demo}, a: {source: demo}}", "key 'a' is given twice"),
        ("groups: {g: pixmo-cap}", "groups: group g: expected a list"),
        ("groups: {g: [pixmo-cup]}", "groups: group g names 'pixmo-cup'.*nearest: pixmo-cap"),
        ("groups: {pixmo-cap: [pixmo-points]}", "group pixmo-cap has the name of a data set"),
        ("{", "not valid YAML"),
        ("- a", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
    ],
)
def test_each_error_in_the_users_file_names_it(here: Path, text: str, says: str) -> None:
    (here / "nanomolmo2.yaml").write_text(text)
    with pytest.raises(UserError, match=says) as refused:
        configs.use_file(None)
        read_catalogue()
    assert str(refused.value).startswith(f"{here / 'nanomolmo2.yaml'}: ")
    assert "\n" not in str(refused.value)


def test_an_entry_that_cannot_be_opened_names_its_file(here: Path) -> None:
    (here / "nanomolmo2.yaml").write_text(
        "datasets: {gone: {source: folder, path: nowhere}, lost: {source: json, path: a.json}}\n"
    )
    configs.use_file(None)
    for name in ("gone", "lost"):
        with pytest.raises(UserError, match=rf"nanomolmo2\.yaml: datasets: {name}: .*no such"):
            open_datasets([name], here / "cache")


def test_a_file_that_does_not_exist_is_refused_and_none_is_needed(here: Path) -> None:
    configs.use_file(None)
    assert configs.user_file() is None
    with pytest.raises(UserError, match=r"mine\.yaml: cannot be read"):
        configs.use_file("mine.yaml")


def test_every_source_has_an_opener_and_fields() -> None:
    from typing import get_args

    sources = set(get_args(catalogue.Source))
    assert set(catalogue._FIELDS) == set(catalogue._OPENERS) == sources
