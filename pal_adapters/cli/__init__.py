"""The command `pal-adapters`, one file per subcommand, and the training runs that it shares with the examples.

What users need from Python belongs in `multitask` or `fusion`. Here is only what a command line needs: options,
tables, result files, and one-line errors.
"""

from .main import main

__all__ = ["main"]
