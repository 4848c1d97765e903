"""Settings of tests that draw their cases: the same ones each time, however slow the machine is."""

from hypothesis import settings

decided = settings(deadline=None, derandomize=True, database=None, max_examples=60)
few = settings(decided, max_examples=12)
