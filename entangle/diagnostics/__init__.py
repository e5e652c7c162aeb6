"""Diagnostics of a pair from the literature, to set beside its geometry: numbers per pair, computed on request.

    compute(["ches", "edit_distance"], policy, batch)  ->  {"ches": (B,), "ches_norm": (B,), "edit_distance": (B,)}

`DIAGNOSTICS` names them all, with formula, source and cost. One file each; a diagnostic is a function of a `Reading`
under the decorator `diagnostic`. A file that lies here is taken up.
"""

import importlib
import pkgutil

from entangle.diagnostics.base import (
    DIAGNOSTICS,
    Diagnostic,
    columns_of,
    compute,
    diagnostic,
    resolve,
)
from entangle.diagnostics.correlations import rank_correlations, summarise_diagnostics
from entangle.diagnostics.reading import Reading

__all__ = [
    "DIAGNOSTICS",
    "Diagnostic",
    "Reading",
    "columns_of",
    "compute",
    "rank_correlations",
    "diagnostic",
    "resolve",
    "summarise_diagnostics",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
