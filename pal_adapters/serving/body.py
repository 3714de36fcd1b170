"""The body of a call, read strictly: what is ambiguous or not JSON is an error, and never a guess."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from .checks import CallError

_WANTED = "pass an object with a task and its text columns, or a list of such objects"


class BodyError(Exception):
    """The body of a call is not JSON; the message says where."""


def read_requests(body: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The requests in a body, and whether they are a list; their texts are not checked.

    Raises:
        BodyError: If the body is not JSON.
        CallError: If it is empty, or neither a request nor a list of requests.
    """
    if not body:
        raise CallError(f"the body is empty: {_WANTED}")
    content = _read_json(body)
    many = isinstance(content, list)
    requests = content if many else [content]
    for index, request in enumerate(requests):
        place = index if many else None
        if not isinstance(request, dict):
            raise CallError(f"{_kind(request)} is not a request: {_WANTED}", index=place)
        if "task" not in request:
            raise CallError(f"there is no 'task': {_WANTED}", index=place)
        if not isinstance(request["task"], str):
            raise CallError(f"'task' is {_kind(request['task'])}, not a text: {_WANTED}", index=place)
    return requests, many


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BodyError(f"the body is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise BodyError("the body is not JSON: it is not UTF-8") from error
    except RecursionError as error:
        raise BodyError("the body is nested too deeply") from error
    except ValueError as error:
        raise BodyError("the body has a number with too many digits") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise BodyError(f"an object of the body has {twice!r:.60} twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise BodyError(f"the body is not JSON: {name} is not a JSON value")


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
