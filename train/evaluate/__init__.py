"""Evaluation of a trained model: `python -m train.evaluate`.

In: the final model of a stage, and the cached features and texts of held-out samples.
Out: the loss, exact match for each question type, and the same with exchanged images ("blind"), printed and
saved as evaluation-<split>.json beside the model. `train.report` shows that file.

    questions.py   the samples to ask about, with their texts and media
    scoring.py     when an answer is right, and the means
    __main__.py    the command; read it first
"""
