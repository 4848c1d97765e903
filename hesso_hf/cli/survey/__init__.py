"""Survey: which structures can be pruned in every model type that Transformers has, each tried.

In: the model types.
Out: `docs/architectures.json` and its page.
"""
