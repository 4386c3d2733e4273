"""Several processes that train one model, as torchrun starts them.

    with process_group() as group: ...                  group.py   exchange small values, end together
    shard(vlm, group, device, "full", offload=False)    shard.py   share weights and gradients: torch's FSDP2

In: the environment variables of torchrun, and a model that every process has built. Out: that model, of which
each process keeps a part, and gradients summed over all processes. Read group.py first.
"""
