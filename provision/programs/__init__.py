"""Programs that `verify` sends to a machine, as text, and that its Python environment runs there.

Nothing of the control side imports them, for they import torch. Each prints what a person shall read, and lines
`figure NAME NUMBER` of what it measured; exits with 1 where something is wrong; and says how far it is
on the file descriptor that $TELL_FD names, where it does.
"""

from importlib import resources


def program(name: str) -> str:
    """The source of one of the modules of this package."""
    return resources.files(__name__).joinpath(f"{name}.py").read_text(encoding="utf-8")
