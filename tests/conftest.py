"""For all tests: hypothesis does not judge how long an example takes, for that says how busy the computer is."""

from hypothesis import settings

settings.register_profile("metal", deadline=None)
settings.load_profile("metal")
