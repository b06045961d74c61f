"""A run that is killed at any moment loses at most the clip in hand, and where clips overlap the one before it; tasks in one run
directory do not harm each other."""

import pytest
from vidtta.engine.data.video import read_window

from ..kills import kill_runs
from .tiny_run import CLIPS, FORKS, FULL, HEIGHT, TOTAL, WIDTH, run_in_child, tiny_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"full": FULL}
        yield lab


@pytest.mark.parametrize(("kills", "overlap"), [(20, False), (20, True)], ids=["in turn", "overlapped"])
def test_kills_lose_nothing(tmp_path, kills, overlap):
    with tiny_lab(tmp_path / "lab") as lab:
        lab.settings["arms"] = {"full": FULL}
        killed_runs_are_made_whole(lab, kills, overlap)


def killed_runs_are_made_whole(lab, kills, overlap):
    report = kill_runs(lab, kills, seed=0, overlap=overlap)
    assert report.kills == kills
    assert report.results == 4 * len(report.outputs)
    assert (report.lost, report.doubled, report.differing_bits, report.left_after) == (0, 0, 0, 0), report.lines()
    assert len(report.places) > 3 and "loading" not in report.places, report.lines()
    for output in report.outputs:
        for clip in CLIPS:
            video = lab.root / output / "comparisons" / f"{clip}.mp4"
            read_window(video, frames=TOTAL, fps=24, height=HEIGHT + 40, width=3 * WIDTH + 4)


def test_tasks_at_once_on_overlapping_ranges_of_one_folder(lab):
    assert lab.run("alone") == 0
    ranges = ([], ["--batch-end", "1"], ["--batch-start", "1"])
    children = [FORKS.Process(target=run_in_child, args=(lab.argv("at once", *words),)) for words in ranges]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert lab.results("at once") == lab.results("alone")
