"""Evaluation of a trained model: `python -m train.evaluate`.

In: the final model of a stage, and the cached features and texts of held-out samples.
Out: the loss and the scores of each question type, and the same with exchanged images ("blind"), with 95 %
intervals: printed, saved as evaluation-<split>.json beside the model, and added to its card.json.

    questions.py                   the samples to ask about, with their texts and media
    metrics.py                     which metric judges which question
    texts.py  vqa.py  pointing.py  the metrics, each with its source
    scoring.py  intervals.py       means over questions, and how far they could be off
    result.py                      the file, the table, the rows of the card
    evaluation.py                  what the command runs; read it first
"""
