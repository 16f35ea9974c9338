"""Pictures of cat-serve's page after it has painted: docs/page.png, or on request more: dark, and on a phone.

    python benchmarks/page_pictures.py build/eval/sd3-mini [--all DIRECTORY]

Needs a Chromium, and playwright, which downloads none here: pip install playwright
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SCREENS: dict[str, dict[str, Any]] = {
    "page": {"viewport": {"width": 1200, "height": 780}},
    "page-dark": {"viewport": {"width": 1200, "height": 780}, "color_scheme": "dark"},
    "page-phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a cat-serve that is ready."""
    command = [sys.executable, "-m", "cat_pruning.serving.cli", str(bundle), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said = json.loads(line) if line.startswith("{") else {}
            if said.get("message") == "ready":
                yield f"http://{said['host']}:{said['port']}"
                return
        raise SystemExit("cat-serve did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def take(browser: Any, address: str, options: dict[str, Any], path: Path) -> None:
    """Paint the page's own example with seed 1, and take a picture of the whole page."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#size option", state="attached")
    page.eval_on_selector("#seed", "(field) => field.value = 1")
    page.click("#paint")
    page.wait_for_selector("#status.verdict", timeout=120_000)
    page.screenshot(path=path, full_page=True)
    context.close()


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--all", type=Path, metavar="DIRECTORY", help="where to put all of them")
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("there is no Chromium")
    with served(arguments.bundle) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for name, options in SCREENS.items() if arguments.all else [("page", SCREENS["page"])]:
            take(browser, address, options, (arguments.all or ROOT / "docs") / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
