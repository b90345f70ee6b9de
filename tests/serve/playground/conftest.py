"""One server with all embedded models and one browser for the folder; every page must keep quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.running import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.serve.playground.browsing import Visit

Visiting = Callable[..., "Visit"]


@pytest.fixture(scope="package")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("embedded"), "--dtype", "float32") as running:
        yield running
        running.signal()
        assert running.wait() == 0
        assert running.left_behind() == []


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    pytest.importorskip("playwright", reason="Playwright is not installed: pip install 'sfumato[dev]'")
    from tests.serve.playground.browsing import browsing, find_browser

    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with browsing(executable) as running:
        yield running


@pytest.fixture
def visiting(browser: Browser, embedded: Server) -> Iterator[Visiting]:
    """Visits that are closed at the end, and have complained of nothing by then."""
    from tests.serve.playground.browsing import Visit

    visits: list[Visit] = []

    def visit(**options: Any) -> Visit:
        visits.append(Visit(browser, embedded.url, **options))
        return visits[-1]

    yield visit
    for each in visits:
        each.close()
        assert each.complaints == []


@pytest.fixture
def visit(visiting: Visiting) -> Visit:
    return visiting()
