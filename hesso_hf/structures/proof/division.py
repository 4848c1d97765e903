"""Divisions: in which ways a structure's axes may be cut into units, the finest first.

Mostly a unit is the smallest change of the config sizes: one key-value head with its queries, one channel. Heads that
work in pairs only go in pairs, an MLP size may count gates and ups, and heads may lie in runs that stay equally long.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import HessoError
from ...hf_models.sizes import ConfigSizes
from ..units import num_units

_BUNDLES = (1, 2, 4)


@dataclass(frozen=True)
class Division:
    """How axes are divided into units.

    Attributes:
        bundle: how many of the smallest changes of the config sizes a unit is.
        strided: whether the units are taken to lie strided where they might as well lie in blocks.
    """

    bundle: int = 1
    strided: bool = False


def divisions(structure: str, sizes: ConfigSizes) -> list[Division]:
    """List the divisions to try; with bundles only those that leave two units at least."""
    if structure not in ("attention_heads", "mlp_channels"):
        return [Division()]
    try:
        units = num_units(structure, sizes)
    except HessoError:  # the proof says why
        return [Division()]
    bundles = [bundle for bundle in _BUNDLES if bundle == 1 or (units % bundle == 0 and units // bundle > 1)]
    return [Division(bundle, strided) for bundle in bundles for strided in (False, True)]
