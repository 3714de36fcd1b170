"""The binding to PEFT: base classes of configs, tuners and layers, and the changes to PEFT itself.

Names no method. What both hosts share belongs one folder up; what knows no host belongs in `hooks/`.
"""

from pal_adapters.hosts.expectations import check_host, warn_untested

from .expectations import RELIED_ON

check_host("peft", RELIED_ON)
warn_untested("peft", "transformers")

from . import card, whole  # noqa: E402  (importing these needs what was checked)

whole.install()
card.install()
