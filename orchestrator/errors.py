"""How a command ends other than well: what a user can mend, what failed, and what a signal ended."""


class UserError(ValueError):
    """Something the user set or supplied is wrong: one sentence, shown without a traceback, exit code 2."""


class TrainingError(RuntimeError):
    """The training itself failed: one sentence with the cause and where to read more, exit code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run: one sentence, exit code 128 + `signal`, which is what a shell expects."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
