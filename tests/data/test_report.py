"""The report of a check."""

from __future__ import annotations

from mrcnn_jax.data.report import Reason, Report


def test_report_keeps_the_first_ten_ids() -> None:
    report = Report(kept={"images": 3})
    for number in range(25):
        report.add(Reason.OUTSIDE, number)
    report.add(Reason.PAGES, 7, 3, pages=2)
    outside, pages = Reason.OUTSIDE.text, Reason.PAGES.text.format(pages=2)
    assert report.lines() == [
        "kept 3 images",
        f"dropped 25: {outside} (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)",
        f"repaired 3: {pages} (7)",
    ]
    assert report.to_dict()["findings"] == [
        {
            "outcome": "dropped",
            "code": "outside",
            "reason": outside,
            "count": 25,
            "first_ids": list(range(10)),
        },
        {
            "outcome": "repaired",
            "code": "pages",
            "reason": pages,
            "count": 3,
            "first_ids": [7],
        },
    ]
