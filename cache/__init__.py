"""The feature cache: arrays, bytes and tables; no torch, no Ray.

In this folder, files are code and folders are data: it is also the default place of a cache.

    spec, codec, zarr_codec      what a feature is, and how a row of them is packed
    layout                       every path, whole files, seals
    tables                       samples and media
    zarr_shard, commits, space   the bytes of a shard, which rows exist, space.json
    locks                        who may write
    writer, reader               rows in, rows out
    ls, verify, gc               commands; survey, damage, repair, garbage, rewrite are what they stand on
"""
