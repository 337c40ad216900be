"""The exceptions that mean "the input is wrong", with a sentence for the person who gave it."""


class MoEficationError(ValueError):
    """Wrong input: the message is one line that names the thing and the cure."""

    exit_status = 2  # of a script that ends with this error


class SettingError(MoEficationError):
    """A message that speaks of settings by the names of their fields, to which the command line adds its dashes."""


class NetworkError(MoEficationError):
    """A server that is needed cannot be reached or fails: the same command may succeed later."""

    exit_status = 3
