"""Check an installation before training: do the parts work together, and do they fit?

    in     an encoder entry, a language model, a connector, the settings of configs/train.yaml
    out    a parameter table, memory and days of each stage, one-line verdicts on GPU memory and disk

`report` is what the command runs: it loads the models, passes one image through all of them, and prints.
`memory` is the arithmetic behind it: bytes and floating-point operations of one training step.
`tail` is its part for the encoder's last blocks, if training computes them.
`tables` applies it to every stage and hardware preset of configs/train.yaml.
Read memory.py first: its figures are estimates, and its docstring says what they are made of.
"""
