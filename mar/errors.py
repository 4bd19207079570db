"""What a user is told: two kinds of error, neither of which prints a traceback."""


class UserError(ValueError):
    """The user's input is wrong: the message says what, where and what to do. Exit code 2."""


class Failure(RuntimeError):
    """The input was right but the work could not be done (disk, network, broken data). Exit code 1."""
