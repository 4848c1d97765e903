"""The command line: `hesso-hf inspect|plan|prune|sweep|export|eval|report|survey|quickstart`.

In: flags and YAML recipes.
Out: what is printed; the work is done by the folders above, each command in a few lines.
Only this folder prints, and what shows the progress of a run.
"""
