"""Engines: what Accelerate's engines hold of a model, and how state and the smaller model are saved from there.

`fsdp/` for FSDP2's DTensors, `deepspeed/` for ZeRO's flat buffers and masters; neither knows of the other.
In: a prepared model, a `PruningProcess`, a folder.
Out: pruning state in files of our own, the smaller model from shards; nothing else in the library knows of engines.
"""
