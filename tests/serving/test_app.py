from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx")

import httpx

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.serving import ServingOptions, create_app

from .fake import FakePredictor

TOKEN = "an administrator's token"
FILM = {"task": "sentiment", "sentence": "fine film"}
PAIR = {"task": "pair", "premise": "it rains", "hypothesis": "it is wet"}
FILM_ANSWER = {"task": "sentiment", "label": "FINE FILM", "score": 1 / 9, "scores": {"FINE FILM": 1 / 9}}
PAIR_ANSWER = {"task": "pair", "label": "IT RAINS", "score": 1 / 8, "scores": {"IT RAINS": 1 / 8}}


def call(app: Any, *calls: tuple[Any, ...], together: bool = False, **options: Any) -> list[Any]:
    """The responses to calls of (method, path, arguments of httpx)."""

    async def main() -> list[Any]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", **options) as client,
        ):
            coming = [client.request(method, path, **(more[0] if more else {})) for method, path, *more in calls]
            return await asyncio.gather(*coming) if together else [await one for one in coming]

    return asyncio.run(main())


def predict(app: Any, body: Any) -> Any:
    return call(app, ("POST", "/predict", {"json": body}))[0]


def test_one_request_and_a_list_of_requests() -> None:
    app = create_app(FakePredictor())
    one, many = call(app, ("POST", "/predict", {"json": FILM}), ("POST", "/predict", {"json": [PAIR, FILM]}))
    assert (one.status_code, one.json()) == (200, FILM_ANSWER)
    assert (many.status_code, many.json()) == (200, [PAIR_ANSWER, FILM_ANSWER])


def test_calls_that_arrive_together_are_one_mixed_batch() -> None:
    predictor = FakePredictor()
    app = create_app(predictor, ServingOptions(max_batch=4, max_wait_ms=60_000))
    calls = [("POST", "/predict", {"json": body}) for body in (FILM, [PAIR, FILM], PAIR)]
    found = [response.json() for response in call(app, *calls, together=True)]
    assert found == [FILM_ANSWER, [PAIR_ANSWER, FILM_ANSWER], PAIR_ANSWER]
    assert [sorted(batch) for batch in predictor.batches] == [["pair", "pair", "sentiment", "sentiment"]]


def test_tasks_health_and_schema() -> None:
    tasks, health, schema, docs = call(
        create_app(FakePredictor()), *(("GET", path) for path in ("/tasks", "/health", "/openapi.json", "/docs"))
    )
    assert tasks.json()["pair"] == {"kind": "single_label", "text_columns": ["premise", "hypothesis"]}
    assert health.json() == {"status": "ok", "tasks": 2, "waiting": 0}
    assert {"/predict", "/tasks", "/tasks/{name}", "/health", "/metrics"} == set(schema.json()["paths"])
    assert docs.status_code == 200


@pytest.mark.parametrize("path", ["/", "/tasks", "/health", "/metrics", "/docs", "/predict", "/nothing"])
def test_head_is_get_without_the_body(path: str) -> None:
    head, get = call(create_app(FakePredictor()), ("HEAD", path), ("GET", path))
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.content == b""


@pytest.mark.parametrize(
    ("body", "status", "message", "index"),
    [
        ({"task": "nope"}, 422, "unknown task 'nope'; allowed: sentiment, pair", 0),
        ([FILM, {"task": "pair", "premise": "x"}], 422, "column 'hypothesis' is missing", 1),
        ([], 422, "no requests", None),
        ([FILM] * 5, 422, "5 requests in one call; this service allows 4", None),
        ({"sentence": "x"}, 422, "pass an object with a task", None),
        ([FILM, 3], 422, "pass an object with a task", 1),
        ("text", 422, "pass an object with a task", None),
        (None, 422, "pass an object with a task", None),
        ({**FILM, "sentence": "x" * 101}, 422, "longer than 100 characters", 0),
        ({**FILM, "more": [["x" * 60], {"y": "x" * 60}]}, 422, "longer than 100 characters", 0),
        ({**FILM, "max_new_tokens": 257}, 422, "max_new_tokens=257 is more than 256", 0),
        ({"task": ["sentiment"], "sentence": "x"}, 422, "'task' is a list, not a text", None),
        ([FILM, {"sentence": "x"}], 422, "there is no 'task': pass an object with a task", 1),
        ([FILM, [FILM]], 422, "a list is not a request", 1),
        ([[]], 422, "a list is not a request", 0),
        ([FILM, None], 422, "null is not a request", 1),
        ([True], 422, "a boolean is not a request", 0),
        (3.5, 422, "a number is not a request", None),
        ({"task": None}, 422, "'task' is null, not a text", None),
        ({}, 422, "there is no 'task'", None),
    ],
)
def test_bad_requests_say_what_is_wrong(body: Any, status: int, message: str, index: int | None) -> None:
    predictor = FakePredictor()
    found = predict(create_app(predictor, ServingOptions(max_requests=4, max_text_length=100)), body)
    assert found.status_code == status
    assert message in found.json()["error"]
    assert found.json().get("index") == index
    assert predictor.batches == []


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b'{"task": ', 400, "the body is not JSON"),
        (b"\xff\xfe", 400, ""),
        (b'"\xe9"', 400, "the body is not JSON: it is not UTF-8"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[" * 90_000 + b"]" * 90_000, 400, "nested too deeply"),
        (b"", 422, "the body is empty: pass an object with a task"),
        (b'{"task": "sentiment", "sentence": NaN}', 400, "NaN is not a JSON value"),
        (b'{"task": "sentiment", "sentence": -Infinity}', 400, "-Infinity is not a JSON value"),
        (b'{"task": "sentiment", "sentence": ' + b"9" * 5000 + b"}", 400, "a number with too many digits"),
        (b'{"task": "sentiment", "sentence": ' + b"9" * 4000 + b"}", 422, "column 'sentence' is missing"),
        (b'{"task": "sentiment", "sentence": "x", "sentence": "y"}', 400, "has 'sentence' twice"),
        (b'[{"task": "pair", "task": "sentiment", "sentence": "y"}]', 400, "has 'task' twice"),
        (b'{"task": "sentiment"}{}', 400, "Extra data: line 1 column 22"),
        (b"[" + b",".join([b"{}"] * 66_000) + b"]", 422, "there is no 'task'"),
        (b'{"task": "sentiment", "sentence": ' + b"[" * 900 + b"]" * 900 + b"}", 422, "column 'sentence' is missing"),
        (json.dumps({"task": "sentiment", "sentence": "\ud800"}).encode(), 422, "surrogate pair"),
        (json.dumps({"task": "\ud800", "sentence": "x"}).encode(), 422, "surrogate pair"),
        (b"x" * 200_001, 413, "more than 200000 bytes"),
    ],
)
def test_bad_bodies(content: bytes, status: int, message: str) -> None:
    app = create_app(FakePredictor(), ServingOptions(max_body_bytes=200_000))
    headers = {"Content-Type": "application/json"}
    found, after = call(
        app, ("POST", "/predict", {"content": content, "headers": headers}), ("POST", "/predict", {"json": FILM})
    )
    assert found.status_code == status
    assert message in found.json()["error"]
    assert after.json() == FILM_ANSWER


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/ld+json"])
def test_content_types_of_json(kind: str) -> None:
    body = {"content": json.dumps(FILM), "headers": {"Content-Type": kind}}
    assert call(create_app(FakePredictor()), ("POST", "/predict", body))[0].json() == FILM_ANSWER


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "json", ""])
def test_other_content_types_are_named(kind: str) -> None:
    predictor = FakePredictor()
    body = {"content": json.dumps(FILM), "headers": {"Content-Type": kind}}
    (found,) = call(create_app(predictor), ("POST", "/predict", body))
    assert found.status_code == 415
    assert found.json() == {"error": f"the content type is {kind!r}: send application/json"}
    assert predictor.batches == []


def test_a_caller_that_leaves_before_its_body_ends_is_no_error_of_the_service() -> None:
    sent: list[Any] = []
    scope = {
        "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json"), (b"content-length", b"100")],
    }  # fmt: skip

    async def main() -> None:
        coming = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(coming)

        async def send(message: Any) -> None:
            sent.append(message)

        app = create_app(FakePredictor())
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)  # an exception would be logged with its traceback

    asyncio.run(main())
    assert sent[0]["status"] == 400


def test_a_body_of_unannounced_length_is_limited_too() -> None:
    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * 300

    app = create_app(FakePredictor(), ServingOptions(max_body_bytes=1000))
    headers = {"Content-Type": "application/json"}
    (found,) = call(app, ("POST", "/predict", {"content": chunks(), "headers": headers}))
    assert found.status_code == 413


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_the_service_is_not_shown_to_callers() -> None:
    found, after = call(
        create_app(FakePredictor()),
        ("POST", "/predict", {"json": {"task": "sentiment", "sentence": "broken"}}),
        ("POST", "/predict", {"json": FILM}),
    )
    assert (found.status_code, found.json()) == (500, {"error": "internal error"})
    assert after.json() == FILM_ANSWER


def test_metrics_count_predictions_calls_and_batches() -> None:
    app = create_app(FakePredictor())
    *_, found = call(
        app,
        ("POST", "/predict", {"json": [FILM, PAIR, FILM]}),
        ("POST", "/predict", {"json": {"task": "nope"}}),
        ("GET", "/metrics"),
    )
    assert found.headers["content-type"].startswith("text/plain")
    values = dict(re.findall(r"^(pal_adapters\S+) (\S+)$", found.text, re.M))
    assert values['pal_adapters_predictions_total{task="sentiment"}'] == "2.0"
    assert values['pal_adapters_predictions_total{task="pair"}'] == "1.0"
    assert values['pal_adapters_calls_total{status="200"}'] == "1.0"
    assert values['pal_adapters_calls_total{status="422"}'] == "1.0"
    assert values["pal_adapters_batch_size_sum"] == "3.0"
    assert "nope" not in found.text


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "root"
    for name in ("topic", "empty"):
        (folder / name).mkdir(parents=True)
    (folder / "topic" / "task_heads.json").write_text("{}")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "task_heads.json").write_text("{}")
    (folder / "link").symlink_to(outside)
    return folder


def admin(method: str, name: str, token: str | None = TOKEN) -> tuple[Any, ...]:
    return method, f"/tasks/{name}", {"headers": {"Authorization": f"Bearer {token}"} if token else {}}


def test_tasks_come_and_go_while_the_service_runs(root: Path) -> None:
    app = create_app(FakePredictor(), ServingOptions(tasks_root=str(root)), admin_token=TOKEN)
    body = {"json": {"task": "topic", "text": "tea"}}
    added, answer, again, removed, after, gone = call(
        app, admin("PUT", "topic"), ("POST", "/predict", body), admin("PUT", "topic"), admin("DELETE", "topic"),
        ("POST", "/predict", body), admin("DELETE", "topic"),
    )  # fmt: skip
    assert (added.status_code, added.json()["text_columns"]) == (201, ["text"])
    assert answer.json()["label"] == "TEA"
    assert again.status_code == 409
    assert removed.status_code == 204
    assert "unknown task 'topic'" in after.json()["error"]
    assert gone.status_code == 404


@pytest.mark.parametrize(
    ("name", "status"),
    [("empty", 422), ("link", 404), ("missing", 404), ("..", 404), ("..%2Foutside", 404), (".", 404)],
)
def test_only_folders_of_the_root_are_added(root: Path, name: str, status: int) -> None:
    predictor = FakePredictor()
    app = create_app(predictor, ServingOptions(tasks_root=str(root)), admin_token=TOKEN)
    (found,) = call(app, admin("PUT", name))
    assert found.status_code in (status, 405)  # httpx resolves dots before it sends
    assert list(predictor.tasks) == ["sentiment", "pair"]


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é"])
def test_without_the_token_nothing_changes(root: Path, token: str | None) -> None:
    predictor = FakePredictor()
    app = create_app(predictor, ServingOptions(tasks_root=str(root)), admin_token=TOKEN)
    headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
    calls = [("PUT", "/tasks/topic", {"headers": headers}), ("DELETE", "/tasks/pair", {"headers": headers})]
    assert [found.status_code for found in call(app, *calls)] == [401, 401]
    assert list(predictor.tasks) == ["sentiment", "pair"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_any_token_of_the_environment_can_be_sent(root: Path, scheme: str) -> None:
    token = "Schlüssel der Verwaltung"
    app = create_app(FakePredictor(), ServingOptions(tasks_root=str(root)), admin_token=token)
    call_ = ("PUT", "/tasks/topic", {"headers": {"Authorization": f"{scheme} {token}".encode()}})
    assert call(app, call_)[0].status_code == 201


def test_what_the_predictor_refuses_is_not_an_error_of_the_service(root: Path) -> None:
    class Fixed(FakePredictor):
        def remove_task(self, name: str) -> None:
            raise UnsupportedError(f"{name} stays")

    app = create_app(Fixed(), ServingOptions(tasks_root=str(root)), admin_token=TOKEN)
    (found,) = call(app, admin("DELETE", "pair"))
    assert (found.status_code, found.json()) == (422, {"error": "pair stays"})


@pytest.mark.parametrize("path", ["/predict/", "/tasks/", "/tasks/pair/", "/nothing"])
def test_other_paths_are_not_found(root: Path, path: str) -> None:
    app = create_app(FakePredictor(), ServingOptions(tasks_root=str(root)), admin_token=TOKEN)
    (found,) = call(app, ("GET", path))
    assert (found.status_code, found.json()) == (404, {"error": "Not Found"})


@pytest.mark.parametrize("given", [{"tasks_root": True}, {"admin_token": TOKEN}, {}])
def test_tasks_are_fixed_unless_both_a_root_and_a_token_are_set(root: Path, given: dict[str, Any]) -> None:
    options = ServingOptions(tasks_root=str(root) if "tasks_root" in given else None)
    app = create_app(FakePredictor(), options, admin_token=given.get("admin_token"))
    for token in (TOKEN, "None", ""):
        (found,) = call(app, admin("PUT", "topic", token))
        assert found.status_code == 403


def test_page_needs_nothing_from_elsewhere_and_inserts_no_html() -> None:
    (found,) = call(create_app(FakePredictor()), ("GET", "/"))
    assert found.status_code == 200
    assert "default-src 'none'" in found.headers["content-security-policy"]
    for word in (
        "http:",
        "https:",
        "//cdn",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
    ):
        assert word not in found.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_wait_ms": -1}, "max_wait_ms=-1"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms=nan"),
        ({"max_requests": 2000}, "max_requests=2000 is not allowed: use at most max_queue=1024"),
        ({"tasks_root": "/nowhere/at/all"}, "tasks_root='/nowhere/at/all' is not a folder"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServingOptions(**options)


def test_a_token_that_can_be_guessed_is_rejected() -> None:
    with pytest.raises(ConfigError, match="too short"):
        create_app(FakePredictor(), admin_token="secret")
