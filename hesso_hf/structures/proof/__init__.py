"""The proof: which indices belong to a unit, found on a tiny random model and confirmed there.

In: the axes of a model class and a structure.
Out: a `Proof` a structure: its groups, or the reason why it stays whole.
Found by gradients that are exactly zero, confirmed by zero units, cut, compare (DESIGN: groups, exact removal).
"""

from typing import TYPE_CHECKING

from ... import hand_on

if TYPE_CHECKING:
    from .prove import proved_groups
    from .result import Proof

__all__ = ["Proof", "proved_groups"]
__getattr__ = hand_on(__name__, {"Proof": "result", "proved_groups": "prove"})
