"""The report's page in a browser: what it shows, what pointing, keys and clicks do, and that anyone can read it."""

import itertools
from types import SimpleNamespace

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest

from nbhelpers.profiles import get_profile
from nbhelpers.report import page
from nbhelpers.workspace import open_run

SCREENS = [(width, scheme) for width in (1280, 375) for scheme in ("light", "dark")]


def named(screen: tuple[int, str]) -> str:
    return f"{screen[0]}-{screen[1]}"


# For what does not depend on light and dark.
TWO_SCREENS = pytest.mark.parametrize("screen", [SCREENS[0], SCREENS[3]], indirect=True, ids=named)
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
    """Seven models, some of the same size and about the same speed, one without a p."""
    accuracy = np.array([0.84, 0.815, 0.67, 0.81, 0.81, 0.80, 0.828])
    return pd.DataFrame(
        {
            "model": NAMES,
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.03,
            "accuracy_high": accuracy + 0.02,
            "f1": accuracy,
            "total_parameters": 3451392,
            "active_parameters": [3451392, 3451392, 1858867, 1858867, 1845439, 2135848, 2561664],
            "encoder_sparsity": [0, 0, 0.9, 0.9, 0.907, 0.741, 0],
            "file_bytes": [13.8e6, 13.8e6, 13.8e6, 13.8e6, 7.6e6, 8.6e6, 10.2e6],
            "latency_ms": [116.9, 116.3, 117.7, 9.9, 33.6, 30.7, 56.3],
            "speedup": [1.0, 1.009, 1.013, 11.8, 3.49, 3.78, 2.07],
            "peak_memory_bytes": 55e6,
            "p_value": [1.0, 0.018, 1e-19, 0.024, np.nan, 0.05, 0.504],
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page over made-up results: its path and the table that it shows."""
    table = comparison()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_ROOT", str(tmp_path_factory.mktemp("page")))
        run = open_run(get_profile("smoke"))
        rows = table.assign(p_value=table["p_value"].fillna(0.2)).set_index("model", drop=False)
        tfidf = {"accuracy": 0.862, "accuracy_low": 0.84, "accuracy_high": 0.88, "seeds": 1}
        gap = {"difference": -0.028, "low": -0.053, "high": -0.002, "p_value": 0.03, "n": 996, "seeds": 1}
        leading = {
            "dense": "fine_tuned",
            "control": "fine_tuned_extra",
            "sparse": "sparse_merged_90",
            "student": HOSTILE,
            "compressed": "compact_merged_75",
        }
        run.record(
            "comparison",
            test_reviews=996,
            tfidf=tfidf,
            against_tfidf=gap,
            **{key: rows.loc[name].to_dict() for key, name in leading.items()},
        )
        figures = ["01_lengths", "01_accuracy", "06_cost"]
        run.record("captions", **dict.fromkeys(figures, CAPTION))
        run.save_table("comparison", table)
        (run.reports / "figures").mkdir()
        for i, name in enumerate(figures):
            matplotlib.image.imsave(
                run.reports / "figures" / f"{name}.png", np.full((40, 90 + 60 * i, 3), 0.5 + 0.1 * i)
            )
        path = page.write_index(run)
    return SimpleNamespace(path=path, table=table)


def watched(context):
    """A new tab that knows what it asked for (``requests``) and what went wrong (``faults``)."""
    tab = context.new_page()
    tab.set_default_timeout(5000)
    tab.requests, tab.faults = [], []
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.on("console", lambda message: tab.faults.append(message.text))
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    return tab


@pytest.fixture(scope="module", params=SCREENS, ids=named)
def screen(browser, request):
    """A tab on a screen of some width, light or dark, for all tests that look at this screen."""
    width, scheme = request.param
    size = {"width": width, "height": 800}
    with browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce") as context:
        yield watched(context)


@pytest.fixture
def page(screen, made):
    """The page as it is when it has just been opened."""
    screen.requests.clear()
    screen.goto(made.path.as_uri())
    yield screen
    screen.emulate_media(media=None)
    assert screen.faults == []


def mark(page, index):
    return page.locator(f".canvas svg:visible .mark[data-model='{index}']")


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def row_texts(page, index):
    return texts(page, f"tr[data-model='{index}'] td")


def test_the_page_is_whole_and_asks_for_nothing(page, made):
    assert [url for url in page.requests if not url.startswith("data:")] == [made.path.as_uri()]
    sizes = page.eval_on_selector_all("img", "images => images.map((image) => image.naturalWidth)")
    assert sizes == [90, 150, 210]
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"], "the page itself does not scroll sideways"


def test_every_text_can_be_told_from_its_ground(page):
    mark(page, 4).click()
    page.locator("tbody tr").nth(1).hover()
    page.locator("details").first.locator("summary").click()
    found = page.evaluate(CONTRASTS)
    page.locator(".enlarge").first.click()
    mark_shown = page.evaluate(CONTRASTS)
    assert len(found) > 150 and len(mark_shown) > len(found)
    assert [pair for pair in found + mark_shown if pair[0] < 4.5] == []


@TWO_SCREENS
def test_headings_go_down_one_step_at_a_time(page):
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map((heading) => Number(heading.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert max(after - before for before, after in itertools.pairwise(levels)) == 1


@TWO_SCREENS
def test_whatever_can_be_operated_has_a_name(page):
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "radio", "textbox", "DisclosureTriangle", "region", "navigation", "image", "group"}
    named = [
        (node["role"]["value"], node["name"]["value"]) for node in nodes if node.get("role", {}).get("value") in roles
    ]
    assert {"button", "link", "radio", "region", "navigation", "image"} <= {role for role, _ in named}
    assert [role for role, name in named if not name.strip() and role != "group"] == []
    label = mark(page, 4).get_attribute("aria-label")
    assert "sparse merged 90: accuracy 81.0" in label and "latency, ms 33.6" in label and "speed-up 3.49" in label
    landmarks = page.locator("body > header, body > nav, body > main, body > footer")
    assert landmarks.count() == 4


@TWO_SCREENS
def test_pointing_shows_the_numbers_of_the_model(page):
    tip = page.locator(".tip")
    assert tip.is_hidden()
    for index in (0, 2, 4, 6):
        mark(page, index).locator(".shape").hover()
        assert tip.locator("strong").inner_text() == NAMES[index].replace("_", " ")
        assert texts(page, ".tip dd") == row_texts(page, index)
        assert texts(page, ".tip dt")[:2] == ["accuracy", "F1"]
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
    page.locator("h1").hover()
    assert tip.is_hidden()


@TWO_SCREENS
def test_keys_go_through_the_marks_and_choose(page):
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


@TWO_SCREENS
def test_a_mark_and_its_row_are_chosen_together(page):
    mark(page, 5).locator(".shape").click()
    assert page.locator("tr.chosen").get_attribute("data-model") == "5"
    page.locator("tr[data-model='2'] td").first.click()
    assert mark(page, 2).get_attribute("aria-pressed") == "true"
    chosen = page.eval_on_selector_all(".chosen", "parts => parts.map((part) => part.dataset.model)")
    assert len(chosen) == 4 and set(chosen) == {"2"}, "two drawings, the list and the row"
    page.locator("tr[data-model='6'] button").focus()
    page.keyboard.press("Enter")
    assert mark(page, 6).get_attribute("aria-pressed") == "true"
    assert mark(page, 2).get_attribute("aria-pressed") == "false"


@TWO_SCREENS
def test_another_cost_moves_the_marks(page, made):
    def places():
        return [mark(page, i).locator(".shape").bounding_box()["x"] for i in range(len(NAMES))]

    for name, column in (("Latency", "latency_ms"), ("File size", "file_bytes"), ("Speed-up", "speedup")):
        page.get_by_text(name, exact=True).click()
        values, shown = made.table[column].to_numpy(), places()
        apart = [(a, b) for a in range(7) for b in range(7) if values[a] < 0.98 * values[b]]
        assert all(shown[a] < shown[b] for a, b in apart)
        assert page.locator(".canvas svg:visible .grid[data-cost]:visible").count() == 1


@TWO_SCREENS
def test_a_column_is_sorted_by_its_numbers(page, made):
    heading = page.locator("thead th", has_text="latency")
    column = page.locator("thead th").all_inner_texts().index(heading.inner_text())
    for order, sign in (("descending", -1), ("ascending", 1)):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == order
        assert page.locator("th[aria-sort]").count() == 1
        shown = [float(text) for text in texts(page, f"tbody td:nth-child({column + 1})")]
        assert shown == sorted(made.table["latency_ms"], key=lambda value: sign * value)
    for _ in range(2):
        page.locator("thead th").last.get_by_role("button").click()
        assert texts(page, "tbody td:last-child")[-1] == "", "what has no number stands last"
    assert texts(page, "tbody td:last-child")[0] == "< 0.001"
    assert texts(page, "tr[data-model='4'] td")[0].startswith("81.0")


@TWO_SCREENS
def test_names_and_captions_are_shown_as_they_are(page):
    assert page.locator("b").count() == 0
    assert page.locator("tbody th", has_text="bold").inner_text().strip() == f"7 {HOSTILE}"
    mark(page, 6).hover()
    assert page.locator(".tip strong").inner_text() == HOSTILE
    assert page.locator("figcaption").first.inner_text() == CAPTION.replace("`", "")
    assert page.locator("figcaption code").first.inner_text() == "c_fc"
    assert page.locator("figure img").first.get_attribute("alt") == CAPTION.replace("`", "")


@TWO_SCREENS
def test_a_figure_opens_in_large(page):
    link, large = page.locator(".enlarge").first, page.locator("dialog")
    link.focus()
    page.keyboard.press("Enter")
    width = "document.querySelector('dialog img').naturalWidth"
    page.wait_for_function(f"{width} === 90")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"{width} === 150")
    large.get_by_text("Previous").click()
    page.wait_for_function(f"{width} === 90")
    page.keyboard.press("Escape")
    assert large.is_hidden() and link.evaluate("link => link === document.activeElement")


def test_on_paper_there_is_the_picture_and_nothing_to_operate(page):
    mark(page, 4).click()
    page.emulate_media(media="print")
    for selector in (".tip", ".choice", ".said", "nav", ".skip", "dialog", ".canvas .narrow"):
        assert not page.locator(selector).is_visible(), selector
    assert page.locator(".canvas .wide").is_visible() and page.locator("table").is_visible()
    assert page.locator("summary + dl").first.is_visible(), "all numbers are printed"
    assert [pair for pair in page.evaluate(CONTRASTS) if pair[0] < 4.5] == []


def test_without_its_script_the_page_still_shows_everything(browser, made):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(made.path.as_uri())
        assert page.locator(".canvas .wide .mark .shape:visible").count() == 7
        assert page.locator(".choice").is_hidden() and page.locator("table button").count() == 0
        assert page.locator(".canvas .wide").get_attribute("role") == "img"
        assert page.locator(".enlarge").first.get_attribute("href") == "figures/01_lengths.png"


def test_marks_move_only_for_those_who_like_it(browser, made):
    for motion, seconds in (("reduce", "0s"), ("no-preference", "0.6s")):
        with browser.new_context(reduced_motion=motion) as context:
            page = context.new_page()
            page.goto(made.path.as_uri())
            assert page.evaluate("getComputedStyle(document.querySelector('.mark')).transitionDuration") == seconds


def test_a_notebooks_page_folds_its_solutions(browser, tmp_path):
    cells = [nbformat.v4.new_code_cell("answer = ..."), nbformat.v4.new_code_cell("answer = 42")]
    cells[1].metadata.tags = ["solution"]
    path = tmp_path / "notebook.html"
    path.write_text(page.notebook_html(nbformat.v4.new_notebook(cells=cells), "title"))
    shown = browser.new_page()
    shown.goto(path.as_uri())
    solution = shown.locator("details", has_text="answer = 42")
    assert shown.get_by_text("answer = ...").is_visible()
    assert not solution.locator(".celltag_solution").is_visible()
    solution.locator("summary").click()
    assert solution.locator(".celltag_solution").is_visible()
    shown.close()
