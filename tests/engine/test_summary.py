"""The table, the CSV and the videos that are made from a run's results."""

import csv
import os

import pytest
import torch
from vidtta.engine.data.clips import Clip
from vidtta.engine.data.video import read_window, write_video
from vidtta.engine.errors import Interrupted
from vidtta.engine.rundir import RunDirectory
from vidtta.engine.summary import COLUMNS, path_lines, print_summary, write_comparisons, write_summary
from vidtta.engine.window import Window

ARMS = ["baseline", "full"]
WINDOW = Window(total_frames=5, known_frames=3, model_frames=5)


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def clips(tmp_path):
    return [Clip(name, tmp_path / f"{name}.mp4", "") for name in ("a", "b, c")]


def scores(psnr):
    return {name: {"mean": psnr / scale} for name, scale in (("psnr", 1), ("ssim", 100), ("mse", 1000))} | {
        "lpips": {"mean": None, "reason": "not here"}
    }


def add_result(directory, arm, clip, psnr, adapt=1.0, memory=2**30):
    seconds = dict.fromkeys(("read", "encode", "sample", "decode", "score"), 0.123456) | {"adapt": adapt}
    directory.write_result(
        arm,
        clip.id,
        {
            "scores": scores(psnr),
            "marks": ["untrained", "other"],
            "meta": {"class": "Biking", "group": "3"},
            "adaptation": {"steps": 7},
            "cost": {"seconds": seconds, "peak_memory_bytes": memory},
        },
    )


def add_reference(directory, clip, psnr):
    path = directory.reference(clip.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    both = {"copy_last_frame": scores(psnr), "vae_ceiling": scores(psnr + 10)}
    path.write_text(str({"scores": both}).replace("'", '"').replace("None", "null"))


@pytest.fixture
def partly(directory, clips):
    """Clip a done in both arms, the other one in the baseline alone and failed in full."""
    for clip, psnr in zip(clips, (20.0, 30.0), strict=True):
        add_reference(directory, clip, psnr)
        add_result(directory, "baseline", clip, psnr + 1)
    add_result(directory, "full", clips[0], 24.0, adapt=3.0, memory=3 * 2**29)
    directory.write_failure("full", "b, c", {"reason": 'too short, says "x"'})


def test_a_row_for_each_clip_of_each_arm_and_reference(directory, clips, partly):
    rows = write_summary(directory, clips, [*ARMS, "later"])
    with (directory.root / "summary.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    assert list(table[0]) == COLUMNS
    assert [(row["arm"], row["clip"], row["status"]) for row in table] == [
        ("copy last frame", "a", "done"),
        ("copy last frame", "b, c", "done"),
        ("VAE ceiling", "a", "done"),
        ("VAE ceiling", "b, c", "done"),
        ("baseline", "a", "done"),
        ("baseline", "b, c", "done"),
        ("full", "a", "done"),
        ("full", "b, c", "failed"),
        ("later", "a", "missing"),
        ("later", "b, c", "missing"),
    ]
    assert [row["psnr"] for row in table] == ["20.0", "30.0", "30.0", "40.0", "21.0", "31.0", "24.0", "", "", ""]
    assert {row["lpips"] for row in table} == {""}
    full = table[6]
    assert (full["ssim"], full["mse"], full["steps"]) == ("0.24", "0.024", "7")
    assert (full["adapt_seconds"], full["read_seconds"], full["peak_memory_bytes"]) == ("3.0", "0.1235", "1610612736")
    assert [row["group"] for row in table[4:8]] == ["Biking/3", "Biking/3", "Biking/3", ""]
    assert full["marks"] == "untrained; other"
    assert table[7]["reason"] == 'too short, says "x"'
    assert [row["psnr"] for row in rows if row["arm"] == "baseline"] == [21.0, 31.0]


def test_the_table_compares_the_same_clips_in_every_row(directory, clips, partly, capsys):
    print_summary(write_summary(directory, clips, ARMS), ARMS, ("untrained weights",))
    said = capsys.readouterr().out
    assert "mean over the clips that every arm finished: 1" in said
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert lines == [
        ["copy last frame", "20.00", "0.2000", "-", "-", "-", "-"],
        ["VAE ceiling", "30.00", "0.3000", "-", "-", "-", "-"],
        ["baseline", "21.00", "0.2100", "-", "1.00", "0.12", "1.00"],
        ["full", "24.00", "0.2400", "-", "3.00", "0.12", "1.50"],
    ]
    assert said.splitlines()[-3:] == [
        "full: PSNR +3.00 dB to baseline, better on 100%",
        "NOTE: only one independent group, so there is no interval",
        "NOTE: untrained weights",
    ]

    add_result(directory, "full", clips[1], 26.0)
    print_summary(write_summary(directory, clips, ARMS), ARMS, ())
    said = capsys.readouterr().out
    assert "every arm finished: 2" in said
    assert "│ full            │ 25.00 " in said
    assert "full: PSNR -1.00 dB to baseline, better on 50%" in said


def test_nothing_in_common_is_said(directory, clips, capsys):
    add_result(directory, "baseline", clips[0], 20.0)
    print_summary(write_summary(directory, clips, ARMS), ARMS, ())
    assert capsys.readouterr().out == "no clip was finished by every arm, so there is nothing to compare\n"


def grey(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, torch.full((5, 3, 16, 32), value, dtype=torch.uint8), 24)
    return path


def no_stop():
    pass


def compare(directory, clips, check_stop=no_stop):
    return write_comparisons(directory, clips, ARMS, WINDOW, False, check_stop)


def columns(path):
    """The mean brightness of each column below the labels."""
    frames = read_window(path, frames=5, fps=24, height=56, width=3 * 32 + 4)
    return [round(frames[:, :, 44:, x + 4 : x + 28].float().mean().item()) for x in (0, 34, 68)]


def test_arms_and_truth_side_by_side(directory, clips):
    for clip in clips:
        grey(clip.path, 50)
        grey(directory.clip("baseline", clip.id) / "video.mp4", 100)
    full = grey(directory.clip("full", "a") / "video.mp4", 200)
    assert compare(directory, clips) == []
    assert not directory.comparison("b, c").exists()  # the other arm has no video yet
    made = directory.comparison("a")
    assert columns(made) == pytest.approx([100, 200, 50], abs=3)

    before = made.stat().st_mtime_ns
    assert compare(directory, clips) == []
    assert made.stat().st_mtime_ns == before
    grey(full, 150)
    os.utime(full, ns=(before + 1, before + 1))
    assert compare(directory, clips) == []
    assert columns(made) == pytest.approx([100, 150, 50], abs=3)


def test_one_that_cannot_be_made_is_said_and_the_others_are(directory, clips):
    for clip in clips:
        for arm in ARMS:
            grey(directory.clip(arm, clip.id) / "video.mp4", 100)
    grey(clips[1].path, 50)
    assert compare(directory, clips) == [f"no comparison of a: {clips[0].path}: no such file; name a video file"]
    assert directory.comparison("b, c").exists()


def test_a_stop_comes_between_clips(directory, clips):
    def stop():
        raise Interrupted

    with pytest.raises(Interrupted):
        compare(directory, clips, stop)


def test_the_paths_of_each_arm_and_where_graphs_were_compiled():
    def row(arm: str, paths: str, graphs: int, **more) -> dict:
        return {"arm": arm, "status": "done", "paths": paths, "graphs": graphs, "graph_breaks": 0, **more}

    rows = [
        row("lora", "sampling triton", 4),
        row("lora", "sampling triton", 0),
        row("lora", "sampling plain", 1, graph_breaks=2),
    ]
    rows += [row("plain", "sampling plain", 0), {"arm": "lora", "status": "failed", "reason": "no"}]
    assert path_lines(rows, ["plain", "lora"]) == [
        "paths of lora: sampling triton",
        "paths of lora: sampling plain",
        "lora: 5 graphs compiled, on 2 of 3 clips; 2 graph breaks",
    ]
