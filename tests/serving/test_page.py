"""The web page in a headless browser: it asks what was picked and shows what the service answered."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("playwright", reason="needs the extra browser")

import uvicorn
from playwright.sync_api import sync_playwright

from pal_adapters.serving import create_app
from tests.serving.fake import FakePredictor

pytestmark = pytest.mark.browser


class Service:
    """The application on a free port of this machine, in a thread of its own."""

    def __init__(self, predictor: Any) -> None:
        config = uvicorn.Config(create_app(predictor), port=0, log_level="warning", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the service did not start"
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    def __exit__(self, *exception: object) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        # The system's Chromium if there is one; otherwise the one that `playwright install chromium` brings.
        # Without a sandbox it also runs as root in a container; it only opens the page of this test.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with Service(FakePredictor()) as address:
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)
        page.wait_for_selector("#tasks input")
        yield page
        assert problems == []
        assert all(url.startswith((address, "data:")) for url in requested), (
            "the page must load nothing from elsewhere"
        )
        page.close()


def texts(page: Any, selector: str) -> list[str]:
    return [element.inner_text().strip() for element in page.query_selector_all(selector)]


def test_one_text_for_two_tasks(page: Any) -> None:
    assert texts(page, "#tasks label") == ["sentiment", "pair"]
    assert texts(page, "#fields span") == ["sentence"]
    page.check("#tasks input[value=pair]")
    assert texts(page, "#fields span") == ["sentence / premise", "hypothesis"]
    page.fill("textarea[name=field0]", "fine")
    page.fill("textarea[name=field1]", "good")
    page.click("#go")
    page.wait_for_selector(".result")
    assert texts(page, ".result h2") == ["sentiment", "pair"]
    assert texts(page, ".result .row span") == ["FINE", "0.250", "FINE", "0.250"]
    bars = [bar.get_attribute("style") for bar in page.query_selector_all(".bar div")]
    assert [re.findall(r"[\d.]+%", str(style)) for style in bars] == [["25%"], ["25%"]]
    widths = [bar.bounding_box()["width"] for bar in page.query_selector_all(".bar, .bar div")]
    assert widths[1] == pytest.approx(widths[0] / 4, abs=1)


def test_what_is_typed_stays_when_tasks_change(page: Any) -> None:
    page.fill("textarea[name=field0]", "a film")
    page.check("#tasks input[value=pair]")
    page.uncheck("#tasks input[value=sentiment]")
    assert page.input_value("textarea[name=field0]") == "a film"
    page.uncheck("#tasks input[value=pair]")
    assert page.is_disabled("#go")


def test_texts_are_not_read_as_html(page: Any) -> None:
    page.fill("textarea[name=field0]", "<img src=x onerror=document.title='run'>")
    page.click("#go")
    page.wait_for_selector(".result")
    assert page.query_selector(".result img") is None
    assert page.title() == "pal_adapters"
    assert texts(page, ".result .row .best") == ["<IMG SRC=X ONERROR=DOCUMENT.TITLE='RUN'>"]


def test_an_error_of_the_service_is_shown(page: Any) -> None:
    page.fill("textarea[name=field0]", "broken")
    page.click("#go")
    page.wait_for_function("document.getElementById('problem').textContent !== ''")
    assert "secret" not in page.inner_text("#problem")
    assert page.is_enabled("#go")
    page.fill("textarea[name=field0]", "whole")
    page.click("#go")
    page.wait_for_selector(".result")
    assert page.inner_text("#problem") == ""
