"""Write a trained model as a Hugging Face folder that transformers loads with its own classes.

    in     the `final` folder of a run, the encoder's weights; no feature cache
    out    LlavaForConditionalGeneration: weights, config, processor, chat template, model card

    exporter    what `__main__` runs: what cannot be exported, then write, compare, rename
    towers      a vision tower as transformers' CLIP or SigLIP
    folder      weights and configs of the whole model
    template    the chat template, and a tokenizer with which it gives the tokens of training
    compare     the folder, loaded by transformers, against our own model
    card        README.md of the folder

Read exporter.py first. Nothing is left at the place asked for unless the comparison holds.
"""
