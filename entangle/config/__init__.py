"""Options of every command: one dataclass each, filled from YAML, then from flags.

Names are TRL's and transformers' where they have one.
"""

from entangle.config.across import AcrossConfig
from entangle.config.base import (
    DEFAULT_LOSSES,
    EMBEDDED,
    DataOptions,
    InputOptions,
    ModelOptions,
    Options,
    RecordedOptions,
    Replaced,
    RunOptions,
    check_at_least,
    hash_options,
)
from entangle.config.command_line import check_names, parse
from entangle.config.compare import CompareConfig
from entangle.config.doctor import DoctorConfig
from entangle.config.files import YamlOptions, read_yaml
from entangle.config.filter import Condition, FilterConfig, Rule, parse_rule, parse_weight
from entangle.config.forecast import ForecastConfig
from entangle.config.joint import JointConfig
from entangle.config.losses import LossesConfig
from entangle.config.objects import build_losses
from entangle.config.probe import ProbeConfig
from entangle.config.report import ReportConfig
from entangle.config.rft import AnswerOptions, RftConfig
from entangle.config.specs import construct, parse_spec, to_spec
from entangle.config.sweep import SweepConfig
from entangle.config.tokens import TokensConfig
from entangle.config.train import TrainConfig
from entangle.config.whatif import WhatIfConfig
from entangle.config.why import WhyConfig

__all__ = [
    "DEFAULT_LOSSES",
    "EMBEDDED",
    "AcrossConfig",
    "AnswerOptions",
    "CompareConfig",
    "Condition",
    "DataOptions",
    "DoctorConfig",
    "FilterConfig",
    "ForecastConfig",
    "InputOptions",
    "JointConfig",
    "LossesConfig",
    "ModelOptions",
    "Options",
    "ProbeConfig",
    "RecordedOptions",
    "Replaced",
    "ReportConfig",
    "RftConfig",
    "Rule",
    "RunOptions",
    "SweepConfig",
    "TokensConfig",
    "TrainConfig",
    "WhatIfConfig",
    "WhyConfig",
    "YamlOptions",
    "build_losses",
    "check_at_least",
    "check_names",
    "construct",
    "hash_options",
    "parse",
    "parse_rule",
    "parse_spec",
    "parse_weight",
    "read_yaml",
    "to_spec",
]
