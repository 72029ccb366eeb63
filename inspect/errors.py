"""The one error a user sees: a line that says what was found, what was needed and what to do."""

FAILED = 1
USAGE = 2
PARTIAL = 3
LOCKED = 75  # sysexits.h EX_TEMPFAIL: try again later
CONFIG = 78  # sysexits.h EX_CONFIG


class UserError(Exception):
    """A mistake in the input or the set-up, told in one line; `exit_code` is what the command ends with."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code
