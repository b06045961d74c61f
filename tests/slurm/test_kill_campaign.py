"""A small campaign of kills on an array; the large one is a command, see tests/kill_campaign.py."""

import pytest

from ..engine.tiny_run import tiny_lab
from ..kill_campaign import SETTINGS, run_campaign


def test_five_kills_of_an_array_lose_nothing(tmp_path, request):
    try:
        cluster = request.getfixturevalue("slurm")
    except pytest.skip.Exception:  # plain processes then, which need nothing
        cluster = None
    with tiny_lab(tmp_path) as lab:
        lab.settings = SETTINGS
        report, lines = run_campaign(lab, cluster, kills=5, seed=0)
    assert report.kills == 5 and report.results == 16 * len(report.outputs)
    assert (report.lost, report.doubled, report.differing_bits, report.left_after) == (0, 0, 0, 0), lines
