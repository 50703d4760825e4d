"""The machine's headless Chromium for tests of pages; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Return the program in TAILOR_CHROMIUM if set, otherwise the first Chromium on the PATH."""
    named = os.environ.get("TAILOR_CHROMIUM")
    return next(filter(None, map(shutil.which, [named] if named else NAMES)), None)


CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH; TAILOR_CHROMIUM may name another"
)


@contextmanager
def started() -> Iterator[Browser]:
    """Launch a browser, without sandbox, which Chromium does not support for root (containers)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
