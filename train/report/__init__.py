"""The report of a training run: one HTML page.

    answers    evaluation-<split>.json, or train.evaluate if it has not run     page.py
    images     read from where the samples name them                            media.py
    the page   report.html, with the skeleton and charts of cache.view

In: a finished run, its cache, and the media files that still exist. Out: report.html, one file that loads
nothing. Read page.py first.
"""
