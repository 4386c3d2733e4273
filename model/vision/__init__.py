"""The frozen vision encoder: images to patch features. The trainer never imports this package.

    in     RGB images, an entry of configs/encoders.yaml, trained or random weights
    out    features (n, M, V) float32 and the FeatureSpec that names everything they depend on

    config              the entry: tower, blocks, fit, pooling, precision
    encoder             load, encode, rebuild from what a space records
    pipeline            batches to packed rows, two in flight, without waiting for a GPU inside a batch
    replay              a computation on CUDA, recorded once and replayed
    clip_tower          open_clip's towers (CLIP, SigLIP), cut down to the blocks asked for
    hf_tower            transformers' towers (CLIP, SigLIP, DINOv2, DINOv3), cut down as well
    demo_tower          a tiny random tower that needs no download
    tail_blocks         the blocks behind a stored one, as the file that training reads
    weights             trained weights: find, read, rename, check, load
    activation_check    compares how the weights were trained with the model that loads them

Read encoder.py first.
"""
