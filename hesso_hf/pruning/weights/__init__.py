"""Groups bound to parameters: scaling, masking, sums and snapshots of what this process holds.

In: `PruningGroups` and the parameters, whole or in shards, with LoRA's factors where there are any.
Out: `BoundGroups` (one multiplication an axis scales all units), `Snapshot` (weights and optimizer state to return to).
No unit is chosen here.
"""
