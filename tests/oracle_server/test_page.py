"""The page as a person sees it: in a real Chromium, over a live server."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle_support import Caller, Running, digits, running
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from oracle_server.ledger import ADMIN
from oracle_server.settings import Settings

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 60.0  # for anything that is waited for; on an idle machine it takes one or two

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver: apt-get install chromium chromium-driver",
)


class Page:
    """The page in a browser, and what a person can do with it."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> None:
        self.driver.get(f"{self.url}/")

    def text(self, selector: str) -> str:
        # Read in one step: the page may replace an element between finding it and asking it.
        found = self.driver.execute_script(
            "const e = document.querySelector(arguments[0]); return e && e.checkVisibility() ? e.innerText : ''",
            selector,
        )
        return str(found)

    def rows(self, table: str) -> list[list[str]]:
        found: list[list[str]] = self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells]"
            ".filter(c => c.checkVisibility()).map(c => c.innerText.trim()))",
            f"#{table}",
        )
        return found

    def until(self, what: Any) -> None:
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.1).until(lambda _: what(), message=self.text("body"))

    def show(self, key: str) -> None:
        """Type a key and ask for its account."""
        self.driver.find_element(By.ID, "key").send_keys(key, Keys.ENTER)

    def requested(self) -> list[dict[str, Any]]:
        """Every request the browser has sent since it was last asked."""
        log = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        return [each["params"]["request"] for each in log if each["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the browser wrote to its console: errors, and violations of the policy."""
        return [line["message"] for line in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(str(DRIVER)))  # its path said: nothing is downloaded
    yield started
    started.quit()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(Settings(ledger=f"sqlite:///{tmp_path / 'ledger.db'}")) as started:
        yield started


@pytest.fixture
def page(driver: webdriver.Chrome, server: Running) -> Iterator[Page]:
    opened = Page(driver, server.url)
    opened.open()
    opened.requested()
    opened.complaints()
    yield opened
    driver.get("about:blank")


def number(text: str) -> int:
    return int(re.sub(r"[^\d]", "", text))


def test_a_client_sees_its_account_as_the_ledger_has_it_and_sees_it_grow(page: Page, server: Running) -> None:
    caller, other = server.caller(budget=12_345), server.caller(budget=77_777)
    caller.infer(digits(7), Idempotency_Key="seven-queries-of-mine")
    other.infer(digits(9))
    page.show(caller.key)
    page.until(lambda: "verified, head signature ok" in page.text("#verification"))
    ((name, _, budget, spent, held, left, rate, _, refused),) = page.rows("accounts")
    account = server.ledger.account(caller.client.id)
    assert (name, number(budget), number(spent), number(held), number(left)) == (
        *(caller.client.name, account.budget, account.spent, account.held, account.remaining),
    )
    assert rate == "0.12 / s"
    assert refused == "0"
    assert caller.client.name in page.text("h1")
    assert other.client.name not in page.driver.page_source
    assert "77,777" not in page.driver.page_source
    kinds = [(row[2], row[3]) for row in page.rows("entries")]
    assert kinds == [("charge", "7"), ("reserve", "7"), ("budget", "= 12,345"), ("client", "")]

    page.driver.execute_script("window.notReloaded = true")
    caller.infer(digits(5))
    page.until(lambda: number(page.rows("accounts")[0][3]) == 12)
    assert page.driver.execute_script("return window.notReloaded")
    assert page.rows("entries")[0][2:4] == ["charge", "5"]
    for plot in ("spent", "charged"):
        assert page.text(f"#{plot} .legend").split() == [caller.client.name, "12"]
        assert "NaN" not in page.driver.find_element(By.ID, plot).get_attribute("innerHTML")

    sent = page.requested()
    assert {request["url"].split("?")[0] for request in sent} == {f"{server.url}/v1/dashboard"}
    assert all(request["headers"].get("Authorization") == f"Bearer {caller.key}" for request in sent)
    assert not any(caller.key in request["url"] for request in sent)
    assert caller.key not in page.driver.current_url
    assert page.complaints() == []


def test_an_admin_sees_every_account_and_the_refusals(page: Page, server: Running) -> None:
    callers = [server.caller(budget=10 * (n + 1)) for n in range(3)]
    for caller in callers:
        caller.infer(digits(4))
    callers[0].infer(digits(50))
    server.http.get("/v1/budget", headers={"Authorization": "Bearer wrong"})
    _, key = server.ledger.add_client("root", 0, role=ADMIN)
    page.show(key.reveal())
    page.until(lambda: len(page.rows("accounts")) == 3)
    assert [(row[0], number(row[3])) for row in page.rows("accounts")] == [(c.client.name, 4) for c in callers]
    assert sorted(page.rows("refusals")) == sorted(
        [[callers[0].client.name, "budget-exhausted", "1"], ["no valid key", "unauthorized", "1"]]
    )
    assert {row[2] for row in page.rows("entries")} == {"root", *(c.client.name for c in callers)}
    assert page.complaints() == []


def test_a_wrong_key_is_said_to_be_wrong_and_a_right_one_can_be_forgotten(page: Page, server: Running) -> None:
    caller = server.caller()
    page.show("zo_0123456789abcdef_" + "a" * 43)
    page.until(lambda: "not known" in page.text("#login-error"))
    assert page.text("#board") == ""
    page.show("kein Schlüssel")
    page.until(lambda: "not written as a key" in page.text("#login-error"))
    page.show(caller.key)
    page.until(lambda: page.rows("accounts"))
    page.driver.refresh()  # the key stays in this tab ...
    page.until(lambda: page.rows("accounts"))
    page.driver.find_element(By.ID, "forget").click()  # ... until it is forgotten
    page.until(lambda: page.text("#login"))
    assert caller.client.name not in page.driver.page_source
    page.driver.refresh()
    page.until(lambda: page.text("#login"))
    assert page.driver.execute_script("return sessionStorage.length + localStorage.length") == 0
    assert page.driver.get_cookies() == []


def test_a_revoked_key_is_shown_nothing_more(page: Page, server: Running) -> None:
    caller = server.caller()
    page.show(caller.key)
    page.until(lambda: page.rows("accounts"))
    server.ledger.revoke(caller.client.name)
    page.until(lambda: "revoked" in page.text("#login-error"))
    assert page.rows("accounts") == []


def test_a_ledger_that_was_tampered_with_is_shown_in_red(page: Page, server: Running, tmp_path: Path) -> None:
    caller = server.caller()
    caller.infer(digits(7))
    page.show(caller.key)
    page.until(lambda: "The ledger is whole" in page.text("#verification"))
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as database:
        database.execute("UPDATE entries SET rows = 1 WHERE kind = 'charge'")
        database.commit()
    page.until(lambda: "The ledger was tampered with" in page.text("#verification"))
    assert "entry 4" in page.text("#verification")
    colour = page.driver.find_element(By.ID, "verification").value_of_css_property("background-color")
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    assert red > 150 > 60 > max(green, blue)
    assert page.rows("entries")[0][-1] == "✗ broken"


def test_names_are_text_and_nothing_else(page: Page, server: Running) -> None:
    name = "<img src=x onerror=alert(1)><b>&amp;"
    _, key = server.ledger.add_client(name, 10)
    page.show(key.reveal())
    page.until(lambda: page.rows("accounts"))
    assert page.rows("accounts")[0][0] == name
    assert page.driver.find_elements(By.CSS_SELECTOR, "#board img") == []
    assert page.complaints() == []


def test_the_plots_answer_to_the_keyboard_and_the_windows_to_a_choice(page: Page, server: Running) -> None:
    caller = server.caller()
    caller.infer(digits(7))
    page.show(caller.key)
    page.until(lambda: "7" in page.text("#charged .legend"))
    plot = page.driver.find_element(By.CSS_SELECTOR, "#charged svg")
    plot.send_keys(Keys.HOME)
    assert page.text("#charged .legend b") == "0"
    assert page.driver.find_elements(By.CSS_SELECTOR, "#charged svg .cursor")
    title = page.text("#charged h2")
    assert title == "Charged each 30 s"
    page.driver.find_element(By.CSS_SELECTOR, "input[value='24h']").send_keys(Keys.SPACE)
    page.until(lambda: page.text("#charged h2") == "Charged each 12 min")


def test_a_restart_of_the_server_is_said_and_survived(driver: webdriver.Chrome, tmp_path: Path) -> None:
    settings = Settings(ledger=f"sqlite:///{tmp_path / 'ledger.db'}")
    with running(settings) as first:
        caller: Caller = first.caller()
        page = Page(driver, first.url)
        page.open()
        page.show(caller.key)
        page.until(lambda: page.rows("accounts"))
        port = int(first.url.rsplit(":", 1)[1])
    page.until(lambda: "cannot be reached" in page.text("#status"))
    assert page.rows("accounts"), "what was shown stays, marked as old"
    assert "stale" in str(page.driver.find_element(By.ID, "board").get_attribute("class"))
    with running(settings, port=port):
        page.until(lambda: page.text("#status").startswith("live"))
        assert "stale" not in str(page.driver.find_element(By.ID, "board").get_attribute("class"))
    driver.get("about:blank")


def test_a_hidden_page_asks_for_nothing(page: Page, server: Running) -> None:
    page.show(server.caller().key)
    page.until(lambda: page.rows("accounts"))
    hide = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
    page.driver.execute_script(hide + "document.dispatchEvent(new Event('visibilitychange'))", True)
    assert page.text("#status") == "paused while the page is hidden"
    assert page.driver.execute_script("return document.hidden")
    page.requested()
    page.driver.execute_script("document.getElementById('windows').dispatchEvent(new Event('change'))")
    page.driver.execute_async_script("setTimeout(arguments[0], 3500)")  # longer than its period
    assert page.requested() == []
    page.driver.execute_script(hide + "document.dispatchEvent(new Event('visibilitychange'))", False)
    page.until(lambda: page.text("#status").startswith("live"))


def test_it_fits_a_narrow_screen_and_a_dark_one(page: Page, server: Running) -> None:
    caller = server.caller()
    caller.infer(digits(3))
    emulate = page.driver.execute_cdp_cmd
    try:
        emulate(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        )
        emulate("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
        page.show(caller.key)
        page.until(lambda: page.rows("accounts"))
        wide, dark = page.driver.execute_script(
            "return [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
        )
        assert wide <= 360
        assert max(int(part) for part in re.findall(r"\d+", dark)[:3]) < 50
    finally:
        emulate("Emulation.clearDeviceMetricsOverride", {})
        emulate("Emulation.setEmulatedMedia", {"features": []})
