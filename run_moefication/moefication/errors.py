"""The one exception that means "the input is wrong", with a sentence for the person who gave it."""


class MoEficationError(ValueError):
    """Wrong input: the message is one line that names the thing and the cure. Scripts end with exit status 2."""
