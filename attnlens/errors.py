"""The errors a user can meet. Each message names the thing at fault and the way out."""

from __future__ import annotations


class AttnlensError(Exception):
    """Base of every error that attnlens raises on purpose."""


class InputError(AttnlensError, ValueError):
    """What was given cannot be used: empty text, ids out of range, unequal lengths, NaN."""


class HeadError(InputError):
    """A head, layer or site was named that the model does not have."""


class TaskError(InputError):
    """A task cannot be built or graded: unequal clean and corrupt prompts, no one-token names."""


class BudgetError(AttnlensError, MemoryError):
    """A dense request is priced over its memory budget; the message gives one that fits."""


class WeightsError(AttnlensError):
    """Weights cannot be used: missing or damaged file, pickle only, NaN."""


class UnsupportedModelError(AttnlensError):
    """The model's attention does not pass through the seam."""


class SeamError(AttnlensError, RuntimeError):
    """The instrument did not see what it was asked to see: a site never fired, rows disagree."""


class FileError(AttnlensError, OSError):
    """A file is missing, damaged, or cannot be written."""
