"""What benchmarks measure ours against, each as its own documentation recommends. From the `[bench]` extra.

    stores       raw `preadv` and other stores: rows by number                       for store.py
    store_mds    MosaicML's MDS, in a process of its own                             for stores.py
    loaders      data sets of Lance and of Hugging Face `datasets` for a DataLoader  for loaders.py

A library that is not installed prints `skipped`. Read stores.py first.
"""
