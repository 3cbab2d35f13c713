"""The page in a real headless browser: it loads in silence, says what the trace says, and obeys the keyboard.

Needs the system's chromium and chromedriver (Debian: `apt install chromium chromium-driver`) and selenium; run with
`make test-browser`. `tests/unit/test_report.py` covers the same data without a browser.
"""

import re
from pathlib import Path
from typing import Any

import pytest

import tests.report_kit as kit
from dopd.inspection.schema import read_trace
from dopd.report.palette import contrast
from tests.browser_kit import DESK, PHONE, find, opened, show_first, text

pytestmark = pytest.mark.browser


def first_record(report: Path) -> dict[str, Any]:
    """The completion that `show_first` puts into the page."""
    return read_trace(report.parent / "dopd-seed0" / "trace.jsonl")[0]


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        ActionChains(page).send_keys(getattr(Keys, key, key)).perform()


def card(page: Any) -> dict[str, str]:
    return {node.get_attribute("data-field"): node.text for node in find(page, "#card [data-field]")}


# --- Loading


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_loads_in_silence(driver: Any, report: Path, scheme: str) -> None:
    page = opened(driver, report, DESK, scheme)
    for selector in ("#headline table", "#curves svg", "#panes .tok", "#differences table", "#largest-gaps button"):
        assert find(page, selector), selector
    assert page.get_log("browser") == []


def test_nothing_is_fetched(page: Any) -> None:
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_is_light_whole_and_without_what_needs_a_pointer(driver: Any, report: Path, scheme: str) -> None:
    page = opened(driver, report, DESK, scheme)
    show_first(page)
    press(page, "t")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    try:
        style = "const of = (selector) => getComputedStyle(document.querySelector(selector)); return "
        assert page.execute_script(style + "of('body').backgroundColor") == "rgb(246, 245, 241)"
        assert page.execute_script(style + "of('.tok').printColorAdjust") == "exact"
        for selector in ("#lists", "#pickers", "#theme", ".downloads", "#keys"):
            assert page.execute_script(style + f"of('{selector}').display") == "none", selector
        cut = "[...document.querySelectorAll('.pane dd')].filter((node) => node.scrollHeight > node.clientHeight + 1)"
        assert page.execute_script(f"return {cut}.length") == 0
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        press(page, "t")


# --- The card says what the trace says


def test_the_card_of_every_token_equals_the_trace(page: Any, report: Path) -> None:
    record, nodes = first_record(report), show_first(page)
    assert len(nodes) == len(record["tokens"])
    for n, token in enumerate(record["tokens"]):
        page.execute_script("arguments[0].focus()", nodes[n])
        values = card(page)
        assert values["q_T"] == kit.probability(token["logprob_teacher"])
        assert values["q_S"] == kit.probability(token["logprob_student"])
        assert values["q_plain"] == kit.probability(token["logprob_plain"])
        assert values["gap"] == kit.shown(token["gap"])
        assert values["threshold"] == kit.shown(record["thresholds"]["gap"])
        assert values["entropy"] == kit.shown(token["entropy"])
        assert values["loss"] == kit.shown(token["loss"])
        assert values["weight"] == kit.shown(token["weight"], 2)
        assert values["divergence"] == record["rules"][token["regime"]]["divergence"].replace("_", " ")
        assert nodes[n].get_attribute("class").split()[1] == token["regime"]
        for name in ("top_target", "top_student"):
            shown = page.execute_script(
                "return [...document.querySelectorAll(`#card [data-field=${arguments[0]}] code`)]"
                ".map((node) => [node.title, node.nextSibling.nextSibling.textContent])",
                name,
            )
            assert shown == [[word, kit.shown(prob if prob != 0.61234 else 0.6123)] for word, prob in token[name]]


def test_hovering_opens_the_card_and_leaving_closes_it(page: Any) -> None:
    from selenium.webdriver import ActionChains

    node = show_first(page)[2]
    ActionChains(page).move_to_element(node).perform()
    assert page.find_element("id", "card").is_displayed()
    ActionChains(page).move_to_element(page.find_element("id", "title")).perform()
    assert not page.find_element("id", "card").is_displayed()


def test_colour_is_stronger_where_the_gap_is_larger(page: Any, report: Path) -> None:
    tokens, nodes = first_record(report)["tokens"], show_first(page)
    strengths = [float(page.execute_script("return arguments[0].style.getPropertyValue('--s')", n)) for n in nodes]
    expected = [token["gap"] / (token["gap"] + kit.THRESHOLDS["gap"]) for token in tokens]
    assert strengths == pytest.approx(expected, abs=1e-3)


def test_an_unrouted_run_is_shown_too(page: Any) -> None:
    page.execute_script("choose({run: 2, step: 0})")
    page.execute_script("document.querySelector('#panes .tok').focus()")
    values = card(page)
    assert "gap" not in values and "q_S" not in values and values["loss"]


# --- Keyboard


def test_arrows_move_between_tokens(page: Any) -> None:
    nodes = show_first(page)
    page.execute_script("arguments[0].focus()", nodes[0])

    def at() -> int:
        return int(page.execute_script("return document.activeElement.dataset.n"))

    press(page, "ARROW_RIGHT", "ARROW_RIGHT")
    assert at() == 2 and page.find_element("id", "card").is_displayed()
    press(page, "ARROW_LEFT")
    assert at() == 1
    press(page, "END")
    assert at() == len(nodes) - 1
    press(page, "ARROW_UP")
    assert at() < len(nodes) - 1
    press(page, "HOME")
    assert at() == 0
    press(page, "ARROW_DOWN")
    assert at() > 0
    press(page, "ESCAPE")
    assert not page.find_element("id", "card").is_displayed()


def test_one_token_of_an_answer_is_in_the_tab_order(page: Any) -> None:
    nodes = show_first(page)
    page.execute_script("arguments[0].focus()", nodes[0])
    press(page, "ARROW_RIGHT")
    stops = [n for n, node in enumerate(find(page, "#panes .tok")) if node.get_attribute("tabindex") == "0"]
    assert stops == [1]


def test_letters_change_step_example_rollout_and_what_stands_beside(page: Any) -> None:
    show_first(page)
    state = "const item = TRACES[SCOPE.item]; return [item.step, item.key, item.rollout, SCOPE.beside >= 0]"
    step, key, rollout, _ = page.execute_script(state)
    press(page, "]")
    assert page.execute_script(state)[0] > step
    press(page, "[", "j")
    assert page.execute_script(state)[1] != key
    press(page, "k", "r")
    assert page.execute_script(state)[1:3] == [key, 1 - rollout]
    press(page, "c")
    assert page.execute_script(state)[3] and len(find(page, ".pane")) == 2
    press(page, "/")
    assert page.execute_script("return document.activeElement.id") == "search"


def test_charts_are_read_with_arrows(page: Any) -> None:
    page.execute_script("document.querySelector('.chart svg').focus()")
    before = text(page, ".chart .read")
    press(page, "ARROW_LEFT")
    assert text(page, ".chart .read") != before


# --- Pickers and lists


def test_the_same_prompt_stands_beside_it_from_another_method(page: Any) -> None:
    show_first(page)
    options = [node.text for node in find(page, "#pick-beside option")]
    assert options[0] == "nothing" and any(option.startswith("vanilla, seed 0, step 2") for option in options)
    place = next(n for n, option in enumerate(options) if option.startswith("vanilla"))
    find(page, "#pick-beside option")[place].click()
    prompts = [node.text for node in find(page, "[data-field=prompt]")]
    assert len(prompts) == 2 and prompts[0] == prompts[1]
    press(page, "j")
    prompts = [node.text for node in find(page, "[data-field=prompt]")]
    assert len(prompts) == 2 and prompts[0] == prompts[1]


def test_search_finds_words_across_tokens(page: Any, report: Path) -> None:
    show_first(page)
    page.find_element("id", "search").send_keys("SevenTeen")
    hits = find(page, "#search-hits button")
    completions = sum(len(read_trace(path)) for path in report.parent.glob("*/trace.jsonl"))
    assert text(page, "#search-count").startswith(f"{2 * completions} tokens")
    assert [node.text for node in find(page, "#panes .tok.hit")] == ["seven", "teen"]
    hits[0].click()
    assert page.execute_script("return document.activeElement.classList.contains('tok')")
    assert page.find_element("id", "card").is_displayed()


def test_the_largest_gaps_come_first(page: Any, report: Path) -> None:
    records = read_trace(report.parent / "dopd-seed0" / "trace.jsonl")
    gaps = sorted((token["gap"] for record in records for token in record["tokens"]), reverse=True)
    shown = [node.text for node in find(page, "#largest-gaps .number")]
    assert shown == [kit.shown(gap) for gap in gaps[: len(shown)]] and len(shown) == 60
    find(page, "#largest-gaps button")[0].click()
    assert card(page)["gap"] == kit.shown(gaps[0])


def test_words_are_counted_by_regime(page: Any, report: Path) -> None:
    records = read_trace(report.parent / "dopd-seed0" / "trace.jsonl")
    found = [token["regime"] for record in records for token in record["tokens"] if token["text"] == " so"]
    cells = [node.text for node in find(page, "#words tr[data-word=so] td")][1:6]
    assert cells == [str(len(found)), *(str(found.count(label)) for label in ("HT", "HS", "LH", "LL"))]


def test_pictures_have_their_boxes(page: Any) -> None:
    page.execute_script("choose({run: 1, step: 9})")
    assert "could not be read" in text(page, ".pane") and not find(page, ".picture")
    page.execute_script("choose({run: 3, step: 9})")
    picture, box = page.find_element("css selector", ".picture img"), page.find_element("css selector", ".picture .box")
    assert picture.rect["width"] == 400
    assert box.rect["x"] - picture.rect["x"] == pytest.approx(100, abs=1)
    assert box.rect["y"] - picture.rect["y"] == pytest.approx(100, abs=1)
    assert (box.rect["width"], box.rect["height"]) == pytest.approx((200, 100), abs=1)
    label = page.find_element("css selector", ".picture .label")
    assert label.text == kit.EVIL and label.rect["y"] + label.rect["height"] <= box.rect["y"]


@pytest.mark.parametrize(
    "edges", [(0.0, 0.0, 0.1, 0.1), (0.9, 0.5, 1.0, 0.6), (0.45, 0.0, 0.5, 1.0), (0.5, 0.4, 0.6, 0.9)]
)
def test_a_long_label_of_a_box_is_whole_and_stays_within_the_picture(edges: Any, page: Any) -> None:
    page.execute_script("choose({run: 3, step: 9})")
    long = "the second red cup from the left, which is nearer to the plate than the blue one"
    page.execute_script(
        "document.querySelector('.picture').append(boxLabel(arguments[0], arguments[1], []))", long, list(edges)
    )
    picture, label = page.find_element("css selector", ".picture"), find(page, ".picture .label")[-1]
    assert label.text == long
    assert label.rect["x"] >= picture.rect["x"] - 1
    assert label.rect["x"] + label.rect["width"] <= picture.rect["x"] + picture.rect["width"] + 1
    cut = "return [arguments[0].scrollWidth - arguments[0].clientWidth, getComputedStyle(arguments[0]).overflow]"
    assert page.execute_script(cut, label) == [0, "visible"]


def test_labels_of_neighbours_do_not_cover_one_another(page: Any) -> None:
    page.execute_script(
        "choose({run: 3, step: 9}); const frame = document.querySelector('.picture'), taken = [];"
        "frame.querySelectorAll('.label').forEach((node) => node.remove());"
        "for (const box of [[0.02, 0.3, 0.15, 0.4], [0.3, 0.31, 0.5, 0.45]])"
        " frame.append(boxLabel('a green triangle', box, taken))"
    )
    first, second = (node.rect for node in find(page, ".picture .label"))
    assert first["y"] + first["height"] <= second["y"] or second["y"] + second["height"] <= first["y"]


# --- What a model wrote is text


def test_markup_in_a_completion_is_shown_as_text(page: Any) -> None:
    page.execute_script(
        "choose({run: 0, step: 0}); choose({key: TRACES.find((item) => item.prompt.includes('second')).key})"
    )
    page.execute_script("choose({rollout: 1})")
    assert text(page, "[data-field=prompt]") == f"second {kit.EVIL}"
    assert find(page, "#panes .tok")[-1].text == kit.EVIL
    page.execute_script("arguments[0].focus()", find(page, "#panes .tok")[-1])
    assert card(page)["text"] == kit.EVIL
    page.find_element("id", "search").send_keys("onerror")
    assert find(page, "#search-hits button")
    assert page.execute_script("return [window.owned, document.images.length]") == [None, 0]
    assert page.title == "dag: dopd and vanilla" and page.get_log("browser") == []


# --- Contrast, themes and small screens


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_drawn_text_has_the_contrast_of_wcag_aa(driver: Any, report: Path, scheme: str) -> None:
    page = opened(driver, report, DESK, scheme)
    show_first(page)
    page.execute_script("document.querySelector('#panes .tok').focus()")
    pairs = page.execute_script(CONTRAST_PAIRS)
    assert len(pairs) > 100
    low = [(tag, ink, behind) for tag, ink, behind in pairs if contrast(hexadecimal(ink), hexadecimal(behind)) < 4.5]
    assert low == []


# The colour of every text and, blended over one another on a canvas, the colours behind it.
CONTRAST_PAIRS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const behind = (node) => {
  const layers = [];
  for (let at = node; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
  canvas.clearRect(0, 0, 1, 1);
  for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(" ");
};
const solid = (colour) => {
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(" ");
};
const seen = [];
for (const node of document.querySelectorAll("main *, header *, #card *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  const skipped = node.disabled || node.closest("svg, .unseen, noscript, .picture");
  if (!own || skipped || !node.getClientRects().length) continue;
  seen.push([node.tagName + "." + node.className, solid(getComputedStyle(node).color), behind(node)]);
}
return seen;
"""


def hexadecimal(channels: str) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in re.findall(r"\d+", channels))


def test_the_button_and_the_key_change_the_theme(page: Any) -> None:
    def background() -> str:
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = background()
    page.find_element("id", "theme").click()
    dark = background()
    press(page, "t")
    assert dark != light == background()


@pytest.mark.parametrize("beside", [False, True])
def test_a_phone_never_scrolls_sideways(driver: Any, report: Path, beside: bool) -> None:
    page = opened(driver, report, PHONE)
    show_first(page)
    if beside:
        press(page, "c")
    page.find_element("id", "search").send_keys("on")
    widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
    assert page.execute_script(widths) == [PHONE[0]] * 2
    assert page.get_log("browser") == []


def test_a_tap_opens_a_sheet_that_leaves_the_token_in_sight(driver: Any, report: Path) -> None:
    page = opened(driver, report, PHONE)
    node = show_first(page)[-1]
    page.execute_script("arguments[0].scrollIntoView({block: 'end'}); arguments[0].click()", node)
    sheet, token = (
        page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", n)
        for n in (page.find_element("id", "card"), node)
    )
    assert sheet["left"] >= 0 and sheet["right"] <= PHONE[0] and sheet["bottom"] <= PHONE[1]
    assert token["top"] >= 0 and token["bottom"] <= sheet["top"]
