"""Zarr v3: shards that any Zarr reader opens, and the class with which zarr-python reads packed rows.

    shard   where rows, checksums and the index are in a shard, and the zarr.json beside it; read this first
    codec   the int8 and int4 row codecs for zarr-python, found by an entry point

Rows go in and out as bytes. `shard` needs no Zarr library; `codec` is for zarr-python, and loaded by its
path (see nanomolmo2/codec.py).
"""
