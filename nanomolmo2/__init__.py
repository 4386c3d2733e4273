"""Read a feature cache in your own programs.

    unpack     stored rows to features in torch, on any device        unpack.py
    codec      zarr-python reads int8 and int4 arrays by it           codec.py

Nothing is imported here, so that `codec` works beside another package named `cache`.
"""
