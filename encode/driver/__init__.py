"""One encode job: who encodes which source, and what became of each.

    in      the plan's tasks (encode.plan), a WorkerConfig (encode.worker.config)
    out     one ledger record for each source, and one exit code

    tracker.py      assigns sources to workers and collects their outcomes; writes the ledger; stops the job
                    when too many failures are our own
    inline.py       runs one worker in this process
    ray_pool.py     runs workers as Ray actors, and replaces those that crash or hang
    ray_session.py  the folder and the token of a Ray that nobody else can reach
    culprits.py     decides which file crashed or hung a worker
    resources.py    chooses the number of workers, and measures the encoder
    progress.py     prints the progress and the last lines

Read tracker.py first, then inline.py. `encode.job` puts them together.
"""
