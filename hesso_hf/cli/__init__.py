"""The command line: `hesso-hf inspect|prune|export|eval|report|plan|survey|quickstart`.

In: flags and YAML recipes.
Out: what is printed; the work is done by the folders above, each command in a few lines.
Only this folder prints.
"""
