import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi", reason="the extra demo is not installed")
pytest.importorskip("selenium", reason="the test of the page needs selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from musicgenre import Tagger
from musicgenre.datasets.synthetic import STYLES, render_clip
from musicgenre.web.app import Limits, create_app

SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
    "--window-size=1000,900",
)


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that writes down every request."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def texts(parent, selector):
    return [element.text for element in parent.find_elements(By.CSS_SELECTOR, selector)]


def test_the_page_in_a_browser(browser, live, tmp_path):
    tagger = Tagger.load("gtzan")
    song = tmp_path / "<b>song & dance.flac"
    soundfile.write(song, render_clip(next(iter(STYLES)), seed=0, seconds=40), 22050)
    bad = tmp_path / "bad.mp3"
    bad.write_text("no music")
    large = tmp_path / "large.wav"
    large.write_bytes(bytes(6_000_000))
    wait = WebDriverWait(browser, 20, poll_frequency=0.05)
    with live(create_app(tagger, limits=Limits(max_bytes=5_000_000))) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        wait.until(
            lambda _: (
                "accuracy 64.0 % on its validation split"
                in browser.find_element(By.ID, "summary").text
            )
        )
        assert "up to 5 MB and 10 minutes each" in browser.find_element(By.ID, "limits").text
        assert not browser.find_element(By.ID, "synthetic").is_displayed()

        # By keyboard: the field for files is the first thing that is reached.
        browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
        files = browser.switch_to.active_element
        assert files.get_attribute("id") == "files"
        assert files.accessible_name.startswith("Drop music here, or choose files")
        files.send_keys("\n".join(map(str, (song, bad, large))))
        wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".bars, .error")) == 3)
        good, broken, too_large = browser.find_elements(By.CSS_SELECTOR, ".result")
        assert texts(broken, "[role=alert]") == [
            "bad.mp3: not a sound file that can be decoded (Format not recognised)."
        ]
        assert texts(too_large, "[role=alert]") == [
            "large.wav: larger than the 5 MB that this server accepts."
        ]

        # What is shown is what the model says.
        assert texts(good, "h2") == ["<b>song & dance.flac"] and texts(good, ".status") == ["0:40"]
        tags = tagger.tag(song)
        assert texts(good, ".bars .label") == [tag.label for tag in tags]
        assert texts(good, ".bars .number") == [f"{100 * tag.probability:.1f} %" for tag in tags]
        track = good.find_element(By.CSS_SELECTOR, ".track").size["width"]
        for fill, tag in zip(good.find_elements(By.CSS_SELECTOR, ".fill"), tags, strict=True):
            assert fill.size["width"] == pytest.approx(track * tag.probability, abs=1.5)

        # The colours over time: each cell lies between those of 0 and 1 as its probability does.
        taggram = tagger.taggram(song, step_seconds=(387 // 8) * 1710 / 22050)
        assert len(taggram.starts) == 4
        first, second, last = browser.execute_script(
            """const canvas = document.querySelector(".cells"), context = canvas.getContext("2d");
            const row = context.getImageData(0, 5, canvas.width, 1).data;
            const at = (x) => [...row.slice(4 * Math.floor(x * canvas.width))].slice(0, 3);
            return [0.01, 0.5, 0.99].map(at);"""
        )
        low, high = np.array([0xF1, 0xEE, 0xF8]), np.array([0x3F, 0x1F, 0x9E])
        row = tagger.labels.index(tags[0].label)
        middles = (taggram.starts + taggram.ends) / 2
        for colour, seconds in ((first, 0.4), (second, 20.0), (last, 39.6)):
            fraction = taggram.probabilities[np.abs(middles - seconds).argmin(), row]
            np.testing.assert_allclose(colour, low + fraction * (high - low), atol=1.5)
        # One time axis for both.
        levels, cells = (
            good.find_element(By.CSS_SELECTOR, f"canvas.{name}").rect
            for name in ("levels", "cells")
        )
        assert (levels["x"], levels["width"]) == (cells["x"], cells["width"])
        assert levels["width"] > 600
        assert texts(good, ".names span") == [tag.label for tag in tags]

        # The player's position is shown over both, and followed.
        browser.execute_script("document.querySelector('audio').currentTime = 10")
        wait.until(lambda _: "0:10.0: " in good.text)
        head = good.find_element(By.CSS_SELECTOR, ".head").rect
        assert head["x"] + head["width"] / 2 == pytest.approx(
            levels["x"] + levels["width"] / 4, abs=1.5
        )
        assert head["height"] > levels["height"] + cells["height"]
        good.find_element(By.CSS_SELECTOR, ".cells").click()
        wait.until(
            lambda _: (
                abs(
                    browser.execute_script("return document.querySelector('audio').currentTime")
                    - 20
                )
                < 0.2
            )
        )

        # The same as a table, the labels in the order of the bars.
        good.find_element(By.TAG_NAME, "summary").click()
        wait.until(lambda _: good.find_elements(By.CSS_SELECTOR, "tbody tr"))
        assert texts(good, "thead th") == ["from", "to", *(tag.label for tag in tags)]
        cell = good.find_elements(By.CSS_SELECTOR, "tbody tr")[1].find_elements(By.TAG_NAME, "td")[
            2
        ]
        assert cell.text == f"{100 * taggram.probabilities[1, row]:.1f} %"

        # The card, with its words and not its Markdown.
        browser.find_element(By.CSS_SELECTOR, "#about summary").click()
        card = browser.find_element(By.ID, "card").text
        assert "accuracy 0.6396 on the validation split" in card
        assert "modulation on arrays" in card
        assert "`" not in card
        assert tmp_path.joinpath("page.png").write_bytes(browser.get_screenshot_as_png()) > 20_000

        # On a phone nothing is wider than the screen.
        phone = {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360

        # Light and dark, every text keeps a contrast of at least 4.5 (WCAG 2, AA).
        for scheme in ("light", "dark"):
            # Without motion colours change at once.
            features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
            wanted = [{"name": name, "value": value} for name, value in features.items()]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
            for selector in (
                "h1",
                "#summary",
                "#limits",
                ".link",
                ".bars .number",
                ".error",
                ".hertz span",
                "footer",
                "button",
            ):
                assert contrast(browser, selector) >= 4.5, (scheme, selector)

        good.find_element(By.CSS_SELECTOR, ".result-head button").click()
        assert len(browser.find_elements(By.CSS_SELECTOR, ".result")) == 2

        messages = [
            json.loads(entry["message"])["message"] for entry in browser.get_log("performance")
        ]
        asked = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        # `chrome` is the browser itself, whose first tab is its own page.
        own = re.compile(rf"((blob:)?http://127\.0\.0\.1:{port}/|data:|chrome(-[a-z]+)?:)")
        assert {
            f"http://127.0.0.1:{port}/{path}"
            for path in ("", "page.js", "style.css", "api/model", "api/tag")
        } <= set(asked)
        assert [url for url in asked if not own.match(url)] == []
        # That a file was refused is all that the console says.
        said = [entry["message"] for entry in browser.get_log("browser")]
        assert len(said) == 1 and "/api/tag" in said[0] and "422" in said[0], said


def contrast(browser, selector):
    """The ratio of luminances of a text and of the nearest ground that is not transparent."""
    colours = browser.execute_script(
        """let element = document.querySelector(arguments[0]);
        const ink = getComputedStyle(element).color;
        const transparent = (node) => getComputedStyle(node).backgroundColor.endsWith(", 0)");
        while (element.parentElement && transparent(element)) element = element.parentElement;
        return [ink, getComputedStyle(element).backgroundColor];""",
        selector,
    )
    luminances = []
    for colour in colours:
        channels = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        luminances.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_a_model_of_synthetic_audio_is_labelled(browser, live):
    model = Tagger.load("gtzan").model
    tagger = Tagger(dataclasses.replace(model, dataset={**model.dataset, "synthetic": True}))
    with live(create_app(tagger)) as port:
        browser.get(f"http://localhost:{port}/")
        warning = browser.find_element(By.ID, "synthetic")
        WebDriverWait(browser, 10, poll_frequency=0.05).until(lambda _: warning.is_displayed())
        assert warning.text.startswith("SYNTHETIC: this model was trained on synthetic audio.")
