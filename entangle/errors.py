"""Errors that are the user's to mend: the command line prints their message and exits with status 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was given can't be used: the message says what was expected, what came, what to do."""


class ConfigError(UserError):
    """An option or a key of a YAML file isn't known, or its value makes no sense."""


class RunError(UserError):
    """A run folder can't be used: it holds another run, isn't complete, or can't be written."""


class ModelError(UserError):
    """A model, adapter, reference or parameter choice can't be used: expected, came, what to do."""


class DataError(UserError):
    """The data can't be used: the message says what was expected, what came and what to do."""
