"""The exceptions that mean "the input is wrong", with a sentence for the person who gave it."""


class MoEficationError(ValueError):
    """Wrong input: the message is one line that names the thing and the cure. Scripts end with exit status 2."""


class SettingError(MoEficationError):
    """A wrong setting: the message speaks of fields by their names, to which the command line adds its dashes."""
