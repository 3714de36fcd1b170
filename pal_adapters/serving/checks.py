"""What a call may contain, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .interface import PredictorLike, RequestError
from .options import ServingOptions

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


def check_requests(requests: Sequence[Mapping[str, Any]], predictor: PredictorLike, options: ServingOptions) -> None:
    """Checks the requests of a call.

    Raises:
        RequestError: For the first request that cannot be answered, with its index.
    """
    if not requests:
        raise RequestError("the call has no requests")
    if len(requests) > options.max_requests:
        raise RequestError(f"{len(requests)} requests in one call; this service allows {options.max_requests}")
    for index, request in enumerate(requests):
        task = request.get("task")
        try:
            _check_text(request, options.max_text_length)
            predictor.check(request)
        except RequestError as error:
            known = isinstance(task, str) and task in predictor.tasks
            raise RequestError(str(error), index=index, task=task if known else None) from error


def _check_text(request: Mapping[str, Any], longest: int) -> None:
    """Counts the characters of all strings, however nested, and rejects half surrogate pairs, which are not text."""
    left, waiting = longest, list(request.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            left -= len(value)
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise RequestError("a text contains half of a surrogate pair, which is not valid Unicode")
        elif isinstance(value, (list, dict)):
            left -= len(value)
            waiting.extend(value.values() if isinstance(value, dict) else value)
        if left < 0:
            raise RequestError(f"the request is longer than {longest} characters, the limit of this service")


def task_folder(root: Path, name: str) -> Path | None:
    """The direct subfolder of the root with this name; `None` if there is none, or it is a link out of the root."""
    folder = root / name
    if not _NAME.fullmatch(name) or not folder.is_dir() or folder.resolve().parent != root.resolve():
        return None
    return folder
