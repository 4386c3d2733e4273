"""How near encode jobs come to what the machine allows: `python -m tests.benchmarks.encode`.

    photos.py      real photographs of 400 to 2,000 pixels, saved as JPEG files
    jobs.py        a job as the command runs it, and the speed of its parts, each alone
    bound.py       jobs beside their bound: ViT-L and a cheap tower on the CPU, over Ray, a sleeping GPU
    peers.py       other libraries on the same photographs with the same tower, in processes of their own
    peer_loops.py  what runs in these processes

A speed is the slope between a short and a long job, so that no start-up counts; start-up is printed beside
it. Figures are ratios of what one run measured in turns; docs/BENCHMARKS.md has them. Read bound.py first.
"""
