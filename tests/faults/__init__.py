"""Cuts in an installation: the power, the connection, or the `fab` process, in every Step; and what is left of them.

`cuts` plans where, `watch` stops the machine there, `install` cuts and goes on, `compare` tells whether the machine
that came of it differs from one that nobody disturbed. `python -m tests.faults` does all of it.
"""
