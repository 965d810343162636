"""A headless Chromium that finds things as a person does, by the text on the page, and takes screenshots."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no chromium and chromedriver on this machine; `make browser` installs them"
SCREENSHOTS = "MEMMCL_SCREENSHOTS"
"""Environment variable: a directory where screenshots are copied to."""

SECONDS = 120.0
"""How long a page may take to show something, however busy the machine."""
WIDTH, HEIGHT, COLOURS = 1440, 1000, 128
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NOT_YET = (
    NoSuchElementException,
    StaleElementReferenceException,
    ElementClickInterceptedException,
    ElementNotInteractableException,
)
"""What a page that is still being drawn answers with."""
STANDS_STILL = "return !document.getAnimations().some(moving => moving instanceof CSSTransition)"
Found = TypeVar("Found")


def installed() -> bool:
    """Return whether this machine has the browser and its driver."""
    return bool(CHROMIUM and CHROMEDRIVER)


@dataclass(frozen=True)
class Browser:
    """One window on one site."""

    driver: webdriver.Chrome
    site: str
    folder: Path

    @property
    def text(self) -> str:
        """What the page shows now, as text."""
        return str(self.driver.execute_script("return document.body.innerText"))

    @property
    def address(self) -> str:
        """The path and query of the page."""
        return self.driver.current_url.removeprefix(self.site)

    def open(self, path: str) -> None:
        """Go to a page of the site."""
        self.driver.get(self.site + path)

    def leave(self) -> None:
        """Go to an empty page."""
        self.driver.get("about:blank")

    def wait_for(self, *texts: str, seconds: float = SECONDS) -> str:
        """Wait until the page shows all these texts; return all that it shows."""
        shown = ""

        def complete() -> bool:
            nonlocal shown
            shown = self.text
            return all(text in shown for text in texts)

        until(complete, lambda: f"a page with {texts}; {self.describe()}", seconds)
        return shown

    def click(self, text: str) -> None:
        """Click the first visible link, button, tab or switch that says `text`."""
        self._click(f"//*[self::a or self::button or self::li or self::label][normalize-space(.)={quoted(text)}]", text)

    def follow(self, text: str, to: str) -> None:
        """Click the first visible link whose text contains `text`, and its address `to`."""
        self._click(f"//a[contains(@href, {quoted(to)}) and contains(normalize-space(.), {quoted(text)})]", text)

    def field(self, description: str) -> WebElement:
        """Return the input below this description."""
        holder = f"//*[normalize-space(text())={quoted(description)}]/ancestor::*[.//input or .//textarea][1]"
        return until(
            lambda: self.driver.find_element(By.XPATH, f"{holder}//*[self::input or self::textarea]"),
            lambda: f"an input for {description!r}; {self.describe()}",
        )

    def fill(self, description: str, value: str) -> None:
        """Replace what stands in the input below this description."""
        field = self.field(description)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value)

    def centre(self, element: WebElement) -> None:
        """Scroll until an element is in the middle of the window."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)

    def text_of(self, selector: str) -> str:
        """Return the text of the first element that a CSS selector finds, nothing while there is none."""
        return str(self.driver.execute_script(f"return document.querySelector({selector!r})?.innerText ?? ''"))

    def describe(self) -> str:
        """Return what a failure needs to be understood: address, text, and what the page complained about."""
        complaints = "\n".join(entry["message"] for entry in self.driver.get_log("browser")) or "nothing"
        return f"{self.address} shows:\n{self.text}\nIts console says:\n{complaints}"

    def table(self) -> list[dict[str, str]]:
        """Return the rows of the page's first table, by the names of its columns."""
        rows = self.driver.execute_script(
            "return [...document.querySelector('table').rows].map(row => [...row.cells].map(cell => cell.innerText))"
        )
        names, *body = [[cell.strip() for cell in row] for row in rows]
        return [dict(zip(names, row, strict=True)) for row in body]

    def has_drawn(self, canvas: str, like: str) -> bool:
        """Return whether a canvas shows a bar in the background colour of the element `like` (two CSS selectors)."""
        colour = self.driver.find_element(By.CSS_SELECTOR, like).value_of_css_property("background-color")
        wanted = tuple(int(part) for part in re.findall(r"\d+", colour)[:3])
        image = picture(self.driver.find_element(By.CSS_SELECTOR, canvas).screenshot_as_png)
        bars = image.crop((0, 0, image.width, image.height - 20))  # below them the states of the run have such colours
        return sum(count for count, found in bars.getcolors(bars.width * bars.height) or [] if found == wanted) > 100

    def shoot(self, name: str) -> Path:
        """Save what the window shows as NAME.png, with few colours, once nothing slides or fades any more."""
        until(lambda: self.driver.execute_script(STANDS_STILL), lambda: f"a page that stands still for {name}")
        path = self.folder / f"{name}.png"
        shot = picture(self.driver.get_screenshot_as_png())
        shot.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
        if copies := os.environ.get(SCREENSHOTS):
            Path(copies).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copies)
        return path

    def _click(self, path: str, text: str) -> None:
        def clicked() -> bool:
            for element in self.driver.find_elements(By.XPATH, path):
                if element.is_displayed():
                    element.click()
                    return True
            return False

        until(clicked, lambda: f"{text!r} to click; {self.describe()}")


@contextmanager
def open_browser(site: str, folder: Path, *flags: str) -> Iterator[Browser]:
    """Open a window with a new profile on `site` until the block ends; screenshots go to `folder`.

    flags: more of Chromium's options.

    Nothing is downloaded: browser and driver are the machine's own.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    profile = tempfile.mkdtemp(prefix="chromium")
    for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
        try:
            size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # of the page, whatever frames it
            yield Browser(driver, site, folder)
        finally:
            driver.quit()
    finally:
        shutil.rmtree(profile, ignore_errors=True)


def until(attempt: Callable[[], Found], what: Callable[[], str], seconds: float = SECONDS) -> Found:
    """Poll until `attempt` returns something true; return that."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := attempt():
                return found
        except NOT_YET:
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what()}")
        time.sleep(0.2)


def picture(png: bytes) -> Image.Image:
    """Return a PNG file as an image."""
    return Image.open(io.BytesIO(png)).convert("RGB")


def quoted(text: str) -> str:
    """Return a text as an XPath literal."""
    quote = "'" if '"' in text else '"'
    return f"{quote}{text}{quote}"
