"""The page as a reader has it: in a real Chromium, from disk, without a network, by mouse, by
keyboard and on a phone."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import Browser, browser, chromium
from report_cases import NAMES, case, data_of

from mrcnn_jax.figures.draw import CROWD, PALETTE
from mrcnn_jax.figures.page import render
from mrcnn_jax.output import printable, printable_values

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium or Chrome on this machine: the page is not looked at"
)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"stage": NAMES[3], "step": i, "split": "train", "loss/total": 3 / i, "loss/rpn_box": 2 / i}
        for i in range(1, 300)
    ]
    rows += [
        {"stage": NAMES[3], "step": 150 * i, "split": "val", "loss/total": 1 / i, "recall@50": 0.4}
        for i in (1, 2)
    ]
    return printable_values(data_of(*case(), rows=rows))  # as the page has its texts


@pytest.fixture(scope="module")
def file(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(running: Browser, file: Path) -> Iterator[Browser]:
    """The page as it opens; whatever a test does with it, nothing is asked of the network and the
    console stays empty."""
    running.requests.clear()
    running.complaints.clear()
    running.open(file)
    yield running
    assert running.complaints == []
    assert {
        address for address in running.requests if not address.startswith("data:image/jpeg;")
    } == {file.as_uri()}


def drawn(page: Browser, side: str = "found", what: str = ".box") -> int:
    return page.evaluate(f"document.querySelectorAll('#{side} {what}').length")


def text(page: Browser, name: str) -> str:
    return page.evaluate(f"document.getElementById('{name}').textContent")


def shown(data: dict[str, Any], page: Browser) -> dict[str, Any]:
    """The image of the data that the page shows, by its name."""
    name = re.match(r"\d+ of \d+: (.*), quality", text(page, "caption")).group(1)
    return next(image for image in data["gallery"]["images"] if image["name"] == name)


def detections(image: dict[str, Any], score: float, only: int | None = None) -> int:
    scores = np.array(
        [d["score"] for d in image["detections"] if only is None or d["class"] == only]
    )
    return int((scores >= score).sum())


def percents(cells: list[str]) -> list[float | None]:
    return [None if cell == "–" else float(cell) / 100 for cell in cells]


def test_names_are_read_as_text(page: Browser, data: dict[str, Any]) -> None:
    assert page.evaluate("window.attacked") is None
    buttons = page.evaluate(
        "[...document.querySelectorAll('#classes-table [data-class]')].map((b) => b.textContent)"
    )
    assert buttons == [one["name"] for one in data["classes"]]
    assert shown(data, page) is data["gallery"]["images"][0]
    page.evaluate(
        "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
    )
    assert NAMES[3] in text(page, "config-tables")
    assert page.evaluate("document.title") == "Evaluation of runs/" + printable(
        NAMES[8], one_line=True
    )


def test_the_policy_stops_what_a_careless_script_would_let_in(page: Browser) -> None:
    markup = "<img src=https://example.com/a.png onerror='window.attacked = true'>"
    page.evaluate(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(markup)})")
    deadline = time.monotonic() + 10
    while (
        len(page.complaints) < 2 and time.monotonic() < deadline
    ):  # of the image, and of its handler
        page.evaluate("0")
    assert [complaint.count("Content Security Policy") > 0 for complaint in page.complaints] == [
        True,
        True,
    ]
    assert page.evaluate("window.attacked") is None
    page.complaints.clear()
    page.requests.remove("https://example.com/a.png")  # asked for, and refused


def test_the_tables_at_one_score(page: Browser, data: dict[str, Any]) -> None:
    """Of the classes that are there, and all together first; the matrix names misses last."""

    def rows(name: str) -> list[list[str]]:
        return page.evaluate(
            f"[...document.querySelectorAll('#{name} tbody tr')]"
            ".map((r) => [...r.cells].map((c) => c.textContent))"
        )

    found = data["at_score"]
    counts = np.array(found["counts"])[[0, 1, 2, 4]][:, [0, 1, 2, 4]]
    rates = rows("rates-table")
    assert [row[0] for row in rates] == ["all classes", *found["names"][:3]]
    for row, k in zip(rates, (4, 0, 1, 2), strict=True):
        expected = [found["rates"][k][name] for name in ("precision", "recall", "F1")]
        assert percents(row[3:]) == pytest.approx(expected, abs=6e-4)
    assert [int(row[1]) for row in rates] == [counts[:3].sum(), *counts[:3].sum(axis=1)]
    assert [int(row[2]) for row in rates] == [counts[:, :3].sum(), *counts[:, :3].sum(axis=0)]
    matrix = rows("confusion-table")
    assert [row[0] for row in matrix] == [*found["names"][:3], "false"]
    assert [[int(cell) if cell.isdigit() else 0 for cell in row[1:]] for row in matrix] == (
        counts.tolist()
    )
    assert "a score of at least 0.5 " in text(page, "confusion-text")


def test_tables_show_the_figures(page: Browser, data: dict[str, Any]) -> None:
    rows = page.evaluate(
        "[...document.querySelectorAll('#figures-table tbody tr')]"
        ".map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert [row[0] for row in rows] == ["box", "mask"]
    for row, kind in zip(rows, ("bbox", "segm"), strict=True):
        assert percents(row[1:]) == [
            pytest.approx(value, abs=5.1e-4) for value in data["figures"][kind].values()
        ]
    column = (
        "[...document.querySelectorAll('#classes-table tbody tr')]"
        ".map((row) => row.cells[8].textContent)"
    )
    values = [figures["AP"] for figures in data["class_figures"]["segm"]]
    assert percents(page.evaluate(column)) == [pytest.approx(value, abs=5.1e-4) for value in values]
    page.click("#classes-table thead tr:last-child th:nth-child(9) button")
    largest_first = [*sorted((v for v in values if v is not None), reverse=True), None]
    assert percents(page.evaluate(column)) == [
        pytest.approx(value, abs=5.1e-4) for value in largest_first
    ]


def test_a_class_is_chosen_by_a_click(page: Browser, data: dict[str, Any]) -> None:
    """In the images, the list of them, and the curves; another click on it chooses all again."""
    page.click("#classes-table [data-class='1']")
    with_class = [
        image
        for image in data["gallery"]["images"]
        if any(o["class"] == 1 for o in image["objects"]) or detections(image, 0.5, 1)
    ]
    assert 0 < len(with_class) < len(data["gallery"]["images"])
    assert text(page, "caption").startswith(f"1 of {len(with_class)}: ")
    for image in with_class:
        assert shown(data, page) is image
        assert drawn(page) == detections(image, 0.5, 1)
        assert drawn(page, "truth") == sum(o["class"] == 1 for o in image["objects"])
        page.press("ArrowRight")
    name = printable(NAMES[8], one_line=True)
    assert text(page, "precision-title") == f"Precision and recall, mask: {name}"
    heights = page.evaluate(
        "[...document.querySelectorAll('#histogram rect')].map((b) => b.getAttribute('height') > 0)"
    )
    counts = data["histogram"]["segm"][2]
    assert heights == [
        bool(n) for pair in zip(counts["true"], counts["false"], strict=True) for n in pair
    ]
    page.click("#classes-table [data-class='3']")
    assert text(page, "precision") == "There is no object of this class."
    assert text(page, "caption") == "No image of the gallery shows seen nowhere."
    display = "getComputedStyle(document.querySelector('.pair')).display"
    assert page.evaluate(display) == "none"
    page.click("#classes-table [data-class='3']")
    assert page.evaluate(display) == "grid"
    averaged = sum(curves is not None for curves in data["precision"]["segm"][1:])
    title = f"Precision and recall, mask: mean of {averaged} classes"
    assert text(page, "precision-title") == title
    assert drawn(page) == detections(shown(data, page), 0.5)
    assert page.evaluate("document.getElementById('class').value") == "-1"


def test_the_slider_draws_what_reaches_its_score(page: Browser, data: dict[str, Any]) -> None:
    assert text(page, "score-text") == ".50"
    page.evaluate("document.getElementById('score').focus()")
    ignored = 0
    for key, steps, score in (
        ("ArrowRight", 0, 0.5),
        ("ArrowRight", 29, 0.79),
        ("ArrowLeft", 59, 0.2),
    ):
        page.press(key, steps)
        assert text(page, "score-text") == f"{score:.2f}".removeprefix("0")
        for place, image in enumerate(data["gallery"]["images"]):
            page.evaluate(
                f"document.querySelectorAll('#strip button')[{place}].click()"
            )  # the focus stays on the slider
            assert shown(data, page) is image
            assert drawn(page) == detections(image, score)
            found = {
                d["match"]
                for d in image["detections"]
                if d["match"] is not None and d["score"] >= score
            }
            assert drawn(page, "truth", ".match") == len(found)
            false = [
                d
                for d in image["detections"]
                if d["score"] >= score and d["match"] is None and not d["ignored"]
            ]
            told, _, _ = text(page, "found-text").partition(";")  # long names have no room
            assert told == f"Detections: {detections(image, score)}, {len(false)} of them false"
            assert drawn(page, "found", ".no-match") == len(false)
            ignored += drawn(page, "found", ".ignored")
    assert ignored
    page.press("Home")
    assert drawn(page) == len(shown(data, page)["detections"])
    page.press("End")
    assert drawn(page) == 0


def test_keys(page: Browser, data: dict[str, Any]) -> None:
    images = data["gallery"]["images"]
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("ArrowLeft", 0),
        ("ArrowLeft", 0),
    ):
        page.press(key)
        assert shown(data, page) is images[place]
        assert page.evaluate("document.querySelectorAll('#strip [aria-current=true]').length") == 1
    outlined = drawn(page, "truth", ".mask")
    assert outlined == len(images[0]["objects"])
    before = page.screenshot()
    page.press("m")
    assert (drawn(page, "truth", ".mask"), drawn(page, "found", ".mask")) == (0, 0)
    assert drawn(page, "truth") == outlined
    assert not np.array_equal(page.screenshot(), before)
    page.press("m")
    assert drawn(page, "truth", ".mask") == outlined
    page.press("l")
    assert drawn(page, "truth", "text") == 0

    page.evaluate("document.getElementById('order').focus()")
    page.press("b")  # a letter chooses in a list, and is no short cut there
    assert shown(data, page) is images[-1]
    page.press("m")
    assert page.evaluate("document.getElementById('masks').checked")


def test_every_control_is_reached_by_tab_and_seen(page: Browser) -> None:
    reached = []
    for _ in range(25):
        page.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.id, getComputedStyle(document.activeElement).outline]"
        )
        assert "solid 3px" in outline, (name, outline)
        reached.append(name)
    for name in ("class", "score", "order", "masks", "labels", "next"):
        assert name in reached, name
    # Of the strip of images one is a stop, and the arrows take the focus with them.
    place = "[...document.querySelectorAll('#strip button')].indexOf(document.activeElement)"
    page.evaluate("document.querySelector('#strip [tabindex=\"0\"]').focus()")
    page.press("ArrowRight", 2)
    assert page.evaluate(place) == 2
    page.press("Tab")
    assert page.evaluate(place) == -1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page: Browser, scheme: str) -> None:
    """WCAG's contrast of at least 4.5, in the scheme that the reader's system asks for."""
    page.send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    colors = (
        "[...['body', '.note', 'a', 'dt', '#next']]"
        ".map((one) => getComputedStyle(document.querySelector(one)).color)"
    )
    paper, *inks = page.evaluate(f"[getComputedStyle(document.body).backgroundColor, ...{colors}]")

    def luminance(color: str) -> float:
        values = np.array(re.findall(r"\d+", color)[:3], float) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    assert (luminance(paper) < 0.2) == (scheme == "dark")
    for ink in inks:
        dark, light = sorted((luminance(paper), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, ink


def test_every_object_has_its_own_colour_and_its_detection_has_it_too(
    page: Browser, data: dict[str, Any]
) -> None:
    """Those of the other pictures; crowds, and what lies in them, are grey."""
    palette, crowd = [f"#{bytes(color).hex()}" for color in PALETTE], f"#{bytes(CROWD).hex()}"
    seen = 0
    for _ in data["gallery"]["images"]:
        image = shown(data, page)
        own = [
            crowd if one["crowd"] else palette[i % len(palette)]
            for i, one in enumerate(image["objects"])
        ]
        truth, found = (
            page.evaluate(
                f"[...document.querySelectorAll('#{side} .box')]"
                ".map((box) => box.getAttribute('stroke'))"
            )
            for side in ("truth", "found")
        )
        assert truth == own
        counted = [one for one in image["detections"] if one["score"] >= 0.5][::-1]
        for one, color in zip(counted, found, strict=True):
            if one["match"] is not None or one["ignored"]:
                assert color == (crowd if one["ignored"] else own[one["match"]])
                seen += 1
        page.press("ArrowRight")
    assert seen > 10


def test_labels_step_back_where_they_would_cover_the_picture(
    running: Browser, tmp_path: Path
) -> None:
    truth, found = case(1)
    heights = {}
    for count in (30, 100, 300):
        truth["annotations"] = [
            {**truth["annotations"][0], "iscrowd": 0, "category_id": 11, "id": i}
            for i in range(count)
        ]
        truth["categories"][2]["name"] = "nine of it"
        path = tmp_path / f"{count}.html"
        path.write_text(render(data_of(truth, found)), encoding="utf-8")
        running.open(path)
        labels = running.evaluate(
            "[...document.querySelectorAll('#truth text')]"
            ".map((one) => one.getBoundingClientRect().toJSON())"
        )
        area = running.evaluate("document.getElementById('truth').getBoundingClientRect().toJSON()")
        covered = sum(label["width"] * label["height"] for label in labels)
        assert covered < 0.36 * area["width"] * area["height"]
        heights[count] = [label["height"] for label in labels]
        assert text(running, "truth-text").endswith("; no room for labels") == (count == 300)
    assert list(map(len, heights.values())) == [30, 100, 0]
    assert 10 < max(heights[100]) < min(heights[30])


def test_on_a_phone_nothing_is_wider_than_the_screen(
    page: Browser, file: Path, data: dict[str, Any]
) -> None:
    page.open(file, width=360, height=740, phone=True)
    page.evaluate(
        "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
    )
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    left, right = page.evaluate(
        "['truth', 'found']"
        ".map((id) => document.getElementById(id).getBoundingClientRect().toJSON())"
    )
    assert right["top"] > left["bottom"]  # one below the other
    assert left["left"] == right["left"]
    assert left["width"] > 300
    page.evaluate("['masks', 'labels'].forEach((id) => document.getElementById(id).click())")
    page.evaluate("document.querySelectorAll('.box').forEach((box) => box.remove())")
    page.evaluate("document.getElementById('truth').scrollIntoView({block: 'center'})")
    area = page.evaluate("document.getElementById('truth').getBoundingClientRect().toJSON()")
    x, y, width, height = (round(area[name]) for name in ("x", "y", "width", "height"))
    seen = page.screenshot()[y : y + height, x : x + width]
    jpeg = np.frombuffer(base64.b64decode(data["gallery"]["images"][0]["jpeg"]), np.uint8)
    expected = cv2.resize(
        cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB), (width, height), interpolation=cv2.INTER_LINEAR
    )
    assert np.corrcoef(seen.ravel(), expected.ravel())[0, 1] > 0.9
    sizes = page.evaluate(
        "[...document.querySelectorAll('.chart text')]"
        ".map((text) => text.getBoundingClientRect().height)"
    )
    assert min(sizes) > 10  # the axes of the charts can be read
