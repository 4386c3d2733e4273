"""Before a job starts: which media there are, what is to do, and what it will cost.

    in      the samples of data sets, the media table, the rows of a space
    out     a Plan: the tasks of the job, and what needs no work

    plan.py       sorts sources: reused, failed before, missing, or to do
    estimate.py   bytes and seconds of a plan, and whether the disk can hold it

Read plan.py first.
"""
