"""What caching gives a training, and whether loaders keep up with GPUs: `python -m tests.benchmarks.train`.

    fed.py          devices that sleep take rows at a GPU's pace: 1, 4 and 8 ranks; warm, cold, remote
    ranks.py        the processes of fed.py
    far_server.py   the web server that they read from, 30 ms away
    models.py       the sizes of a run, and a cut ViT-L/14@336 and Qwen3 in real proportions
    loops.py        ways to train the same model on the same images: padded or packed, encoder or cache
    speed.py        those ways in turns, and what waiting, copying and unpacking take of a step
    break_even.py   wall time and disk of several experiments on the same images

Figures are ratios of what one run measured side by side; docs/BENCHMARKS.md has them. Read fed.py first.
"""
