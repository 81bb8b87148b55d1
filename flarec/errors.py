"""Errors that users see: each says what is wrong, where, and what to do.

Every class is a `ValueError`, so callers can catch one family. The command line prints the message alone and exits with
`exit_code`: 2 for wrong usage (arguments, data, recipes, directories), 1 for a failure while working.
"""

from __future__ import annotations


class FlarecError(ValueError):
    """Base of all errors for users."""

    exit_code = 1


class UsageError(FlarecError):
    """An argument, option or combination of them cannot be used."""

    exit_code = 2


class DataError(UsageError):
    """A data file or one of its records cannot be used."""


class RecipeError(UsageError):
    """A recipe key or value is unknown or out of range."""


class CheckpointError(UsageError):
    """A directory is not a checkpoint that this version can open or write."""


class CaptureError(FlarecError):
    """A model could not be captured: names the module class, the layer and the adapter row that is missing."""


class PassError(FlarecError):
    """A pass found nothing to rewrite, or could not rewrite what it found: names the pass and the node."""


class PropertyError(FlarecError):
    """A property that a pass claims does not hold: names the property, the pass and the node."""


class LayoutError(FlarecError):
    """A layout contradicts itself (tokens, documents, blocks)."""


class TrainingError(FlarecError):
    """Training cannot go on (for example a loss that is not finite)."""


class ToldElsewhere(FlarecError):
    """A rank of a run on several stops for a reason that another one tells: the command line prints nothing."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class GenerationError(UsageError):
    """A generation request cannot be served (for example a prompt longer than the context)."""


class FlarecWarning(UserWarning):
    """Something that a user should know, although nothing stops: the command line prints it on one line."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says."""
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError) and lines:  # whose text is the key alone
        return f"{lines[0]} is not there"
    return lines[0] if lines else type(error).__name__
