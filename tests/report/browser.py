"""A headless Chromium of the system for the tests of the page."""

import contextlib
import os
import shutil

import pytest


@contextlib.contextmanager
def browser_context(width, height):
    """A playwright context without network; skips where there is no browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    program = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        pytest.skip("no Chromium: install chromium or google-chrome, or name the program in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser.new_context(viewport={"width": width, "height": height})
        finally:
            browser.close()
