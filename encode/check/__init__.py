"""Checks that stored features are what the encoder computes.

    stored   `encode.run --check N`: stored rows against rows encoded now, and the loss of every codec
    loss     `python -m encode.check.loss`: a model's loss on stored features against its loss on new ones
    losses   computes both
    media    loads the media of a space again: stored rows, bytes, pixels
    report   the printed report of `stored`

In: a cache, and the files or URLs that it was made from. Out: a report, and exit code 1 if features differ.
Read media first.
"""
