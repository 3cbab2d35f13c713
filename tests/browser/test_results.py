"""What a reader takes from the page, in a real browser: results on a phone, cards by touch, files to save."""

import csv
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import tests.report_kit as kit
from dopd.report.page import inspection_page, write_report
from tests.browser_kit import PHONE_390, find, opened, show_first, text

pytestmark = pytest.mark.browser
SVG = "{http://www.w3.org/2000/svg}"


# --- A phone


@pytest.fixture
def phone(driver: Any, report: Path) -> Iterator[Any]:
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 1})
    yield opened(driver, report, PHONE_390)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def tap(page: Any, node: Any) -> None:
    """A finger on a node: touch events, and what the browser makes of them."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    page.execute_script("arguments[0].scrollIntoView({block: 'start'}); scrollBy(0, -120)", node)
    finger = ActionBuilder(page, mouse=PointerInput("touch", "finger"))
    finger.pointer_action.move_to(node).pointer_down().pointer_up()
    finger.perform()


def test_no_column_of_a_table_is_out_of_sight_on_a_phone(phone: Any) -> None:
    assert phone.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    for section in ("headline", "comparisons", "differences"):
        cells = find(phone, f"#{section} tbody td")
        columns = [node.get_attribute("textContent") for node in find(phone, f"#{section} thead th")][1:]
        assert cells
        for cell in cells:
            box = cell.rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] > 0
            assert cell.get_attribute("scrollWidth") <= cell.get_attribute("clientWidth")
        named = [cell.get_attribute("data-label") for cell in cells]
        assert named == columns * (len(cells) // len(columns))
    scrolled = "return [...document.querySelectorAll('.sheet')].filter((n) => n.scrollWidth > n.clientWidth).length"
    assert phone.execute_script(scrolled) == 0


def test_no_column_of_seven_methods_is_out_of_sight_on_a_tablet_or_on_paper(driver: Any, tmp_path: Path) -> None:
    names = "vanilla privileged_teacher privileged_student dopd dopd_ema dopd_no_student_targets bridge_garden"
    for name in names.split():
        kit.run_folder(tmp_path / name, name, trace=[kit.record(0, 0, method=name)])
    report = write_report([tmp_path])
    wider = "[...document.querySelectorAll('.sheet')].filter((node) => node.scrollWidth > node.clientWidth + 1).length"
    for media, widths in (("", (761, 900, 1121)), ("print", (720, 794, 1050))):
        for width in widths:
            page = opened(driver, report, (width, 1000))
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": []})
            assert page.execute_script(f"return {wider}") == 0, (media, width)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_a_tap_opens_the_card_of_a_token_and_a_tap_elsewhere_closes_it(phone: Any, report: Path) -> None:
    nodes = show_first(phone)
    phone.execute_script(
        "window.kinds = []; for (const kind of ['touchstart', 'touchend', 'click', 'mousemove'])"
        "document.addEventListener(kind, (event) => window.kinds.push(kind), true)"
    )
    tap(phone, nodes[2])
    kinds = phone.execute_script("return window.kinds")
    assert kinds.index("touchstart") < kinds.index("touchend") < kinds.index("click")
    card, token = phone.find_element("id", "card"), nodes[2]
    assert card.is_displayed() and text(phone, "#card [data-field=text]") == token.text.strip()
    sheet = phone.execute_script("return arguments[0].getBoundingClientRect().toJSON()", card)
    assert sheet["left"] >= 0 and sheet["right"] <= 390
    tap(phone, nodes[0])
    assert card.is_displayed() and text(phone, "#card [data-field=text]") == nodes[0].text.strip()
    tap(phone, phone.find_element("id", "title"))
    assert not card.is_displayed()


# --- Files


@pytest.fixture
def saved(driver: Any, report: Path, tmp_path: Path) -> Any:
    """Press a button that saves a file, and give back the file."""
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    opened(driver, report, (1280, 900))
    (tmp_path / "kept").mkdir()

    def press(selector: str, kind: str) -> Path:
        button = driver.find_element("css selector", f'{selector} .downloads button[data-kind="{kind}"]')
        driver.execute_script("arguments[0].click()", button)
        for _ in range(400):
            new = [path for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".crdownload"]
            if new and new[0].stat().st_size:
                kept = tmp_path / "kept" / str(len(list((tmp_path / "kept").iterdir()))) / new[0].name
                kept.parent.mkdir()
                return new[0].rename(kept)
            time.sleep(0.05)
        raise AssertionError(f"{selector} {kind}: nothing was saved; {driver.get_log('browser')}")

    yield press
    assert driver.get_log("browser") == []


def test_every_figure_is_saved_as_svg_and_png(driver: Any, saved: Any) -> None:
    figures = find(driver, "#curves figure.chart")
    titles = [figure.find_element("css selector", "h3").text for figure in figures]
    assert len(titles) == len(find(driver, "#curves svg[role=img]")) > 8
    for n, title in enumerate(titles, 1):
        if n in (1, 2, len(titles)):  # a file of each kind of figure
            path = saved(f"#curves figure.chart:nth-child({n})", "SVG")
            drawing = ElementTree.parse(path).getroot()
            words = [node.text for node in drawing.iter(f"{SVG}text")]
            assert drawing.tag == f"{SVG}svg" and drawing.find(f"{SVG}title").text == title  # type: ignore[union-attr]
            assert "optimizer step" in words and path.suffix == ".svg"
            raw = path.read_text(encoding="utf-8")
            assert "var(" not in raw and "class=" not in raw and "style=" not in raw
    first = ElementTree.parse(saved("#curves figure.chart:nth-child(1)", "SVG")).getroot()
    assert {"dopd", "vanilla"} <= {node.text for node in first.iter(f"{SVG}text")}
    sides = [float(first.get(side, 0)) for side in ("width", "height")]
    picture = saved("#curves figure.chart:nth-child(1)", "PNG").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == tuple(round(3 * side) for side in sides)


def test_pictures_are_saved_in_light_colours_whatever_the_theme(driver: Any, saved: Any) -> None:
    light = saved("#curves figure.chart:nth-child(1)", "SVG").read_text()
    driver.find_element("id", "theme").click()
    assert saved("#curves figure.chart:nth-child(1)", "SVG").read_text() == light
    assert driver.execute_script("return document.documentElement.dataset.theme") == "dark"
    driver.find_element("id", "theme").click()


def test_tables_are_saved_as_csv_with_the_numbers_of_the_page(driver: Any, saved: Any) -> None:
    with saved("#headline", "CSV").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    shown = driver.execute_script("return DATA.headline")
    assert rows[0][:4] == ["", "greedy, no p", "greedy, no p: low", "greedy, no p: high"]
    assert [row[0] for row in rows[1:]] == [row["label"] for row in shown["rows"]]
    for row, of_page in zip(rows[1:], shown["rows"], strict=True):
        cell = of_page["cells"][0]
        assert [float(value) for value in row[1:4]] == [cell["mean"], cell["low"], cell["high"]]
    with saved("#words", "CSV").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["word", "all", "HT", "HS", "LH", "LL"]
    with saved("#comparisons", "CSV").open(newline="", encoding="utf-8") as file:
        compared = list(csv.reader(file))
    assert len({len(row) for row in compared}) == 1 and len(compared) > 1


def test_tables_are_saved_as_latex(driver: Any, saved: Any) -> None:
    text_of = saved("#comparisons", "LaTeX").read_text(encoding="utf-8")
    body = text_of.split("\\midrule")[1].split("\\bottomrule")[0]
    columns = len(driver.execute_script("return DATA.verdict.table.columns")) + 1
    assert all(line.count("&") == columns - 1 for line in body.strip().splitlines())
    (kinds,) = re.findall(r"begin{tabular}{(\S+)}", text_of)
    assert "\\toprule" in text_of and len(re.sub(r"p{4cm}", "p", kinds)) == columns and set(kinds[0]) == {"l"}
    assert "dopd against vanilla" in text_of and not re.search(r"(?<!\\)[%#_]", body)
    minus = driver.execute_script("return latexCell('-0.8 [-4.4, +2.7], well-known')")
    assert minus == "$-$0.8 [$-$4.4, +2.7], well-known"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
@pytest.mark.parametrize("table", ["#headline", "#comparisons"])
def test_latex_sets_a_saved_table_within_the_lines_of_a_document(table: str, saved: Any, tmp_path: Path) -> None:
    before = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\usepackage[T1]{fontenc}\\begin{document}"
    page = f"{before}\n{saved(table, 'LaTeX').read_text(encoding='utf-8')}\n\\end{{document}}\n"
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout


def test_what_a_model_wrote_runs_nowhere_in_a_saved_table(driver: Any, saved: Any) -> None:
    """A formula of a spreadsheet stays text, and so does a macro of LaTeX."""
    evil = '=HYPERLINK("http://x","y")', "\\input{secret} & 50% $x_1^2$ #~{}", "-2.5", "+1 [0, 2]", kit.EVIL
    safe = driver.execute_script("return arguments[0].map(csvCell)", list(evil))
    assert next(csv.reader([safe[0]])) == ["'" + evil[0]] and safe[2] == "-2.5"
    assert next(csv.reader([safe[3]])) == ["'+1 [0, 2]"] and next(csv.reader([safe[4]])) == [kit.EVIL]
    latex = driver.execute_script("return latexCell(arguments[0])", evil[1])
    assert latex == (
        "\\textbackslash{}input\\{secret\\} \\& 50\\% \\$x\\_1\\textasciicircum{}2\\$ \\#\\textasciitilde{}\\{\\}"
    )


def test_the_tokens_of_an_answer_are_saved_as_a_drawing(driver: Any, saved: Any) -> None:
    driver.execute_script(
        "choose({run: 0, step: 0}); choose({key: TRACES.find((item) => item.prompt.includes('second')).key});"
        "choose({rollout: 1})"
    )
    path = saved("#panes", "SVG")
    drawing = ElementTree.parse(path).getroot()
    words = [node.text for node in drawing.iter(f"{SVG}text")]
    tokens = [node.text.strip() for node in find(driver, "#panes .tok")]
    # The page breaks lines where a token does; the drawing has one piece of text for each token, after its title.
    assert [word for word in words if word in tokens][: len(tokens)] == tokens
    assert kit.EVIL in words and "<img" not in path.read_text(encoding="utf-8")
    assert len(list(drawing.iter(f"{SVG}rect"))) > len(tokens)
    assert saved("#panes", "PNG").read_bytes()[:4] == b"\x89PNG"


def test_a_token_with_signs_that_xml_cannot_hold_is_saved_too(driver: Any, tmp_path: Path) -> None:
    strange = kit.record(1, 0, texts=("a\x00b", "\x1b[31m", "\ud83d", "\udc4d x", "\u202e", "]]>", "&amp;"))
    run = kit.run_folder(tmp_path / "run", trace=[strange])
    opened(driver, write_report([run]), (1280, 900))
    drawn = driver.execute_script("return svgText(stripSvg(TRACES[0]))")
    assert ElementTree.fromstring(drawn.encode()).tag == f"{SVG}svg"
    assert driver.execute_script("encodeURIComponent(svgText(stripSvg(TRACES[0]))); return true")


def test_a_page_of_one_prompt_has_its_tokens_and_no_verdict(driver: Any, tmp_path: Path) -> None:
    page = tmp_path / "look.html"
    page.write_text(inspection_page("One prompt", "student a", [kit.record(0, 0)]), encoding="utf-8")
    opened(driver, page, (1280, 900))
    shown = [node.get_attribute("id") for node in find(driver, "main > section") if node.is_displayed()]
    assert shown == ["microscope", "lists"] and driver.get_log("browser") == []


# --- Curves


def test_the_method_of_interest_is_solid_and_drawn_over_the_others(driver: Any, report: Path) -> None:
    page = opened(driver, report, (1280, 900))
    lines = page.execute_script(
        "return [...document.querySelector('#curves figure svg[role=img]').querySelectorAll('path')]"
        ".filter((node) => Number(node.getAttribute('stroke-width')) > 1)"
        ".map((node) => [node.style.stroke, node.getAttribute('stroke-dasharray'), node.getAttribute('stroke-width')])"
    )
    assert [line[0] for line in lines] == ["var(--method-1)", "var(--method-0)"]
    assert lines[0][1] and lines[1][1] is None and float(lines[1][2]) > float(lines[0][2])


def test_no_label_of_a_figure_is_cut(driver: Any, report: Path) -> None:
    page = opened(driver, report, (1280, 900))
    outside = page.execute_script(
        "return [...document.querySelectorAll('#curves svg[role=img]')].flatMap((figure) => {"
        "const box = figure.getBoundingClientRect();"
        "return [...figure.querySelectorAll('text')].filter((node) => { const own = node.getBoundingClientRect();"
        "return own.left < box.left - 1 || own.right > box.right + 1"
        " || own.top < box.top - 1 || own.bottom > box.bottom + 1;"
        "}).map((node) => node.textContent); })"
    )
    assert outside == []
    names = page.execute_script("return [...document.querySelectorAll('#curves svg .axis')].map((n) => n.textContent)")
    assert len(names) == 2 * len(find(page, "#curves figure.chart")) and all(names)


def test_one_logged_step_shows_values_and_not_a_single_dot(driver: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        for method in ("vanilla", "dopd"):
            run = kit.run_folder(tmp_path / f"{method}{seed}", method, seed)
            kit.write_lines(run / "metrics.jsonl", [line for line in kit.metrics(6, method) if line["step"] == 6])
    page = opened(driver, write_report([tmp_path]), (1280, 900))
    assert text(page, "#curves figure .read").startswith("step 6, the only one")
    figure = page.find_element("css selector", "#curves figure svg[role=img]")
    assert [node.text for node in figure.find_elements("css selector", ".value")] == ["60%", "60%"]
    wide = page.execute_script(
        "const figure = [...document.querySelectorAll('#curves figure')]"
        ".find((node) => node.textContent.includes('Share of tokens'));"
        "return [...figure.querySelectorAll('path')].map((path) => path.getBBox().width)"
    )
    assert len(wide) == 4 and all(width > 300 for width in wide)
    assert page.get_log("browser") == []


# --- The verdict and warnings


def test_the_verdict_comes_first_and_warnings_say_what_to_do(driver: Any, tmp_path: Path) -> None:
    fall: Any = {"entropy": lambda t: 1.0 - 0.95 * t, "greedy": lambda t: 0.7 - 0.5 * t}
    for seed in range(3):
        kit.run_folder(tmp_path / f"run{seed}", seed=seed, **(fall if seed else {}))
    page = opened(driver, write_report([tmp_path]), (1280, 900))
    sections = [node.get_attribute("id") for node in find(page, "main > section") if node.is_displayed()]
    assert sections[:3] == ["verdict", "findings", "headline"]
    assert page.execute_script("return DATA.verdict.sentence") in text(page, "#verdict .sentence")
    assert text(page, "#findings .warned h3") == "dopd 1 warning" and "2 of 3 runs" in text(page, "#findings .finding")
    assert text(page, "#findings .advice").startswith("To do: Lower learning_rate")
    assert not find(page, "#findings details div")[0].is_displayed()
    find(page, "#findings summary")[0].click()
    assert find(page, "#findings details div")[0].text.startswith("seed 2: entropy fell")
