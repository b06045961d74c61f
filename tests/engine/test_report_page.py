"""The report's page in a real browser, opened from disk."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vidtta.bench.synthetic_run import write_synthetic_run
from vidtta.engine.data.video import write_video
from vidtta.engine.files import write_json
from vidtta.engine.report import make_report
from vidtta.engine.rundir import RunDirectory, read_json

from .browser import chromium

EVIL = '</script><script>window.stolen = 1</script><img src=x onerror="window.stolen = 2"> & "quoted"'
CLIPS, FILMED = 30, 3
MINUS = "\N{MINUS SIGN}"
TIMES = "[...document.querySelectorAll('.card')[0].querySelectorAll('video')].map((video) => video.currentTime)"


def film(root, clip, arm, brightness):
    """45 frames of 32 x 24 pixels whose brightness tells the arm."""
    frames = torch.full((45, 3, 24, 32), brightness, dtype=torch.uint8)
    if arm == "truth":
        result = read_json(RunDirectory(root).clip("baseline", clip) / "result.json") or {}
        path = RunDirectory(root).truth(clip, result["keys"]["clip"])
    else:
        path = RunDirectory(root).clip(arm, clip) / "video.mp4"
    write_video(path, frames, 24)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = write_synthetic_run(tmp_path_factory.mktemp("runs") / "a run, with #1 & more%", CLIPS, captions={0: EVIL})
    for clip in sorted(path.name for path in root.glob("arms/baseline/clips/*"))[:FILMED]:
        for arm, brightness in (("truth", 60), ("baseline", 90), ("lora", 200)):
            film(root, clip, arm, brightness)
    cells = [{"arm": EVIL, "steps": 5, "lr": lr, "difference": lr, "low": -1.0, "high": 1.0} for lr in (0.1, 0.2)]
    search = {"metric": "psnr", "axes": {"steps": [5], "lr": [0.1, 0.2]}, "cells": cells, "best": EVIL}
    write_json(root / "search.json", search)
    RunDirectory(root).write_failure("lora", "lost", {"reason": EVIL, "traceback": EVIL})
    assert make_report([root]) == 0
    return root / "analysis_report.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def opened(run, browser):
    """The page after all of it has been scrolled through, and what was said and asked for on the way."""
    said, asked = [], []
    page = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light").new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(run.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=20_000)
    for top in range(0, page.evaluate("document.body.scrollHeight"), 600):
        page.evaluate(f"window.scrollTo({{top: {top}, behavior: 'instant'}})")
        page.wait_for_timeout(60)
    return SimpleNamespace(page=page, said=said, asked=asked)


def drawn(page):
    """How many traces each of the page's charts has drawn."""
    traces = "(chart) => chart.querySelector('.main-svg') ? chart.querySelector('.plot').data.length : 0"
    return page.evaluate(f"[...document.querySelectorAll('.chart:not([hidden])')].map({traces})")


def until(page, holds):
    """Wait until the times of the first card's videos are as said; the page's policy forbids to let it wait itself."""
    for _ in range(100):
        if holds(page.evaluate(TIMES)):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"the videos stand at {page.evaluate(TIMES)}")


def column(page, table, name):
    """The texts of a column, top to bottom."""
    heads = page.locator(f"#table-{table} thead th").all_text_contents()
    return page.locator(f"#table-{table} tbody tr td:nth-child({heads.index(name) + 1})").all_text_contents()


def test_every_chart_is_drawn_without_an_error_or_a_request(opened, run):
    charts = drawn(opened.page)
    assert len(charts) >= 12 and all(charts)
    assert opened.said == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in opened.asked)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_a_script_in_a_caption_stays_text(opened):
    page = opened.page
    assert page.evaluate("window.stolen") is None
    page.fill("[name=text]", "onerror")
    assert page.locator(".card .caption").all_text_contents() == [f"Archery · {EVIL}"]
    assert page.evaluate("document.querySelectorAll('img, script:not([nonce]):not([type])').length") == 0
    page.fill("[name=text]", "")
    told = page.locator("#trust td.text").all_text_contents()
    assert any(text.startswith(EVIL) for text in told)


def test_the_policy_stops_what_escaping_would_have_missed(opened):
    """A tag that got in all the same neither runs nor asks for anything."""
    page, reached = opened.page, []
    page.route("https://**", lambda route: (reached.append(route.request.url), route.abort()))
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img id=in src=\"https://example.org/x\" onerror=\"window.stolen = 3\">')"
    )
    page.wait_for_timeout(200)
    page.evaluate("document.getElementById('in').remove()")
    assert page.evaluate("window.stolen") is None
    assert not reached
    opened.said.clear()  # the browser says that it refused


def test_tables_sort_both_ways_with_empty_cells_last(opened):
    page = opened.page
    head = page.locator("#table-methods thead button", has_text="Δ PSNR")
    head.click()
    cells = column(page, "methods", "Δ PSNR")
    values = [float(cell.split()[0]) for cell in cells if cell != "-"]
    assert values == sorted(values, reverse=True) and cells[-3:] == ["-", "-", "-"]
    head.press("Enter")
    values = [float(cell.split()[0]) for cell in column(page, "methods", "Δ PSNR") if cell != "-"]
    assert values == sorted(values)
    assert page.locator("#table-methods th[aria-sort=ascending]").all_text_contents() == ["Δ PSNR"]
    page.locator("#table-methods thead button", has_text="arm").click()
    names = column(page, "methods", "arm")
    assert names == sorted(names, key=str.casefold)


def test_the_gallery_filters_and_sorts(opened):
    page = opened.page
    gains = [float(text.replace(MINUS, "-").split()[0]) for text in page.locator(".card .gain").all_text_contents()]
    assert len(gains) == 12 and gains == sorted(gains, reverse=True)
    page.select_option("[name=sort]", "loss")
    losses = [float(text.replace(MINUS, "-").split()[0]) for text in page.locator(".card .gain").all_text_contents()]
    assert losses == sorted(losses) and losses[0] < gains[-1]
    page.select_option("[name=category]", "Biking")
    assert page.locator("#count").text_content() == "3 of 30 clips"
    assert all("Biking" in name for name in page.locator(".card .name").all_text_contents())
    page.select_option("[name=category]", "")
    page.select_option("[name=sign]", "-1")
    assert all(MINUS in text for text in page.locator(".card .gain").all_text_contents())
    page.select_option("[name=sign]", "")
    page.select_option("[name=sort]", "name")
    page.click("#more")
    assert page.locator(".card").count() == 24


def test_the_score_changes_the_plots_and_the_gains(opened):
    page = opened.page
    page.click("[data-score=ssim]")
    page.wait_for_timeout(200)
    assert page.evaluate("document.querySelector('[data-chart=forest] .plot').layout.xaxis.title.text").startswith(
        "difference in SSIM"
    )
    assert "dB" not in page.locator(".card .gain").first.text_content()
    page.click("[data-score=psnr]")


def test_a_legend_hides_an_arm_in_every_plot(opened):
    page = opened.page
    names = "document.querySelector('[data-chart=frameGain] .plot').data.map((trace) => trace.name)"
    assert "lora" in page.evaluate(names)
    chip = page.locator("#frames .legend [data-arm=lora]")
    chip.click()
    page.wait_for_timeout(100)
    assert "lora" not in page.evaluate(names)
    chip.click()
    assert "lora" in page.evaluate(names)


def test_videos_play_in_step_and_the_difference_is_to_the_truth(opened):
    page = opened.page
    card = page.locator(".card").first
    card.scroll_into_view_if_needed()
    until(page, lambda times: len(times) == 5 and min(times) > 1.8)  # the last frame, until it plays
    card.locator("button").click()
    until(page, lambda times: 0.2 < times[0] < 1.5)
    apart = 0.0
    for _ in range(10):
        times = page.evaluate(TIMES)
        apart = max(apart, max(times) - min(times))
        page.wait_for_timeout(30)
    assert page.evaluate(TIMES)[0] > 0.3 and apart < 1 / 24
    page.select_option("[name=speed]", "0.25")
    push = "document.querySelectorAll('.card')[0].querySelectorAll('video')[1].currentTime += 0.3"
    assert np.ptp(page.evaluate(f"() => {{ {push}; return {TIMES}; }}")) > 0.2
    until(page, lambda times: np.ptp(times) < 1 / 24)  # one that fell out of step is brought back
    page.select_option("[name=speed]", "1")
    card.locator("button").click()
    times = page.evaluate(TIMES)
    assert max(times) == min(times)
    card.press("ArrowRight")
    assert page.evaluate(TIMES)[0] == pytest.approx(times[0] + 1 / 24, abs=1 / 24)
    assert "/45" in card.locator("output").text_content()
    page.check("[name=difference]")
    assert page.evaluate("getComputedStyle(document.querySelector('.card video.over')).display") == "block"
    page.uncheck("[name=difference]")


def test_dark_and_phone(run, browser):
    page = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark").new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(run.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=20_000)
    body = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(body)
    page.keyboard.press("t")
    light = page.evaluate(body)
    assert sum(map(int, dark[4:-1].split(","))) < 120 < 600 < sum(map(int, light[4:-1].split(",")))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert said == []
