"""What several tests use: tiny models, short runs, worker processes, a Hub on the loopback interface."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository: worker processes find `tests` and the package under test from here."""
