"""The proof: which indices belong to a unit, found on a tiny random model and confirmed there.

In: the axes of a model class and a structure.
Out: a `Proof` a structure: its groups, or the reason why it stays whole.
Found by gradients that are exactly zero, confirmed by zero units, cut, compare (DESIGN: groups, exact removal).
"""
