"""Page: what a smaller model's `pruning_report.json` says, as one HTML file that needs nothing beside it.

In: reports of smaller models, and the losses of their runs where there are some.
Out: HTML. No framework is imported for it.
"""
