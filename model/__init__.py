"""The models: a frozen vision encoder, and the connector and language model that are trained.

    media        files to RGB pixels                          vision       RGB pixels to features (frozen)
    language     language model, tokenizer, chat template     attention    many samples in one sequence
    io           devices, downloads, models on disk           verify       the command that checks it all
    export       a trained model as a Hugging Face folder

    vlm          connector and language model: what is trained
    connector    feature width to language width
    tail         the encoder's last blocks, if the cache has what precedes them
    quantize     feature rows packed and unpacked on any device
    inference    answers from features
    generate     the command: answers from images and videos

The trainer never imports `vision`. Read vlm.py first.
"""

import configs  # noqa: F401  first of all imports: see configs.signals
