"""What a user can mend in a run's configuration."""

from __future__ import annotations


class ConfigError(ValueError):
    """A preset, a `--set` or a saved configuration that cannot be used; the message says what to change."""
