"""entangle: measure gradient entanglement in preference training.

The public names are imported on first use, so `import entangle` and `entangle --help` stay quick.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.version import __version__

if TYPE_CHECKING:  # the same once more, for type checkers; a test compares the two
    from entangle.analysis.geometry import PairGeometry as PairGeometry
    from entangle.analysis.jackknife import Estimate as Estimate
    from entangle.analysis.regimes import Prediction as Prediction
    from entangle.analysis.regimes import Regime as Regime
    from entangle.analysis.regimes import predict as predict
    from entangle.analysis.sets import SetGeometry as SetGeometry
    from entangle.analysis.sets import SetMove as SetMove
    from entangle.commands.probe import ProbeResult as ProbeResult
    from entangle.commands.probe import probe as probe
    from entangle.commands.probe import run_probe as run_probe
    from entangle.commands.whatif import WhatIf as WhatIf
    from entangle.commands.whatif import what_if as what_if
    from entangle.config import ModelOptions as ModelOptions
    from entangle.config import ProbeConfig as ProbeConfig
    from entangle.data import PreferencePair as PreferencePair
    from entangle.data import load_pairs as load_pairs
    from entangle.errors import UserError as UserError
    from entangle.measure.measured_set import MeasuredSet as MeasuredSet
    from entangle.models import Policy as Policy
    from entangle.models import load_policy as load_policy
    from entangle.training import EntanglementCallback as EntanglementCallback

PUBLIC = {
    "EntanglementCallback": "entangle.training",
    "Estimate": "entangle.analysis.jackknife",
    "MeasuredSet": "entangle.measure.measured_set",
    "ModelOptions": "entangle.config",
    "PairGeometry": "entangle.analysis.geometry",
    "Policy": "entangle.models",
    "Prediction": "entangle.analysis.regimes",
    "PreferencePair": "entangle.data",
    "ProbeConfig": "entangle.config",
    "ProbeResult": "entangle.commands.probe",
    "Regime": "entangle.analysis.regimes",
    "SetGeometry": "entangle.analysis.sets",
    "SetMove": "entangle.analysis.sets",
    "UserError": "entangle.errors",
    "WhatIf": "entangle.commands.whatif",
    "load_pairs": "entangle.data",
    "load_policy": "entangle.models",
    "predict": "entangle.analysis.regimes",
    "probe": "entangle.commands.probe",
    "run_probe": "entangle.commands.probe",
    "what_if": "entangle.commands.whatif",
}
"""The public API: every name, and the module that lends it."""

__all__ = ["__version__", *PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'entangle' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


def _check_losses_package() -> None:
    """Refuse a `losses` module that isn't ours: one beside the user's script would shadow it silently."""
    spec = importlib.util.find_spec("losses")
    ours = Path(__file__).resolve().parent.parent / "losses" / "__init__.py"
    found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if found != ours:
        raise ImportError(
            f"entangle needs its own package `losses` ({ours}), but Python finds {found or 'none'} first. "
            "Rename that file or folder (a losses.py beside your script shadows ours), or run from elsewhere."
        )


_check_losses_package()
