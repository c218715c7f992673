"""The dashboard in a real headless browser against a real server: what a person sees, in light, dark and narrow.

Screenshots go to ``test-artefacts/`` for people to look at.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from loadtest.processes import Server
from tests.fleet_fixtures import copy_linked
from tests.model_fixtures import SMOLLM2, BuiltState

pytestmark = pytest.mark.browser
ARTEFACTS = Path(__file__).resolve().parents[2] / "test-artefacts" / "dashboard"
LIMIT_S = 30


@pytest.fixture(scope="module")
def server(smollm2_built: BuiltState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one real model, asleep; the first wake is slowed down, so that it can be looked at."""
    state_dir = copy_linked(smollm2_built.state_dir, tmp_path_factory.mktemp("d") / "state")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOWPLUG_FILL_LIMIT_BYTES_PER_S", str(150_000_000))
        starting = Server(state_dir, "--idle-timeout-s", "4")
    with starting as running:
        running.wait_ready()
        running.wait_listed(SMOLLM2)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium without a window; its errors on the console are kept."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1360,1200"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    yield driver
    driver.quit()


def open_page(browser: webdriver.Chrome, server: Server, *, theme: str = "light", width: int = 1360) -> None:
    """Load the page in ``theme`` and wait until it shows live data."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(server.url + "/")
    wait_for(browser, lambda: browser.find_element(By.ID, "connection").text == "live")
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, f'[data-model="{SMOLLM2}"]'))


def wait_for(browser: webdriver.Chrome, condition: Any) -> None:
    WebDriverWait(browser, LIMIT_S, poll_frequency=0.05).until(lambda _: condition())


def keep_screenshot(browser: webdriver.Chrome, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    size = browser.execute_script("return window.innerWidth")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": size, "height": height, "deviceScaleFactor": 1, "mobile": False}
    )
    assert browser.save_screenshot(str(ARTEFACTS / f"{name}.png"))


def tier_of(browser: webdriver.Chrome) -> str:
    """The rung on which the model's card is."""
    script = "return arguments[0].closest('ul').id"
    card = browser.find_element(By.CSS_SELECTOR, f'[data-model="{SMOLLM2}"]')
    return str(browser.execute_script(script, card)).removeprefix("rung-")


def find_serious_violations(browser: webdriver.Chrome) -> list[str]:
    found = Axe().run(browser)
    return [
        f"{violation['id']}: {node['html'][:160]}"
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_a_person_wakes_a_model_and_sees_it_rise_and_sink(browser: webdriver.Chrome, server: Server) -> None:
    """The chat box answers, the card climbs to T4, the waterfall appears, and the idle timer takes it down again."""
    open_page(browser, server)
    wait_for(browser, lambda: tier_of(browser) in ("T1", "T2"))
    prompt = browser.find_element(By.ID, "prompt")
    prompt.clear()
    prompt.send_keys("What is the capital of France?")
    prompt.send_keys(Keys.TAB, Keys.ENTER)  # keyboard alone: from the text to the button
    wait_for(browser, lambda: browser.find_element(By.ID, "wake").text.startswith(("waking: ", "first token")))
    keep_screenshot(browser, "waking-light")
    wait_for(browser, lambda: "first token after" in browser.find_element(By.ID, "wake").text)
    wait_for(browser, lambda: tier_of(browser) == "T4")
    wait_for(browser, lambda: len(browser.find_element(By.ID, "answer").text) > 3)  # sampled: any words
    wait_for(browser, lambda: "Cold start from" in browser.find_element(By.ID, "waterfall").text)
    wait_for(browser, lambda: "prefill" in browser.find_element(By.ID, "waterfall").text)
    wait_for(browser, lambda: tier_of(browser) == "T2")
    wait_for(browser, lambda: "None: every model is at zero" in browser.find_element(By.ID, "workers").text)
    wait_for(browser, lambda: "of worker time not spent" in browser.find_element(By.ID, "savings").text)
    browser.find_element(By.ID, "send").send_keys(Keys.ENTER)
    wait_for(browser, lambda: "Cold start from T2" in browser.find_element(By.ID, "waterfall").text)
    wait_for(browser, lambda: "sleeps in" in browser.find_element(By.CSS_SELECTOR, f'[data-model="{SMOLLM2}"]').text)
    keep_screenshot(browser, "hot-light")


@pytest.mark.parametrize(("theme", "width"), [("light", 1360), ("dark", 1360), ("light", 390), ("dark", 390)])
def test_the_page_is_accessible_and_fits(browser: webdriver.Chrome, server: Server, theme: str, width: int) -> None:
    """axe-core has no serious finding (contrast, labels, roles), and nothing sticks out sideways."""
    open_page(browser, server, theme=theme, width=width)
    assert find_serious_violations(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    keep_screenshot(browser, f"{'narrow' if width < 600 else 'wide'}-{theme}")


def test_the_page_loads_nothing_from_elsewhere_and_logs_no_error(browser: webdriver.Chrome, server: Server) -> None:
    """Every resource is the server's own, and the security policy blocks nothing that the page needs."""
    browser.get_log("browser")  # what earlier tests left
    open_page(browser, server)
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names
    assert [name for name in names if not name.startswith(server.url)] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_theme_button_works_by_keyboard(browser: webdriver.Chrome, server: Server) -> None:
    """Enter on the button turns dark to light, and the choice is kept over a reload."""
    open_page(browser, server, theme="dark")
    browser.execute_script("document.getElementById('theme').focus()")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("data-theme") == "light"
    open_page(browser, server, theme="dark")
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("data-theme") == "light"
    browser.execute_script("localStorage.clear()")
