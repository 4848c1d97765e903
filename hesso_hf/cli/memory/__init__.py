"""Memory: what training a model with a recipe needs on each GPU, before it is tried.

In: the sizes of a model, a recipe, an engine.
Out: bytes a GPU by what they are for, the smallest plan that fits.
"""
