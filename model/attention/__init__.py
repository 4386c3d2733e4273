"""Attention over packed batches: many samples in one sequence, each computed as if it were alone.

    in     a PackedBatch: token ids, positions, places of features, targets, and the units of attention
    out    attention outputs, as transformers asks for them in every layer

`batch` is the input, `plan` what is computed once a batch, `kernels` the attention itself: padded SDPA on any
device, a variable-length kernel on CUDA. Read plan.py first: it defines unit, tree, branch and prefix.
"""
