"""Pure numbers, no model and no file: geometry, regimes, losses judged, statistics, ledger."""
