"""Named tensors: the hash depends on every bit, and random ones have equal bits on every machine.

weights = seeded_weights((3, 5), std=2.0, seed=7, name="a.weight")
hash_tensors({"a.weight": weights})
"""

from __future__ import annotations

import torch

from model.io.tensors import hash_tensors, seeded_weights


def test_random_weights_have_equal_bits_on_every_machine() -> None:
    weights = seeded_weights((3, 5), 2.0, seed=7, name="a.weight")
    assert (
        hash_tensors({"w": weights})
        == "97b73812e25f583ebfc15caeaf09fdc184b668ec0ba550b76fa48334bc76ec95"
    )
    large = seeded_weights((400, 500), 2.0, seed=7, name="b.weight")
    assert abs(large.mean()) < 0.02 and abs(large.std() - 2) < 0.02
    assert not torch.equal(large, seeded_weights((400, 500), 2.0, seed=8, name="b.weight"))


def test_the_hash_depends_on_name_dtype_shape_and_every_bit() -> None:
    x = torch.arange(6, dtype=torch.float32)
    flipped = x.clone()
    flipped.view(torch.int32)[3] ^= 1
    variants = [
        {"a": x},
        {"b": x},
        {"a": x.view(2, 3)},
        {"a": x.half()},
        {"a": flipped},
        {"a": x, "b": x},
    ]
    assert len({hash_tensors(v) for v in variants}) == len(variants)
    assert hash_tensors({"a": x, "b": flipped}) == hash_tensors({"b": flipped, "a": x})
    assert hash_tensors({"a": x.view(2, 3).T}) == hash_tensors({"a": x.view(2, 3).T.contiguous()})
