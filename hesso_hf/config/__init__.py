"""The user's choices, checked when they are made.

In: keywords, a recipe's `hesso:` part, or command-line flags.
Out: `HessoConfig`, every value of which is in its range, and the names that it knows.
"""

from .hesso_config import HessoConfig
from .names import DEFAULT_STRUCTURES, INSTEAD_OF, OPT_IN, SALIENCIES, STRUCTURES, structures_around

__all__ = [
    "DEFAULT_STRUCTURES",
    "INSTEAD_OF",
    "OPT_IN",
    "SALIENCIES",
    "STRUCTURES",
    "HessoConfig",
    "structures_around",
]
