"""The one error that bad input raises, and many of them on one line."""


class InputError(ValueError):
    """Bad input. The message names the thing, its value and the remedy, in one line."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))  # a value named in it may have more


def listed(things, most=3, separator="; ") -> str:
    """The first few of many things, on one line."""
    first, more = list(things)[:most], len(things) - most
    return separator.join(first + [f"and {more} more"] * (more > 0))
