"""Other people's formats: in, files of records; out, samples with their media.

    bytes  -> Line     stream (JSON, CSV, Parquet), strict_json, json_window, coco
    values -> Record   reading (the formats), turns (conversations, marks), naming (media), points, keys
    Record -> Sample   samples; media_files finds the files, URLs and data: URIs that records name

record has the types: read it first. account counts what a source used, ignored, left out and refused. Every
key of a record is used, counted in the account, or named in a fault.
"""
