"""Puts the fused ops under a network that exists already: `accelerate` and what it looks at.

Not called accelerate: importing the package would put it in the place of `fastnas.accelerate`.
"""

from fastnas.dropin.accelerate import Report, accelerate, decelerate
from fastnas.dropin.profile import Profile, Row, profile

__all__ = ["Profile", "Report", "Row", "accelerate", "decelerate", "profile"]
