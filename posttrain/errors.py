"""The one error that says what to do."""


class PosttrainError(Exception):
    """Something the user gave cannot work; the message says what was given, what was expected and what to do.

    The command line prints it without a traceback.
    """
