"""A run that is killed at any moment loses at most the clip in hand; tasks in one run directory do not harm each other."""

import random

import pytest
from vidtta.engine.data.video import read_window

from .tiny_run import CLIPS, FORKS, FULL, HEIGHT, TOTAL, WIDTH, run_in_child, tiny_lab, wait_for


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"full": FULL}
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab):
    assert lab.run("undisturbed") == 0
    return lab.results("undisturbed")


def test_ten_kills_lose_nothing(lab, undisturbed):
    """One child after another, each killed at a random moment of its run, on what the earlier ones left."""
    chance, outputs, kills = random.Random(0), ["killed 0"], 0
    while kills < 10:
        folder = lab.root / outputs[-1]
        (folder / "environment.json").unlink(missing_ok=True)  # a run writes it before the first clip
        child = FORKS.Process(target=run_in_child, args=(lab.argv(outputs[-1]),))
        child.start()
        wait_for("environment.json", folder, child.is_alive)
        child.join(chance.uniform(0, 0.9))
        if child.exitcode is None:
            kills += 1
            child.kill()
            child.join()
        else:
            assert child.exitcode == 0
            outputs.append(f"killed {len(outputs)}")
        child.close()
    for output in outputs:
        assert lab.run(output) == 0
        assert lab.results(output) == undisturbed
        for clip in CLIPS:
            video = lab.root / output / "comparisons" / f"{clip}.mp4"
            read_window(video, frames=TOTAL, fps=24, height=HEIGHT + 40, width=3 * WIDTH + 4)


def test_two_tasks_at_once_in_one_folder(lab, undisturbed):
    argv = lab.argv("two at once")
    children = [FORKS.Process(target=run_in_child, args=(argv,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert lab.results("two at once") == undisturbed
