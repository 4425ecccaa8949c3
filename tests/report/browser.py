"""A headless Chromium of the system for the tests of the page."""

import contextlib
import os
import shutil
import subprocess

import pytest

from tests.limits import HANGS_AFTER


def works(program):
    """Whether it is a browser, and not only a word on how to install one."""
    try:
        return subprocess.run([program, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def browser_context(width, height):
    """A playwright context without network; skips where there is no browser, but not where CHROMIUM names one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    if program := os.environ.get("CHROMIUM"):
        assert works(program), f"CHROMIUM={program} does not work: `{program} --version` fails"
    else:
        found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        program = next(filter(works, found), None)
    if program is None:
        pytest.skip("no Chromium: install chromium or google-chrome, or name the program in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=1000 * HANGS_AFTER)
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.set_default_timeout(1000 * HANGS_AFTER)
            yield context
        finally:
            browser.close()
