"""One encode job: who encodes which source, and what became of each.

    in      the plan's tasks (encode.plan), a WorkerConfig (encode.worker.config)
    out     one ledger record for each source, and one exit code

    tracker, culprits   which worker has which source; which file crashed or hung a worker
    inline              runs one worker in this process
    pool, slots         run workers on nodes, replace those that crash, hang or leave
    ray_pool            the only file that imports Ray; ray_session: a Ray that nobody else can reach
    cluster, nodes      which nodes of a cluster may have workers, and how many
    unread              sources that one node could not read
    resources           the workers of one machine and their threads; measures the encoder
    progress, totals    the progress and the last lines; what became of all parts of a job

Read tracker.py first, then inline.py and pool.py. `encode.job` puts them together.
"""
