"""entangle: measure gradient entanglement in preference training.

The public names are imported on first use, so `import entangle` and `entangle --help` stay quick.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.version import __version__

if TYPE_CHECKING:
    from entangle.analysis.geometry import PairGeometry
    from entangle.analysis.regimes import Prediction, Regime, predict
    from entangle.commands.probe import ProbeResult, run_probe
    from entangle.commands.whatif import WhatIf, what_if
    from entangle.config import ProbeConfig
    from entangle.training import EntanglementCallback

_PUBLIC = {
    "EntanglementCallback": "entangle.training",
    "PairGeometry": "entangle.analysis.geometry",
    "Prediction": "entangle.analysis.regimes",
    "ProbeConfig": "entangle.config",
    "ProbeResult": "entangle.commands.probe",
    "Regime": "entangle.analysis.regimes",
    "predict": "entangle.analysis.regimes",
    "WhatIf": "entangle.commands.whatif",
    "run_probe": "entangle.commands.probe",
    "what_if": "entangle.commands.whatif",
}
__all__ = [
    "EntanglementCallback",
    "PairGeometry",
    "Prediction",
    "ProbeConfig",
    "ProbeResult",
    "Regime",
    "WhatIf",
    "__version__",
    "predict",
    "run_probe",
    "what_if",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'entangle' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


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
