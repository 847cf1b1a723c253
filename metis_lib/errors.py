"""The one error that users see: a single line that says what is wrong and what to do."""


class MetisError(Exception):
    """Bad input, a missing file or an impossible request; the command line prints it and exits with 2."""
