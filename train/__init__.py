"""The trainer: cached features and texts in, checkpoints and a final model out. It never loads an encoder.

run.py           the command
training.py      what it runs: a stage, and the training loop; read it first
config.py        its options and presets
data/            from the cache to packed micro-batches
step.py          the forward pass and the totals of a step
optim.py         AdamW, learning rates, gradient clipping
distributed/     several processes that train one model: what they exchange, and how they share it
stage/           what a stage needs before its first step, its folder, and the line that ends it early
metrics.py       metrics.jsonl, the lines on the screen, trackers
evaluate/, report/, compare/, demo.py   the other commands
"""

import configs  # noqa: F401  first of all imports: see configs.signals
