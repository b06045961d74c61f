"""A small soak; the large one is a command, see tests/soak.py."""

import pytest

from ..soak import Soak, soak
from .tiny_run import tiny_lab


def test_eight_clips_leave_nothing_behind(tmp_path):
    with tiny_lab(tmp_path) as lab:
        report = soak(lab, 8)
    assert len(report.samples) == 16
    assert report.files_left_open <= 0 and report.growth < 40 * 2**20, report.lines()


@pytest.mark.parametrize(
    "fault", [{"seconds": 99.0}, {"again": 6.0}, {"samples": [(k * 2**20, 5) for k in range(100)]}]
)
def test_what_a_soak_finds(fault):
    good = {
        "clips": 100,
        "samples": [(2**30, 5)] * 100,
        "seconds": 50.0,
        "work": 45.0,
        "wall": 60.0,
        "load": 1.0,
        "again": 1.0,
    }
    assert Soak(**good).ok
    assert not Soak(**(good | fault)).ok
