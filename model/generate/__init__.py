"""Answers about images and videos that are in no cache.

    in     a trained model, media files, a question
    out    the answer, on standard output alone

    options    what the command takes, checked without torch
    live       files to features, rounded as the space of the model's training rounds them; then the answer

`python -m model.generate` runs it. Read live.py first.
"""
