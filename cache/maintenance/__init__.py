"""Check, repair, compact, count and copy caches, for the commands ls, verify, gc, merge and convert.

    check     a cache -> findings                                 checks.py, row_checks.py
    repair    damaged files out, intact rows to new shards        repair.py, compaction.py
    collect   unfinished files, rows that no sample mentions      garbage.py, compaction.py
    open      media files that this machine encoded               local_media.py
    count     spaces, coverage of data sets, failures             inventory.py
    copy      rows and tables of one cache to another             copy_rows.py, merge_tables.py
    convert   fp16 rows to another codec or pooling               convert_rows, compiled_codec, processes

In come a CacheRoot and readers of `cache.store`; out go findings, summaries and plans, which the commands
print. Whatever changes a space holds its driver lock. Read checks.py first.
"""
