"""Several processes: which part of a tensor this one holds, and how all of them agree.

In: parameters as DDP, FSDP2 or DeepSpeed hand them out.
Out: `Part` (a parameter's shard and where it lies), whole tensors, sums and decisions that are the same on all ranks.
Nothing here knows what pruning is, and everything here is the identity where there is one process.
"""
