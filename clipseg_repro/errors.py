"""The one error that bad input raises, and many of them on one line."""


class InputError(ValueError):
    """Bad input. The message names the thing, its value and the remedy, in one line."""


def listed(problems, most=3) -> str:
    """The first few of many problems, on one line."""
    first, more = list(problems)[:most], len(problems) - most
    return "; ".join(first) + (f"; and {more} more" if more > 0 else "")
