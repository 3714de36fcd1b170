"""An HTTP service that answers requests for many tasks with one model, batching what arrives together.

Everything here knows predictors only through the protocols in `interface.py`; how a prediction is made belongs to
`multitask`, and command-line options to `cli`. Needs the packages of the extra `serve`.
"""

from typing import TYPE_CHECKING, Any

from .options import ServingOptions

if TYPE_CHECKING:
    from .app import create_app
    from .server import serve

__all__ = ["ServingOptions", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    """The parts that need the packages of the extra, which the options, and so `serve --help`, do without."""
    if name == "create_app":
        from .app import create_app

        return create_app
    if name == "serve":
        from .server import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
