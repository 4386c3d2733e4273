"""One HTML page that shows a feature space, and the parts that all our pages are made of.

    rows        which rows are shown and measured         sampling.py
    figures     principal directions, norms, channels     statistics.py
    media       sources, sizes, captions, thumbnails      media.py
    all of it   Findings                                  collect.py
    the page    Findings -> HTML                          sections.py, view.html
    any page    skeleton, charts, images, tables          page.py, charts.py, thumbnails.py, kit.html

In: one space of a cache. Out: one file that loads nothing. `train.report` uses the last line too. Read
collect.py first.
"""
