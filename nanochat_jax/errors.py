"""The exceptions that are shown to a person as a single line instead of a traceback."""


class UserError(Exception):
    """A mistake a user can mend. The message says what happened, the value, the limit and the way out."""


class UsageError(UserError):
    """A command line or an experiment that cannot be meant, whatever the machine: exit status 2."""
