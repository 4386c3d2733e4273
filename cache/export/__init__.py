"""Export a space as standard files: `python -m cache.export`.

    in       a feature space, and the samples of data sets on request
    out      WebDataset tars, or safetensors files, that need nothing of this package

    __main__.py    the command: options, plan, free space, the folder and its final name
    rows.py        rows alone: which rows, which file, tar members and safetensors headers
    samples.py     data sets: one tar sample for each image, video or tuple of them, with text and features

Read __main__.py first.
"""
