"""The page in a browser, from mouse moves to a picture, with a server on the demo bundle."""

# ruff: noqa: E402 - the page is there with the extra [ui] only

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="without the extra [ui] there is no page")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")

from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.bundle,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no Chromium here: apt-get install chromium chromium-driver"
    ),
]
SERVE = (
    "import sys; from controlrt.runtime.commands import *; from controlrt.runtime.commands import serve\n"
    "if __name__ == '__main__': sys.exit(guarded(lambda: run_command(serve, sys.argv[1:], 'serve'), []))"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1400",
)
SHOTS = os.path.abspath(os.environ["CONTROLRT_SCREENSHOTS"]) if "CONTROLRT_SCREENSHOTS" in os.environ else None
"""A folder for pictures of the page, as the documentation shows it."""
PROMPT, STEPS = "a green square on a yellow background", 20 if SHOTS else 6


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def server(demo_bundle: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, and the process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(demo_bundle), "--port", "0", "--ui"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "the page: /ui" in line:
                break
        else:
            pytest.fail("".join(lines))
        drain = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        drain.start()
        yield line.split()[2].rstrip(";"), process
    finally:
        process.kill()
        process.wait()


def wait_for(browser: Any, condition: Any, seconds: float = 60) -> Any:
    gone = (NoSuchElementException, StaleElementReferenceException)
    return WebDriverWait(browser, seconds, poll_frequency=0.1, ignored_exceptions=gone).until(condition)


def fetch(url: str) -> np.ndarray:
    with urllib.request.urlopen(url) as response:
        return np.asarray(Image.open(io.BytesIO(response.read())).convert("RGB"))


def hosts(browser: Any) -> set[str]:
    """Whom the page has asked for anything, or tried to."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {urlsplit(url).hostname or "" for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}


def draw_square(browser: Any, editor: Any) -> None:
    """Clears the example and draws an outline with the mouse, around the middle half of the canvas."""
    browser.find_element("css selector", "#editor button[aria-label='Clear canvas']").click()
    wait_for(browser, lambda it: "nothing is drawn yet" in it.find_element("css selector", ".message.wrong").text)
    browser.find_element("css selector", "#editor button[aria-label='Brush']").click()
    side = 180
    moves = ActionChains(browser, duration=60).move_to_element_with_offset(editor, -side // 2, -side // 2)
    moves = moves.pause(0.3).click_and_hold().pause(0.3)  # the brush follows a mouse that it has seen
    for x, y in ((side, 0), (0, side), (-side, 0), (0, -side)):
        for _ in range(3):
            moves = moves.move_by_offset(x // 3, y // 3)
    moves.pause(0.3).release().perform()
    wait_for(browser, lambda it: not it.find_elements("css selector", ".message.wrong"))


def code(browser: Any, tab: str, name: str) -> str:
    """What a tab with code shows."""
    browser.find_element("xpath", f"//button[@role='tab' and normalize-space()='{tab}']").click()
    lines = wait_for(browser, lambda it: it.find_elements("css selector", f"#{name} .cm-line"))
    return "\n".join(line.get_property("textContent") for line in lines) + "\n"


def nearest_colour(pixels: np.ndarray) -> str:
    from controlrt.demo.scenes import PALETTE

    mean = pixels.reshape(-1, 3).mean(axis=0)
    return min(PALETTE, key=lambda name: float(np.linalg.norm(mean - PALETTE[name])))


def take_screenshot(browser: Any, name: str) -> None:
    """For the documentation, in few colours."""
    if SHOTS:
        browser.execute_script("window.scrollTo(0, 0)")
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        picture.quantize(96, dither=Image.Dither.NONE).save(Path(SHOTS) / name, optimize=True)


def test_a_drawn_outline_becomes_a_picture(
    browser: Any,
    server: tuple[str, subprocess.Popen[str]],
    demo_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, process = server
    browser.get(address)
    editor = wait_for(browser, lambda it: it.find_elements("css selector", "#editor canvas"))[0]
    wait_for(browser, lambda it: it.find_element("id", "message").text)
    draw_square(browser, editor)
    for selector, text in (("#prompt textarea", PROMPT), ("#first-steps input[type=number]", str(STEPS))):
        field = browser.find_element("css selector", selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)
    browser.find_element("id", "draw").click()
    seen = set()

    def drawn(browser: Any) -> bool:
        text = browser.find_element("id", "message").text
        assert not browser.find_elements("css selector", "#message .wrong"), text
        seen.add(text)
        return text.startswith("Drawn in")

    wait_for(browser, drawn)
    assert any(text.startswith("Step ") for text in seen)
    sources = {
        name: wait_for(
            browser, lambda it, name=name: it.find_element("css selector", f"#{name} img").get_attribute("src")
        )
        for name in ("shown-control", "picture")
    }
    control, picture = (fetch(source) for source in sources.values())
    take_screenshot(browser, "page.png")

    inside = control[..., 0] == 255
    rows, columns = np.nonzero(inside)
    box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.mean() > 0.97, "what the mouse went around is filled"
    assert min(box.shape) > 150
    middle = np.s_[rows.min() + 40 : rows.max() - 40, columns.min() + 40 : columns.max() - 40]
    assert picture.std() > 20, "not blank"
    assert nearest_colour(picture[middle]) == "green"
    assert nearest_colour(picture[:40]) == "yellow"

    monkeypatch.chdir(tmp_path)
    Image.fromarray(control).save("image.png")
    Path(demo_bundle.name).symlink_to(demo_bundle)
    exec(compile(code(browser, "As Python", "python"), "page", "exec"), {})
    alone = np.asarray(Image.open("picture.png"), np.int16)
    assert np.abs(alone - picture).max() <= 2
    if shutil.which("curl"):
        Path("picture.png").unlink()
        subprocess.run(code(browser, "As curl", "curl"), shell=True, check=True, timeout=60)
        assert np.abs(np.asarray(Image.open("picture.png"), np.int16) - picture).max() <= 2

    if SHOTS:
        compare_scales(browser)
    assert hosts(browser) == {"127.0.0.1"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, "an open page does not keep the server from ending"


def compare_scales(browser: Any) -> None:
    """A second picture, of the documentation alone."""
    browser.find_element("css selector", "#compare input").click()
    browser.find_element("id", "draw").click()
    wait_for(browser, lambda it: " and " in it.find_element("id", "message").text)
    wait_for(browser, lambda it: it.find_elements("css selector", "#second-picture img"))
    browser.find_element("xpath", "//button[@role='tab' and normalize-space()='Gallery']").click()
    take_screenshot(browser, "page-compare.png")
