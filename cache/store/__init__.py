"""One feature cache on a local disk.

    write    Space.create -> ShardWriter.extend -> commit           space.py, writer.py
    read     FeatureReader.lookup -> read_into                      reader.py, shard_files.py
    find     commits -> row index -> (optional) index file          commits.py, row_index.py, index_file.py
    text     samples (what is said), ledger (source -> key, or why it failed)
    both     which samples have which rows                          references.py
    safety   atomic files, no link is followed, one writing job     files.py, locks.py

In come packed rows, samples and media records; out go row numbers and the bytes of rows. A row exists once
the commit file of its shard exists. Nothing else makes it visible. `paths.py` names every file. Read
commits.py first.
"""
