"""The documents: what they promise exists, and how they are worded.

    test_docs.py   commands parse, files and messages exist, the README's tree is that of the folders
    wording.py     python -m tests.docs.wording lists sentences that readers stumble over

Both read README.md and docs/*.md; wording.py also reads the sources.
"""
