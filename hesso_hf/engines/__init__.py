"""Engines: what Accelerate's engines hold of a model, and how state and the smaller model are saved from there.

`fsdp/` for FSDP2's DTensors, `deepspeed/` for ZeRO's flat buffers and masters; neither knows of the other.
In: a trainer's arguments and accelerator, then its run; a folder.
Out: an `Engine`, the one object that a trainer asks: it prepares, clips, saves, loads and exports as its kind does.
"""
