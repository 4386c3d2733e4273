"""One worker: sources in, committed rows out. It runs inline, or inside a Ray actor.

    SourceTask        a source to encode, from the driver                                    messages.py
      -> MediaItem    one source inside the worker; every step below fills in its part       media_item.py
      -> EncoderInput one view of it: an image, or a frame of a video; read and decoded by   prefetch.py,
                      in threads (decoders.py) or processes (process_decoder.py)
      -> NewRow       one view's features: batched, encoded and packed by                    worker.py
      -> RowFacts     what a commit records of a row; written to a shard and committed by    row_writer.py
    Outcome           the result of the source, back to the driver                           messages.py
      -> MediaRecord  its line in the ledger

Any step may set `MediaItem.failure`, a `Failure(stage, reason)`. The item then skips the other steps, its
outcome carries the failure, and the driver writes it to the ledger. A source is `ok` only once all its rows
are committed. Read media_item.py first, then worker.py.
"""
