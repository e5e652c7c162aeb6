"""Losses, settings and seeds side by side: trained from one start, judged on the same held-out pairs and posts."""

from entangle.commands.compare.cells import Cell, cells_of
from entangle.commands.compare.run import CompareResult, run_compare

__all__ = ["Cell", "CompareResult", "cells_of", "run_compare"]
