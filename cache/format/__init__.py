"""What a feature is, and the bytes of a row, of a shard and of the files that describe them.

    spec            FeatureSpec: everything that decides the values of a row, and its fingerprint
    codec           features (tokens, width) <-> the bytes of one row: fp16, int8, int4
    frame_sampling  the views of an image or a video, which name its rows
    media_marks     <image> and <video> in the text of a sample: which of them stand for media
    shard           what every shard format has in common; zarr.shard and tar_shard are the two
    tail            the blocks behind the stored one, which training computes: tail.safetensors
    space_info      space.json: the spec, the shard format and the rows per shard of one space
    checksums       crc32c, and the sha256 that each metadata file contains of itself
    gate            opens every file of a cache: regular, below the cache, of bounded size; then typed values
    parquet         a Parquet file, once its footer and pages are compared with what may be allocated
    embedded        media inside a Parquet or Arrow file, a tar or JSON: their names, and their bytes
    zarr            Zarr v3 shards, and the row codecs for zarr-python

In come features and facts about rows; out go bytes. No module here opens a cache, and none imports more than
numpy, pyarrow, msgspec and the checksum libraries, so `model` may import this package. Read spec.py first.
"""
