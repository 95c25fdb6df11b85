"""The one exception of the workload that people see."""


class WorkloadError(Exception):
    """Something that a person must read.

    ``message`` says what was seen and what was expected; ``hint`` is what to type or to change next.
    Modules raise it; only ``__main__`` prints it and exits with 1.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message
