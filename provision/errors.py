"""The one exception that people see."""


class ProvisionError(Exception):
    """Something that a person must read.

    ``message`` says what was seen and what was expected; ``hint`` is what to do or to type next.
    Libraries raise it; only ``fabfile.py`` and ``__main__`` modules print it and choose an exit code.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message
