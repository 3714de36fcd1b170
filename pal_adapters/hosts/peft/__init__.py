"""The binding to PEFT: base classes of configs, tuners and layers, and the changes to PEFT itself.

Names no method. Code for both hosts belongs one folder up, code for no host in `hooks/`.
"""

from pal_adapters.hosts.expectations import check_host, warn_untested

from .expectations import RELIED_ON

check_host("peft", RELIED_ON)
warn_untested("peft", "transformers")

from . import card, whole  # noqa: E402  (importing these needs what was checked)

whole.install()
card.install()
