"""Fuzz the commands: caches that a stranger has changed, and what each command does with them.

    python -m tests.integration.strangers.run FOLDER --first 0 --count 60

A seal is a checksum and no signature, so a stranger can write anything under a valid one. Pair number n is
one or two changes of a cache and a command on it, drawn from that number. The command must exit with a code
that it documents, print one line of error and nothing that a terminal acts on, end within limits of time and
memory, and leave everything outside the cache as it was.

    what is changed   values.py (JSON, index files), tables.py (Parquet), places.py (links, names, FIFOs)
    what runs         commands.py, in the folders of world.py
    what is judged    judge.py; run.py brings them together, a forked child for each pair. Read run.py first.
"""
