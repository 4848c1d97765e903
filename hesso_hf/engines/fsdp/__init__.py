"""FSDP2: pruning state beside a sharded checkpoint, and the smaller model written from DTensor shards.

In: a trainer's arguments and accelerator, then its run; a folder.
Out: `Fsdp2Engine`, which a trainer asks; the pruning state, snapshots in safetensors, the exported model.
"""
