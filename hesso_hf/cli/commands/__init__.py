"""One file a command: its flags, and what it does and prints.

In: parsed flags.
Out: an exit code. Frameworks are imported inside `run`, after the flags and the files they name were checked.
"""
