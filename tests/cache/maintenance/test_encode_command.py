"""Commands that messages suggest name the user's own data set, encoder, weights and cache.

encode_command(root, "photos", reader, load("encoders"), "--retry-failed")
# python -m encode.run --dataset photos=folder:/home/me/photos --encoder demo ... --retry-failed
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import command_line, features_words
from cache.maintenance.encode_command import WantedSpace, encode_command
from cache.store.paths import CacheRoot
from cache.store.samples import Origin, write_samples
from cache.verify import Options as VerifyOptions
from configs import load, parse
from encode.run import Options as EncodeOptions
from model.vision.config import encoder_config
from tests.support.spaces import SPEC, fill, make_space


@settings(deadline=None, max_examples=50)
@given(
    features=st.text("ab c'\"$é", min_size=1, max_size=8),
    place=st.text("ab c'\"$é=;", min_size=1, max_size=12),
    codec=st.sampled_from(["fp16", "int8", "int4"]),
    pool=st.sampled_from([1, 2]),
    container=st.sampled_from(["zarr", "webdataset"]),
    decode=st.sampled_from(["whole", "reduced"]),
)
def test_an_encode_command_names_data_set_space_and_cache(
    tmp_path_factory: pytest.TempPathFactory,
    features: str,
    place: str,
    codec: str,
    pool: int,
    container: str,
    decode: str,
) -> None:
    root = CacheRoot(tmp_path_factory.mktemp("c") / features)
    word = f"my-photos=folder:/{place}"
    origin = Origin(words=("--dataset", word, "--bad-lines", "leave-out", "--limit", "7"))
    write_samples(root, "my-photos", [], origin)
    spec = dataclasses.replace(
        SPEC,
        encoder="clip-vit-b32",
        codec=codec,
        pool_image=pool,
        container=container,
        decode=decode,
    )
    load_info = {"encoder": {"name": "clip-vit-b32"}, "weights": f"/{place}/w.safetensors"}
    space = WantedSpace(spec, load_info)
    text = encode_command(root, "my-photos", space, load("encoders"), "--retry-failed")
    python, m, module, *words = shlex.split(text)
    assert (python, m, module) == ("python", "-m", "encode.run")
    options = parse(EncodeOptions, words, prog="x")
    assert options.dataset == (word,) and options.features == root.path
    assert (options.bad_lines, options.limit, options.retry_failed) == ("leave-out", 7, True)
    assert (options.encoder, options.codec, options.format) == ("clip-vit-b32", codec, container)
    assert (options.decode or "whole") == decode
    assert options.weights == load_info["weights"]
    chosen = encoder_config(options.encoder, pool_image=options.pool, pool_frame=options.frame_pool)
    assert (chosen.pool_image, chosen.pool_frame) == (pool, spec.pool_frame)


def test_a_folder_of_transformers_is_named_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "my tower's"
    entry = {"name": f"hf:{folder}", "library": "transformers", "model": str(folder)}
    spec = dataclasses.replace(SPEC, encoder="hf-my-tower-s")
    for moved in ("", "/elsewhere"):
        space = WantedSpace(spec, {"encoder": entry, "weights": moved or str(folder)})
        words = shlex.split(
            encode_command(CacheRoot(tmp_path / "c"), "demo", space, load("encoders"))
        )
        options = parse(EncodeOptions, words[3:], prog="x")
        assert options.encoder == f"hf:{folder}" and options.weights == (moved or None)
        assert (options.pool, options.frame_pool) == (spec.pool_image, spec.pool_frame)


def test_an_encode_command_of_an_unknown_space_takes_the_last_one(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path / "my cache")
    assert encode_command(root) == (
        f"python -m encode.run --dataset demo --encoder demo --features '{root.path}'"
    )
    fill(make_space(root.path, "int4"), [0])
    assert "--dataset pixmo --encoder toy --codec int4 " in encode_command(root, "pixmo")
    weights = {"weights": "/home/.cache/hub/models--timm--x/w.safetensors"}
    random = WantedSpace(dataclasses.replace(SPEC, encoder="random-clip-vit-b32"), weights)
    words = shlex.split(encode_command(root, None, random, load("encoders"), codec="fp16"))
    options = parse(EncodeOptions, words[3:], prog="x")
    assert (options.encoder, options.random_weights, options.codec) == (
        "clip-vit-b32",
        True,
        "fp16",
    )
    assert options.weights is None


@pytest.mark.parametrize(
    ("file", "root"),
    [
        ("/c/samples/d/part-00000.parquet", "/c"),
        ("/c/samples/media/part-00000.parquet", "/c"),
        ("/c/samples/spaces/part-00000.parquet", "/c"),
        ("/c/media/part-1-a.parquet", "/c"),
        ("/c/spaces/s/commits/image-1.parquet", "/c"),
        ("/data/media/my cache/spaces/s/space.json", "/data/media/my cache"),
        ("/c/damaged/samples/d/part-00000.parquet", "/c"),
        ("/c/locks/s/driver.lock", "/c"),
        ("/elsewhere/file", ""),
    ],
)
def test_a_file_tells_its_cache(file: str, root: str) -> None:
    assert features_words(Path(file)) == (("--features", root) if root else ())
    text = command_line("cache.verify", "--deep", *features_words(Path(file)))
    options = parse(VerifyOptions, shlex.split(text)[3:], prog="x")
    assert options.features == Path(root or "cache")
