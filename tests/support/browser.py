"""Open an HTML file in Chromium (tests/support/chromium.py) and record console messages, requests and dialogs."""

from __future__ import annotations

import time

from axe_playwright_python.sync_playwright import Axe


class Reader:
    """A page opened from disk, after its charts are drawn; its console messages, requests and dialogs."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page = self.context.new_page()
        self.complaints, self.requests, self.dialogs = [], [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(path.as_uri(), timeout=120_000)
        self.page.wait_for_selector("body.drawn", timeout=120_000)

    def violations(self):
        """Return axe's serious and critical accessibility violations: rule and elements."""
        violations = Axe().run(self.page).response["violations"]
        grave = [each for each in violations if each["impact"] in ("serious", "critical")]
        return [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in grave]

    def evaluate(self, script):
        """Return the value of a JavaScript expression in the page."""
        return self.page.evaluate(script)

    def wait(self, condition):
        """Wait until a JavaScript expression is true; polls from outside, since the page's policy forbids eval."""
        deadline = time.monotonic() + 30
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(50)
