"""Where models come from and go to: devices, the Hugging Face hub, folders of trained models.

    device         pick the device and its precision
    hub            download an encoder's weights, or fail within seconds with a way out
    saved_model    a trained model: save, load without the encoder
    runs           find it by run and stage, and read what it was trained on, without torch
    base_model     the model that saved adapters belong to: recorded, found, compared
    run_files      the files of a run that somebody else made: no links, bounded, typed
    tower_config   what the JSON files of a folder say about its vision tower
    tower_folder   the tensors of that tower, and their hash
    tensors        the hash of named tensors, and seeded random ones

Read saved_model.py first.
"""
