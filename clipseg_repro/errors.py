"""The one error that bad input raises."""


class InputError(ValueError):
    """Bad input. The message names the thing, its value and the remedy, in one line."""
