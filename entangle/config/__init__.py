"""Options of every command: one dataclass each, filled from YAML, then from flags.

Names are TRL's and transformers' where they have one.
"""

from entangle.config.base import (
    DEFAULT_LOSSES,
    EMBEDDED,
    DataOptions,
    InputOptions,
    Losses,
    ModelOptions,
    RunOptions,
    build_losses,
    check_at_least,
    fingerprint,
    parse_loss,
)
from entangle.config.files import YamlOptions, parse, read_yaml
from entangle.config.losses import LossesConfig
from entangle.config.probe import ProbeConfig
from entangle.config.rft import RftConfig
from entangle.config.tokens import TokensConfig
from entangle.config.whatif import WhatIfConfig

__all__ = [
    "DEFAULT_LOSSES",
    "EMBEDDED",
    "DataOptions",
    "InputOptions",
    "Losses",
    "LossesConfig",
    "ModelOptions",
    "ProbeConfig",
    "RftConfig",
    "RunOptions",
    "TokensConfig",
    "WhatIfConfig",
    "YamlOptions",
    "build_losses",
    "check_at_least",
    "fingerprint",
    "parse",
    "parse_loss",
    "read_yaml",
]
