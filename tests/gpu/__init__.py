"""What a machine with an NVIDIA GPU shows in minutes: are the CUDA paths right, and how fast are they.

    python -m tests.gpu              # make gpu; needs no network, no Ray and no video library
    python -m tests.gpu --cpu        # the same code, tiny: what `make test` runs

Correctness: encoding.py (towers, codecs, batches), attention.py (trees and kernels), training.py (loader,
autocast, resume, NCCL, generating). Speed: encode_speed.py, train_memory.py and train_speed.py, on the
caches of worlds.py. Every line is `name  measured  required  ok|short`. Read lines.py first.
"""
