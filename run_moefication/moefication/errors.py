"""The exceptions that mean "the input is wrong", with a sentence for the person who gave it."""


class MoEficationError(ValueError):
    """Wrong input: the message is one line that names the thing and the cure. Scripts end with exit status 2."""


class SettingError(MoEficationError):
    """A message that speaks of settings by the names of their fields, to which the command line adds its dashes."""
