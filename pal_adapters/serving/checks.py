"""What a call may contain, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pal_adapters.multitask import RequestError

from .interface import PredictorLike
from .options import ServingOptions


class CallError(Exception):
    """A call cannot be answered.

    Args:
        message: Why.
        index: Number of the request that cannot be answered, if one of them is to blame.
        task: Its task.
    """

    def __init__(self, message: str, *, index: int | None = None, task: str | None = None) -> None:
        super().__init__(message)
        self.index, self.task = index, task


_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


def check_requests(requests: Sequence[Mapping[str, Any]], predictor: PredictorLike, options: ServingOptions) -> None:
    """Checks the requests of a call.

    Raises:
        CallError: For the first request that cannot be answered, with its index.
    """
    if not requests:
        raise CallError("the call has no requests")
    if len(requests) > options.max_requests:
        raise CallError(f"{len(requests)} requests in one call; this service allows {options.max_requests}")
    for index, request in enumerate(requests):
        fault = _text_fault(request, options)
        try:
            if fault is None:
                predictor.check(request)
        except RequestError as error:
            fault = error.reason
        if fault is not None:
            task = request["task"] if request["task"] in predictor.tasks else None
            raise CallError(fault, index=index, task=task)


def _text_fault(request: Mapping[str, Any], options: ServingOptions) -> str | None:
    """What is wrong with the texts of a request, however nested: too long, or half of a surrogate pair."""
    left, waiting = options.max_text_length, list(request.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            left -= len(value)
            if any("\ud800" <= character <= "\udfff" for character in value):
                return "a text contains half of a surrogate pair, which is not valid Unicode"
        elif isinstance(value, (list, dict)):
            left -= len(value)
            waiting.extend(value.values() if isinstance(value, dict) else value)
        if left < 0:
            return f"the request is longer than {options.max_text_length} characters, the limit of this service"
    tokens = request.get("max_new_tokens")
    if isinstance(tokens, int) and tokens > options.max_new_tokens:
        return f"max_new_tokens={tokens} is more than {options.max_new_tokens}, the limit of this service"
    return None


def task_folder(root: Path, name: str) -> Path | None:
    """The direct subfolder of the root with this name; `None` if there is none, or it is a link out of the root."""
    folder = root / name
    if not _NAME.fullmatch(name) or not folder.is_dir() or folder.resolve().parent != root.resolve():
        return None
    return folder
