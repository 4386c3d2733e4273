"""One stage of a run: what it starts with, and what it leaves on disk.

    setup.py         space, model and data, before the first step
    files.py         names of what its folder has
    run_folder.py    that folder: created, locked, checked before it is resumed
    checkpoint.py    what a resumed run continues from: files, and which of them count
    shards.py        its tensors, written by each process in parts, read by any number of processes
    saver.py         writes it while training goes on
    origin.py        what `--from` names: a run, a stage, a checkpoint or a finished model
    vision_tail.py   the encoder's last blocks, as a space has them
    records.py       what it keeps beside its weights, and room on the disk for all of it
    card.py          what the model was trained on, for model.export
    ending.py        how a training ends early: in one line, with the command that goes on
    less_memory.py   the settings that need less memory, in order

Read run_folder.py first.
"""
