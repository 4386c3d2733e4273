"""Measurements, each a command: `python -m tests.benchmarks.<name>`. docs/BENCHMARKS.md has their results.

    store, containers, scale       reading and writing rows, formats, ten million rows
    loaders                        batches of samples for a trainer
    codecs                         the error of codecs; codecs.paired: its effect on a trained model
    move, care, remote             merge and convert, verify, remote caches
    encode                         jobs beside what the machine allows, and beside other libraries
    real_size                      encoding and training with models of the real size
    train                          devices fed at a GPU's pace, speed beside other loops, break-even

A benchmark prints one line for each requirement. bench.py has what they share, peers/ the other libraries.
"""
