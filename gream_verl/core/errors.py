"""The error that a user can act on."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and the remedy, and is shown without a traceback."""
