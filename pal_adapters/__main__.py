"""`python -m pal_adapters` is the command `pal-adapters`."""

import sys

from pal_adapters.cli import main

sys.exit(main())
