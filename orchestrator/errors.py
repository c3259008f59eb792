"""The one kind of error that a user can cause."""


class UserError(ValueError):
    """Something the user set or supplied is wrong: one sentence, shown without a traceback, exit code 2."""


class TrainingError(RuntimeError):
    """The training itself failed: one sentence with the cause and where to read more, exit code 1."""
