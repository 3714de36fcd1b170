"""The binding to PEFT: base classes of configs, tuners and layers, and the changes to PEFT itself.

Names no method. What both hosts share belongs one folder up; what knows no host belongs in `hooks/`.
"""

from .expected import check

check()

from . import card, whole  # noqa: E402  (importing these needs what was checked)

whole.install()
card.install()
