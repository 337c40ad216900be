"""The page of a report in a real browser: quiet, alone, as wide as a phone, legible in the dark, and on paper."""

import base64
import re

import pytest
from browser import CHROMIUM, Browser

import run_moefication as rm

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
WIDTHS = (360, 1200)
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, for text of any size
A4 = (595, 842)  # points
# The least contrast of all text on the page with what lies behind it, and the text that has it. Colours of text are
# opaque; backgrounds are laid over one another up to one that is opaque.
CONTRAST = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const [r, g, b, a = 1] = numbers(getComputedStyle(element).backgroundColor);
    if (a === 1 || !element.parentElement) return a ? [r, g, b] : [255, 255, 255];
    return behind(element.parentElement).map((under, i) => a * [r, g, b][i] + (1 - a) * under);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let worst = [Infinity, ""], count = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("style")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(numbers(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    count += 1;
    if (ratio < worst[0]) worst = [ratio, walker.currentNode.data.trim()];
  }
  return [...worst, count];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(shared_run, tmp_path_factory, text_folder):
    folder = tmp_path_factory.mktemp("report")
    texts = [text_folder / "c4.jsonl", text_folder / "github.jsonl"]
    settings = rm.ReportSettings(block_size=32, max_tokens=256, rounds=2, new_tokens=4)
    splits = [shared_run.split_folder] * 2
    how = dict(dense_path=shared_run.model, split_paths=splits)
    return rm.report(shared_run.moe, texts, folder / "report.html", settings, **how).page


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_quiet_and_asks_for_nothing(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.evaluate("document.querySelectorAll('figure svg').length") == 8
    sent = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in sent if not url.startswith("data:")] == [page.resolve().as_uri()]
    noise = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
    assert [event for event in browser.events if event["method"] in noise] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_no_wider_than_the_window(browser, page, width):
    browser.open(page, width)
    for opened in ("false", "true"):
        browser.evaluate(f"document.querySelectorAll('details').forEach((one) => {{ one.open = {opened}; }})")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("[...document.querySelectorAll('figure svg')].every((one) => one.clientWidth > 250)")
    rows = "[...document.querySelectorAll('td')].map((one) => one.getBoundingClientRect().height)"
    assert max(browser.evaluate(rows)) < 40  # no number is broken into lines


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_legible(browser, page, dark):
    browser.open(page, 360, dark=dark)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    contrast, text, count = browser.evaluate(CONTRAST)
    assert count > 200
    assert contrast >= LEAST_CONTRAST, text
    sizes = "[...document.querySelectorAll('svg text')].map((one) => one.getBoundingClientRect().height)"
    assert min(browser.evaluate(sizes)) > 9  # of letters in figures, in pixels


def test_the_contrast_is_computed(browser, tmp_path):
    """Grey on half-transparent black over white, by hand: 128 over 127.5."""
    (tmp_path / "grey.html").write_text(
        '<body style="background:#fff"><p style="background:rgba(0,0,0,.5);color:rgb(255,255,255)">words'
    )
    browser.open(tmp_path / "grey.html", 360)
    contrast, text, count = browser.evaluate(CONTRAST)
    grey = ((127.5 / 255 + 0.055) / 1.055) ** 2.4
    assert (text, count) == ("words", 1)
    assert contrast == pytest.approx(1.05 / (grey + 0.05), rel=0.01)


def test_the_page_prints_on_a4_in_light_colours(browser, page):
    browser.open(page, 1200, dark=True)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    answer = browser.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
    pdf = base64.b64decode(answer["data"])
    boxes = re.findall(rb"/MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert 1 < len(boxes) < 12
    assert all((round(float(width)), round(float(height))) == A4 for width, height in boxes)
