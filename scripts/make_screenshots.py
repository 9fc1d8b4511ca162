"""Take the README's pictures of the board anew, from results.duckdb. Needs chromium and `pip install -e '.[dev]'`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PORT = 8765
#: Address of the page and height of the picture.
PICTURES = {"overview": ("", 900), "trade-off": ("trade-off", 1160), "tasks": ("tasks?suite=math500", 1180)}


def main() -> None:
    board = [sys.executable, "-m", "decodathlon", "board", "--port", str(PORT), "--no-browser"]
    server = subprocess.Popen(board, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://localhost:{PORT}/_stcore/health", timeout=1)
                break
            except OSError:
                time.sleep(0.3)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, (address, height) in PICTURES.items():
                page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
                page.goto(f"http://localhost:{PORT}/{address}")
                page.get_by_role("heading").first.wait_for()
                page.wait_for_timeout(3000)
                path = IMAGES / f"{name}.png"
                page.screenshot(path=path)
                Image.open(path).convert("RGB").save(path, optimize=True)  # every colour as the board draws it
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
