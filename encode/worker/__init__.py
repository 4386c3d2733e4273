"""One worker: sources in, committed rows out. It runs inline, or inside a Ray actor.

    driver  --SourceTask-->  prefetch    read, download, decode     a MediaItem a source     prefetch.py
                             worker      EncoderInputs -> batches   -> MediaItem.rows        worker.py
                             row_writer  NewRows -> shards, commit  (RowFacts: what a commit  row_writer.py
    driver  <--Outcome-----                                         records of a row)
    ledger  <--MediaRecord

A MediaItem stays one object from reading to commit; each step fills in its part. A `Failure(stage, reason)`
raised at any step is set on the item, carried by the outcome, and written to the ledger. A failed source
skips the remaining steps. A source is `ok` only once all its rows are committed.

messages.py holds what driver and workers exchange, config.py how a worker is made. Read media_item.py first,
then worker.py.
"""
