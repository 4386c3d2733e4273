"""The feature cache: arrays, bytes and tables; no torch, no Ray.

In this folder, files are code and folders are data: it is also the default place of a cache.

    spec         what a feature is, and its fingerprint       layout      every path, whole files, seals
    codec        how a row is packed                          tables      samples, media
    zarr_shard   the bytes of a shard                         space       space.json
    commits      which rows exist                             locks       who may write
    writer       fill and commit shards                       reader      read rows, checked
    ls  verify  gc                                            look after it
"""
