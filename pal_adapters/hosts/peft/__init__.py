"""The binding to PEFT: configs, tuners and layers for every method, and what is changed in PEFT itself.

Names no method. What both hosts share belongs one folder up, and what knows no host in `hooks/`.
"""

from .expected import check

check()

from . import card, whole  # noqa: E402  (they import what was checked)

whole.install()
card.install()
