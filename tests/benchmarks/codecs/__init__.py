"""What codecs cost and lose, on features of real pretrained transformers.

    __main__.py       sizes, speeds and errors of the codecs
    activations.py    the features that they are measured on
    reduced.py        what decoding JPEGs at a reduced scale changes, beside the codecs
    convert.py        rows a second of cache.convert
    paired.py         trainings on rows of each codec, compared: a command of its own

In: weights from Python packages. Out: one line for each figure. Read __main__.py first.
"""
