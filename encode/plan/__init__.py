"""Before a job starts: which media there are, what is to do, and what it will cost.

    in      the samples of data sets, the media table, the rows of a space
    out     a Plan: the tasks of the job, and what needs no work

    media.py        the distinct sources that samples mention; parts of them, where they are too many
    numbering.py    texts as numbers, and in little memory
    known.py        what the media table says about the sources
    plan.py         sorts sources: reused, failed before, missing, or to do
    tasks.py        the tasks and records of a plan, made one at a time
    probe.py        what some of the sources cost; probe_items.py decodes them in a process of its own
    estimate.py     bytes and seconds of a plan; fits.py: whether the disk can hold it

Read media.py first, then plan.py. All of them work on columns: ten million sources take less than 1 GB.
"""
