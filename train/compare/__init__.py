"""Compare runs: settings that differ, curves, scores with intervals, and cost.

    read      the folder of a stage, which somebody else may have made     runs.py
    differ    settings, and the answers of two runs to the same questions  differences.py
    show      tables on the terminal, and a page                           tables.py, page.py, compare.html

In: folders of stages, finished or not. Out: tables, and compare.html, one file that loads nothing. Nothing is
trained, evaluated or read from a cache. Read tables.py first.
"""
