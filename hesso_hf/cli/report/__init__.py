"""Report: what a smaller model's `pruning_report.json` says, as a table, as JSON, or as a page.

In: folders of smaller models, and the training log where there is one.
Out: tables on the terminal, or one HTML file that needs nothing beside it.
"""
