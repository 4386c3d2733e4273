"""Media in, feature rows out: the only package that runs the vision encoder over data sets.

    in      data sets                 sources/    one file for each kind of data set
    plan    samples -> sources to do  plan/       sorts them, and says what they cost
    work    sources -> rows           worker/     reads, decodes, encodes, commits; downloads by download/
    drive   tasks -> workers          driver/     inline or over Ray; records what became of each source
    out     a space and the ledger    cache/
    check   stored against live       check/      encodes some media again and compares

`run.py` is the command, `job.py` the steps of one job. Read run.py first, then job.py.
"""

import configs  # noqa: F401  first of all imports: see configs.signals
