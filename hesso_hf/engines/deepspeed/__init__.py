"""DeepSpeed ZeRO 1 to 3: where the masters of a parameter lie, steps around its engine, state, export.

In: a trainer's arguments and accelerator, then its run; a folder.
Out: `DeepSpeedEngine`, which a trainer asks; holdings for `pruning/weights`, checkpoints (ZeRO's own and universal
ones), the exported model.
DeepSpeed is imported only when a run uses it.
"""
