"""The feature cache: arrays, bytes and tables; no torch, no Ray.

In this folder, files are code and folders are data: it is also the default place of a cache.

    spec, codec, zarr_codec      what a feature is, and how a row of them is packed
    layout                       every path, whole files, seals
    tables                       samples and media
    container                    what a shard is: zarr_shard or wds_shard
    commits, space               which rows exist, space.json
    locks                        who may write
    writer, reader               rows in, rows out
    ls, verify, gc, merge, convert, export, share, view
                                 commands; survey, needs, damage, repair, garbage, rewrite, copying,
                                 printing, export_* and view_* are what they stand on
    remote_*                     the same from https, s3 and hf
"""
