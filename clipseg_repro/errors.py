"""The one error that bad input raises."""


class InputError(ValueError):
    """Bad input. The message names the thing, its value and the remedy, in one line."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))  # a value named in it may have more
