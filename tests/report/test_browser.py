"""The report's page in a browser: what it shows, what pointing, keys and clicks do, and that anyone can read it."""

import itertools
from types import SimpleNamespace

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest

from nbhelpers.profiles import get_profile
from nbhelpers.report.page import notebook_html, write_index
from nbhelpers.workspace import open_run

HOSTILE = "student </script><b>bold</b> \"q\" 'a' &amp; <!--"
NAMES = ["fine_tuned", "fine_tuned_extra", "recovered_magnitude_90", "recovered_merged_90", "sparse_merged_90"]
NAMES += ["compact_merged_75", HOSTILE]
CAPTION = 'A "reading" of `c_fc`, </script><b>bold</b> <!-- and more'

# Contrast of every visible text with what lies behind it, as WCAG 2 defines it: [ratio, text] below 4.5.
CONTRASTS = """() => {
  const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
  const behind = (node) => {
    if (!node) return matchMedia("print").matches || matchMedia("(prefers-color-scheme: light)").matches
      ? [255, 255, 255] : [18, 18, 18];
    const color = parse(getComputedStyle(node).backgroundColor);
    return color[3] === 1 ? color.slice(0, 3) : over(color, behind(node.parentElement));
  };
  const light = (color) => color.map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    const text = [...node.childNodes].map((child) => (child.nodeType === 3 ? child.data : "")).join("").trim();
    if (!text || !node.checkVisibility() || node.closest("script")) continue;
    const style = getComputedStyle(node), ground = behind(node);
    const shown = over(parse(node instanceof SVGElement ? style.fill : style.color), ground);
    const [low, high] = [light(shown), light(ground)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), text]);
  }
  return found;
}"""


def comparison() -> pd.DataFrame:
    """Return seven models, some of the same size and about the same speed, one without a p."""
    table = pd.DataFrame({"model": NAMES, "accuracy": [0.84, 0.815, 0.67, 0.81, 0.81, 0.80, 0.828]})
    return table.assign(
        accuracy_low=table["accuracy"] - 0.03,
        accuracy_high=table["accuracy"] + 0.02,
        f1=table["accuracy"],
        total_parameters=3451392,
        peak_memory_bytes=55e6,
        active_parameters=[3451392, 3451392, 1858867, 1858867, 1845439, 2135848, 2561664],
        encoder_sparsity=[0, 0, 0.9, 0.9, 0.907, 0.741, 0],
        file_bytes=[13.8e6, 13.8e6, 13.8e6, 13.8e6, 7.6e6, 8.6e6, 10.2e6],
        latency_ms=[116.9, 116.3, 117.7, 9.9, 33.6, 30.7, 56.3],
        speedup=[1.0, 1.009, 1.013, 11.8, 3.49, 3.78, 2.07],
        p_value=[1.0, 0.018, 1e-19, 0.024, np.nan, 0.05, 0.504],
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page over made-up results: its path and the table that it shows."""
    table = comparison()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_ROOT", str(tmp_path_factory.mktemp("page")))
        run = open_run(get_profile("smoke"))
        rows = table.assign(p_value=table["p_value"].fillna(0.2)).to_dict("records")
        places = {"dense": 0, "control": 1, "sparse": 4, "student": 6, "compressed": 5}
        leading = {key: rows[i] for key, i in places.items()}
        tfidf = {"accuracy": 0.862, "accuracy_low": 0.84, "accuracy_high": 0.88, "seeds": 1}
        gap = {"difference": -0.028, "low": -0.053, "high": -0.002, "p_value": 0.03}
        run.record("comparison", test_reviews=996, tfidf=tfidf, against_tfidf=gap, **leading)
        run.save_table("comparison", table)
        (run.reports / "figures").mkdir()
        for i, name in enumerate(["01_lengths", "01_accuracy", "06_cost"]):
            run.record("captions", **{name: CAPTION})
            pixels = np.full((40, 90 + 60 * i, 3), 0.5 + 0.1 * i)
            matplotlib.image.imsave(run.reports / "figures" / f"{name}.png", pixels)
        return SimpleNamespace(path=write_index(run), table=table)


@pytest.fixture(scope="module", params=[(1280, "light"), (375, "dark")], ids=["wide-light", "narrow-dark"])
def screen(browser, request):
    """A tab that knows what it asked for (``requests``) and what went wrong (``faults``)."""
    width, scheme = request.param
    size = {"width": width, "height": 800}
    with browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce") as context:
        tab = context.new_page()
        tab.set_default_timeout(5000)
        tab.requests, tab.faults = [], []
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.on("console", lambda message: tab.faults.append(message.text))
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        yield tab


@pytest.fixture
def page(screen, made):
    """The page as it is when it has just been opened."""
    screen.requests.clear()
    screen.goto(made.path.as_uri())
    yield screen
    assert screen.faults == []


def mark(page, index):
    return page.locator(f".canvas svg:visible .mark[data-model='{index}']")


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def row_texts(page, index):
    return texts(page, f"tr[data-model='{index}'] td")


def test_the_page_is_whole_asks_for_nothing_and_shows_texts_as_they_are(page, made):
    assert [url for url in page.requests if not url.startswith("data:")] == [made.path.as_uri()]
    sizes = page.eval_on_selector_all("img", "images => images.map((image) => image.naturalWidth)")
    assert sizes == [90, 150, 210]
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"], "the page itself does not scroll sideways"
    assert page.locator("b").count() == 0, "no markup of a name or a caption is taken for markup"
    assert page.locator("tbody th", has_text="bold").inner_text().strip() == f"7 {HOSTILE}"
    mark(page, 6).hover()
    assert page.locator(".tip strong").inner_text() == HOSTILE
    caption = page.locator("figcaption").first
    assert caption.inner_text() == CAPTION.replace("`", "") and caption.locator("code").inner_text() == "c_fc"
    assert page.locator("figure img").first.get_attribute("alt") == CAPTION.replace("`", "")


def test_every_text_can_be_told_from_its_ground_on_screens_and_on_paper(page):
    mark(page, 4).click()
    page.locator("tbody tr").nth(1).hover()
    page.locator("details").first.locator("summary").click()
    for medium in ({"color_scheme": "light"}, {"color_scheme": "dark"}, {"media": "print"}):
        page.emulate_media(**medium)
        found = page.evaluate(CONTRASTS)
        assert len(found) > 120 and [pair for pair in found if pair[0] < 4.5] == []
    for selector in (".tip", ".choice", ".said", "nav", ".skip", "dialog", ".canvas .narrow"):
        assert not page.locator(selector).is_visible(), f"{selector} on paper"
    for selector in (".canvas .wide", "table", "summary + dl"):
        assert page.locator(selector).first.is_visible(), f"{selector} on paper"
    page.emulate_media(media="null")
    page.locator(".enlarge").first.click()
    assert [pair for pair in page.evaluate(CONTRASTS) if pair[0] < 4.5] == []


def test_headings_go_down_step_by_step_and_whatever_can_be_operated_has_a_name(page):
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map((heading) => Number(heading.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert max(after - before for before, after in itertools.pairwise(levels)) == 1
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "radio", "region", "navigation", "image", "DisclosureTriangle"}
    nodes = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert roles == {node["role"]["value"] for node in nodes}
    assert [node["role"]["value"] for node in nodes if not node["name"]["value"].strip()] == []
    label = mark(page, 4).get_attribute("aria-label")
    assert "sparse merged 90: accuracy 81.0" in label and "latency, ms 33.6" in label and "speed-up 3.49" in label


def test_pointing_shows_the_numbers_of_the_model(page):
    tip = page.locator(".tip")
    assert tip.is_hidden()
    for index in (0, 4, 6):
        mark(page, index).locator(".shape").hover()
        assert tip.locator("strong").inner_text() == NAMES[index].replace("_", " ")
        assert texts(page, ".tip dd") == row_texts(page, index)
        assert texts(page, ".tip dt")[:2] == ["accuracy", "F1"]
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
    page.locator("h1").hover()
    assert tip.is_hidden()


def test_a_mark_and_its_row_are_chosen_together_by_clicks_and_keys(page):
    page.locator("tr[data-model='2'] td").first.click()
    chosen = page.eval_on_selector_all(".chosen", "parts => parts.map((part) => part.dataset.model)")
    assert len(chosen) == 4 and set(chosen) == {"2"}, "two drawings, the list and the row"
    page.locator("tr[data-model='6'] button").focus()
    page.keyboard.press("Enter")
    assert mark(page, 6).get_attribute("aria-pressed") == "true"
    assert mark(page, 2).get_attribute("aria-pressed") == "false"
    page.locator(".choice input:checked").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.model"
    order = [page.evaluate(focused)]
    for _ in range(6):
        page.keyboard.press("ArrowRight")
        order.append(page.evaluate(focused))
    assert texts(page, ".tip dd") == row_texts(page, order[-1])
    assert sorted(order) == list("0123456") and order[-1] == "3", "from the slowest to the fastest"
    page.keyboard.press("Enter")
    assert page.locator("tr.chosen").get_attribute("data-model") == "3"
    assert page.locator(".said").inner_text().startswith("recovered merged 90, 81.0")
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()
    page.keyboard.press("Enter")
    assert page.locator(".chosen").count() == 0


def test_another_cost_moves_the_marks_and_a_column_is_sorted_by_its_numbers(page, made):
    for name, column in (("Latency", "latency_ms"), ("File size", "file_bytes"), ("Speed-up", "speedup")):
        page.get_by_text(name, exact=True).click()
        places = page.eval_on_selector_all(
            ".canvas svg .mark .shape",
            "shapes => shapes.map((s) => s.getBoundingClientRect()).filter((box) => box.width).map((box) => box.x)",
        )
        values = made.table[column].to_numpy()
        assert len(places) == 7
        assert all(places[a] < places[b] for a in range(7) for b in range(7) if values[a] < 0.98 * values[b])
        assert page.locator(".canvas svg:visible .grid[data-cost]:visible").count() == 1
    heading = page.locator("thead th", has_text="latency")
    column = texts(page, "thead th").index(heading.inner_text())
    for order, sign in (("descending", -1), ("ascending", 1)):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == order and page.locator("th[aria-sort]").count() == 1
        shown = [float(text) for text in texts(page, f"tbody td:nth-child({column + 1})")]
        assert shown == sorted(made.table["latency_ms"], key=lambda value: sign * value)
    for _ in range(2):
        page.locator("thead th").last.get_by_role("button").click()
        assert texts(page, "tbody td:last-child")[-1] == "", "a gap stands last"
    assert texts(page, "tbody td:last-child")[0] == "< 0.001"
    mark(page, 4).locator(".shape").hover()
    assert texts(page, ".tip dd") == row_texts(page, 4), "a sorted table changes no model's numbers"


def test_a_figure_opens_in_large(page):
    link, large = page.locator(".enlarge").first, page.locator("dialog")
    link.focus()
    width = "document.querySelector('dialog img').naturalWidth"
    page.keyboard.press("Enter")
    page.wait_for_function(f"{width} === 90")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"{width} === 150")
    large.get_by_text("Previous").click()
    page.wait_for_function(f"{width} === 90")
    page.keyboard.press("Escape")
    assert large.is_hidden() and link.evaluate("link => link === document.activeElement")


def test_without_its_script_the_page_still_shows_everything(browser, made):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(made.path.as_uri())
        assert page.locator(".canvas .wide .mark .shape:visible").count() == 7
        assert page.locator(".choice").is_hidden() and page.locator("table button").count() == 0
        assert page.locator(".canvas .wide").get_attribute("role") == "img"
        assert page.locator(".enlarge").first.get_attribute("href") == "figures/01_lengths.png"


def test_marks_move_only_for_those_who_like_it(page):
    duration = "getComputedStyle(document.querySelector('.mark')).transitionDuration"
    assert page.evaluate(duration) == "0s"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(duration) == "0.6s"
    page.emulate_media(reduced_motion="reduce")


def test_a_notebooks_page_folds_its_solutions(browser, tmp_path):
    cells = [nbformat.v4.new_code_cell("answer = ..."), nbformat.v4.new_code_cell("answer = 42")]
    cells[1].metadata.tags = ["solution"]
    path = tmp_path / "notebook.html"
    path.write_text(notebook_html(nbformat.v4.new_notebook(cells=cells), "title"))
    with browser.new_context() as context:
        shown = context.new_page()
        shown.goto(path.as_uri())
        solution = shown.locator("details", has_text="answer = 42")
        assert shown.get_by_text("answer = ...").is_visible()
        assert not solution.locator(".celltag_solution").is_visible()
        solution.locator("summary").click()
        assert solution.locator(".celltag_solution").is_visible()
