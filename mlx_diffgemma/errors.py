"""The mistakes a user can make, one class per kind. Each message names the value and the remedy, on one line.

All are ``ValueError`` (a missing path stays ``FileNotFoundError``); the commands print them and exit with status 2.
"""

from __future__ import annotations


class UserError(ValueError):
    """Base of every error that the person at the keyboard can mend."""


class ConfigError(UserError):
    """config.json or generation_config.json says something this library cannot run."""


class CheckpointError(UserError):
    """A weight file is damaged, or its tensors are not exactly those that the config calls for."""


class OptionError(UserError):
    """An option is unknown, out of range, or not available here."""


class MemoryBudgetError(UserError):
    """The model cannot fit on this machine."""


class BackendError(UserError):
    """The backend asked for is not installed, or this machine cannot run it."""
