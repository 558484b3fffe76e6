"""How a command ends; ``kvledger --help`` explains the exit codes."""

from __future__ import annotations

OK, FAILED, BAD_INPUT, BUG, INTERRUPTED = 0, 1, 2, 70, 130


class CommandFailed(Exception):
    """A command cannot answer, or its answer is no and nothing more is to be printed.

    Args:
        message: why, in one line that says what to do.
        code: ``BAD_INPUT``, or ``FAILED`` where the answer is no.
        told: the line has been printed already.
    """

    def __init__(self, message: object, code: int = BAD_INPUT, *, told: bool = False) -> None:
        super().__init__(str(message))
        self.code = code
        self.told = told
