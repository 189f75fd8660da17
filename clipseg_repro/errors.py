"""The one error that bad input raises, and many of them on one line."""


class InputError(ValueError):
    """Bad input. The message names the thing, its value and the remedy, in one line."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))  # a value named in it may have more


def listed(problems, most=3) -> str:
    """The first few of many problems, on one line."""
    first, more = list(problems)[:most], len(problems) - most
    return "; ".join(first) + (f"; and {more} more" if more > 0 else "")
