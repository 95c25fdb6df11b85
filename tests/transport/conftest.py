"""Fixtures of the transport's tests: a real sshd, a bad network."""

from tests.sshd import proxy, sshd

__all__ = ["proxy", "sshd"]
