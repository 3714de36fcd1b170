"""An HTTP service that answers requests for many tasks with one model, batching what arrives together.

Everything here knows predictors only through the protocols in `interface.py`; how a prediction is made belongs to
`multitask`, and command-line options to `cli`. Needs the packages of the extra `serve`.
"""

from .app import create_app
from .options import ServingOptions
from .server import serve

__all__ = ["ServingOptions", "create_app", "serve"]
