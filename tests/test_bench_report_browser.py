"""The report of a benchmark run in a browser: filters, tables, themes, a phone. It needs selenium and chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from bench_records import EVIL, made_up_cases, record_of

from neox_kernels.bench.record import OURS
from neox_kernels.bench.report import render

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402 - only where it is installed
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs the commands chromium and chromedriver, which are not both there"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
OPS = ["rotary", "softmax", "varlen", "gelu", "attention", "models"]
DTYPES = ["float32", "bfloat16"]
INDEXING = "PyTorch indexing"
ALL = [f"{op} {dtype}" for op in OPS for dtype in DTYPES]

# For every text in the page (or in its figures): the contrast to what lies behind it, by WCAG 2, the text, its size.
CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const channels = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const colour = channels(getComputedStyle(element).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element);
  if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const inFigure = element.namespaceURI.endsWith("svg");
  const [a, b] = [channels(inFigure ? style.fill : style.color), behind(element)].map(luminance).sort((x, y) => x - y);
  found.push([inFigure, (b + 0.05) / (a + 0.05), element.textContent.trim(), parseFloat(style.fontSize)]);
}
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("a report") / "out.html"
    file.write_text(render(record_of(list(made_up_cases(DTYPES, ((1, 1), (1, 2048)))), complete=False)))
    return file.as_uri()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    yield driver
    driver.quit()


class Browser:
    """The page in a browser: a wide window and a light theme, unless told otherwise."""

    def __init__(self, driver: Any, page: str) -> None:
        self.driver, self.page = driver, page
        self.screen()
        self.theme("light")
        self.open()

    def open(self, hash: str = "") -> None:
        self.driver.get("about:blank")  # else only the hash would change
        self.driver.get(self.page + hash)

    def screen(self, width: int = 1280, height: int = 900, *, phone: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def theme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def script(self, text: str, *args: Any) -> Any:
        return self.driver.execute_script(text, *args)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return found

    def shown(self) -> list[str]:
        """The parts that can be seen, and that their op's headings are seen with them."""
        parts, headings, tables = self.script(
            "const seen = (what) => [...document.querySelectorAll(what)].filter((x) => x.checkVisibility());"
            "const names = seen('article').map((x) => [x.dataset.op, x.dataset.dtype]);"
            "return [names, seen('h2[id]').map((x) => x.innerText), seen('table').length]"
        )
        assert headings == list(dict.fromkeys(op for op, _ in parts)) and tables == len(parts)
        return [f"{op} {dtype}" for op, dtype in parts]

    def button(self, value: str, name: str = "") -> Any:
        (found,) = self.all(f'.filter[data-name="{name}"] button[data-value="{value}"]' if name else
                            f'.filter button[data-value="{value}"]')  # fmt: skip
        return found

    def pressed(self) -> list[str]:
        return [x.text for x in self.all('.filter button[aria-pressed="true"]')]

    def hash(self) -> str:
        found: str = self.script("return location.hash")
        return found


@pytest.fixture
def browser(started: Any, page: str) -> Iterator[Browser]:
    yield Browser(started, page)
    assert [entry["message"] for entry in started.get_log("browser")] == []


def test_the_console_would_tell(started: Any, page: str) -> None:
    """That the check after every test sees an error, and one of loading something, which the page forbids itself."""
    browser = Browser(started, page)
    browser.script("const image = new Image(); image.src = 'https://example.invalid/x.png'; console.error('made up')")
    messages = " ".join(entry["message"] for entry in started.get_log("browser"))
    assert "made up" in messages and "Content Security Policy" in messages


def test_figures_and_tables_are_seen(browser: Browser) -> None:
    assert browser.shown() == ALL
    sizes = browser.script("return [...document.querySelectorAll('svg')].map((x) => [x.clientWidth, x.clientHeight])")
    assert len(sizes) == len(ALL) * 3
    assert all(width > 500 and height > 100 for width, height in sizes)
    inside = browser.script(
        "return [...document.querySelectorAll('svg')].flatMap((svg) => { const frame = svg.getBoundingClientRect();"
        "return [...svg.querySelectorAll('text')].filter((text) => { const box = text.getBoundingClientRect();"
        "return !box.width || box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1"
        "|| box.bottom > frame.bottom + 1 }).map((text) => text.textContent) })"
    )
    assert inside == []


def test_text_of_a_figure_does_not_overlap(browser: Browser) -> None:
    overlaps = browser.script(
        "return [...document.querySelectorAll('svg')].flatMap((svg) => {"
        "const boxes = [...svg.querySelectorAll('text')].map((x) => [x.textContent, x.getBoundingClientRect()]);"
        "return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>"
        "Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&"
        "Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.35 * Math.min(a.height, b.height)"
        ").map(([other]) => `${name} | ${other}`)) })"
    )
    assert overlaps == []


def test_filters_by_clicks(browser: Browser) -> None:
    browser.button("softmax").click()
    assert browser.shown() == ["softmax float32", "softmax bfloat16"]
    assert browser.hash() == "#op=softmax" and browser.pressed() == ["softmax", "all"]
    browser.button("bfloat16").click()
    assert browser.shown() == ["softmax bfloat16"]
    browser.button("models").click()
    assert browser.shown() == ["softmax bfloat16", "models bfloat16"]
    assert browser.hash() == "#op=softmax&op=models&dtype=bfloat16"
    assert browser.all("#status")[0].text == "2 of 12 parts shown"
    browser.button("softmax").click()
    browser.button("", "dtype").click()
    assert browser.shown() == ["models float32", "models bfloat16"]
    browser.button("models").click()
    assert browser.shown() == ALL and browser.pressed() == ["all", "all"]
    assert browser.hash() == "" and browser.all("#status")[0].text == ""


def test_filters_by_keys(browser: Browser) -> None:
    def press(key: str) -> str:
        browser.driver.switch_to.active_element.send_keys(key)
        text: str = browser.driver.switch_to.active_element.text
        return text

    focus = [press(Keys.TAB) for _ in range(10)]
    assert focus == ["all", *OPS, "all", *DTYPES]
    ring = browser.script("const x = getComputedStyle(document.activeElement); return [x.outlineStyle, x.outlineWidth]")
    assert ring == ["solid", "2px"]
    assert press(Keys.SPACE) == "bfloat16" and browser.shown() == [f"{op} bfloat16" for op in OPS]
    assert press(Keys.SHIFT + Keys.TAB) == "float32"
    press(Keys.NULL)
    press(Keys.ENTER)
    assert browser.shown() == ALL and browser.pressed() == ["all", "float32", "bfloat16"]


def test_a_link_shows_what_was_chosen(browser: Browser) -> None:
    browser.open("#op=gelu&op=rotary&dtype=float32")
    assert browser.shown() == ["rotary float32", "gelu float32"]
    assert browser.pressed() == ["rotary", "gelu", "float32"]
    browser.driver.refresh()
    assert browser.shown() == ["rotary float32", "gelu float32"]
    browser.script("location.hash = '#dtype=bfloat16&op=varlen'")
    browser.driver.implicitly_wait(0)
    assert browser.shown() == ["varlen bfloat16"]
    browser.open("#op=unknown&dtype=%3Cb%3E&nonsense")
    assert browser.shown() == ALL


def test_without_javascript_everything_is_shown(browser: Browser) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open("#op=gelu")
        assert not browser.all("thead button") and not browser.all("#filters")[0].is_displayed()
        assert browser.shown() == ALL
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_tables_are_sorted(browser: Browser) -> None:
    browser.open("#op=varlen&dtype=float32")
    table = next(x for x in browser.all("table") if x.is_displayed())
    head = table.find_elements(By.CSS_SELECTOR, "thead th")

    def column(number: int) -> list[str]:
        found: list[str] = browser.script(
            "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[arguments[1]]?.dataset.value ?? '')",
            table,
            number,
        )
        return found

    def contenders() -> list[str]:
        return [x.text for x in table.find_elements(By.CSS_SELECTOR, "tbody th:nth-child(2)")]

    before, names = column(2), contenders()
    numbers = sorted(float(x) for x in before if x)
    absent = [""] * (len(before) - len(numbers))
    assert len(absent) == 4 and numbers != [float(x) for x in before if x]
    head[2].find_element(By.TAG_NAME, "button").click()
    assert head[2].get_attribute("aria-sort") == "ascending"
    assert [float(x) for x in column(2) if x] == numbers and column(2)[-4:] == absent
    assert all(x.is_displayed() and x.size["width"] > 20 for x in table.find_elements(By.CSS_SELECTOR, ".case span"))
    head[2].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert head[2].get_attribute("aria-sort") == "descending"
    assert [float(x) for x in column(2) if x] == numbers[::-1] and column(2)[-4:] == absent
    head[1].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert head[2].get_attribute("aria-sort") is None and head[1].get_attribute("aria-sort") == "ascending"
    assert list(dict.fromkeys(contenders())) == [
        EVIL,
        "flash-attn",
        OURS,
        f"{OURS} in place",
        f"{OURS}, triton",
        INDEXING,
    ]
    for _ in range(2):
        head[1].find_element(By.TAG_NAME, "button").click()
    assert head[1].get_attribute("aria-sort") is None
    assert column(2) == before and contenders() == names


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_itself_never_scrolls_sideways(browser: Browser, width: int) -> None:
    browser.screen(width, 740, phone=width < 500)
    browser.open()
    assert browser.script("return innerWidth") == width
    assert browser.script("return document.documentElement.scrollWidth") <= width
    wide = browser.script(
        "return [...document.querySelectorAll('.scroll')].map((x) => [x.scrollWidth > x.clientWidth, x.tabIndex])"
    )
    assert any(scrolls for scrolls, _ in wide) or width > 500
    assert {tab for _, tab in wide} == {0}, "what scrolls can be scrolled by keys"
    figure = min(size for in_figure, _, _, size in browser.script(CONTRASTS) if in_figure)
    shrunk = browser.script(
        "return Math.min(...[...document.querySelectorAll('svg')].map((x) => x.clientWidth / x.viewBox.baseVal.width))"
    )
    assert figure * shrunk >= 9, "the least text, in CSS pixels"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(browser: Browser, theme: str) -> None:
    browser.theme(theme)
    browser.open("#op=softmax")
    red, green, blue = browser.script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    assert max(red, green, blue) < 60 if theme == "dark" else min(red, green, blue) > 240
    found = browser.script(CONTRASTS)
    assert sum(in_figure for in_figure, *_ in found) > 200 and len(found) > 1000
    assert [(text, contrast) for _, contrast, text, _ in found if contrast < 4.5] == []
