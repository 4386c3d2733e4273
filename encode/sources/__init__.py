"""Data sets: in, files or a hub repository; out, samples that name their media.

    catalogue   names of --dataset -> data sets
    folder      a folder of images and videos, with optional texts; folder_files walks it
    json_file   a file of records, and how lines of records become samples
    tables      Parquet and Arrow files with media inside; table_columns says what a column is for
    webdataset  tars of images and texts
    hub_files   the files of a data set of the Hugging Face hub, or of its local copy
    pixmo       Ai2's PixMo sets, whose images are on the web; pixmo_rows reads one row
    demo        drawings made here; demo_drawings and demo_videos draw them

To add a kind of data set, write one file with a class like `folder.FolderDataset`: `name`, `needs_sizes`, and
`samples()`, which yields `cache.store.samples.Sample`s with the same ids each time and counts in an
`encode.records.account.Account` what it does not use. Then add the kind to `Source`, `_FIELDS` and
`_OPENERS` in catalogue.py, add an entry to configs/datasets.yaml, and write a test like
tests/encode/sources/test_folder.py.
"""
