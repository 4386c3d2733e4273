"""JSON objects and safetensors headers of others: read exactly, or refused with one line.

tensors = read_header(Path("model.safetensors"))     # {"wte": StoredTensor(path, "F32", (320, 32))}
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs import UserError
from model.language.files import StoredTensor, read_header, read_object

TENSORS = {
    "a": torch.ones(2, 3),
    "b.weight": torch.zeros(4, dtype=torch.bfloat16),
    "none": torch.zeros(0, 5),
    "one": torch.tensor(3, dtype=torch.int64),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_a_header_names_every_tensor(file: Path) -> None:
    assert read_header(file) == {
        "a": StoredTensor(file, "F32", (2, 3)),
        "b.weight": StoredTensor(file, "BF16", (4,)),
        "none": StoredTensor(file, "F32", (0, 5)),
        "one": StoredTensor(file, "I64", ()),
    }


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_changed_file_is_read_as_safetensors_reads_it_or_refused(
    data: st.DataObject, file: Path, tmp_path: Path
) -> None:
    changed = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(changed[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(changed), header, 8, 3, 0, len(changed) - 1]))
    path = tmp_path / "changed.safetensors"
    path.write_bytes(changed[:end])
    found = None
    try:
        found = read_header(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
    if found is not None:
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as theirs:
            shapes = {n: tuple(theirs.get_slice(n).get_shape()) for n in theirs.keys()}  # noqa: SIM118
            assert shapes == {name: tensor.shape for name, tensor in found.items()}


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_fault(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_object(path), dict)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file"):
        read_object(tmp_path)
