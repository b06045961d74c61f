"""Runs against their baselines: the numbers, what is said beside them, and what is refused."""

import numpy as np
import pytest
from vidtta.engine import cli
from vidtta.engine.compare import compare_arms, read_results
from vidtta.engine.errors import UserError
from vidtta.engine.files import sha256_json
from vidtta.engine.rundir import RunDirectory
from vidtta.engine.statistics import paired_difference

GAINS = np.random.default_rng(0).normal(0.5, 0.2, 40)


def settings(kind, seed=0, size=480, **method):
    return {"protocol": {"seed": seed, "size": size}, "method": {"kind": kind, **method}}


def write_arm(
    root,
    arm,
    gains,
    kind="none",
    *,
    seed=0,
    size=480,
    lpips=True,
    groups=0,
    card="H200",
    placebo=None,
    cost=(),
    **method,
):
    """A result a clip: clip k scores 20 + k dB and its gain. cost: seconds a clip, peak of memory in GiB."""
    for k, gain in enumerate(gains):
        made = settings(kind, seed, size, **method) | ({"placebo": placebo} if placebo else {})
        psnr = 20.0 + k + gain
        result = {
            "clip": f"c{k}",
            "arm": arm,
            "caption": "",
            "start": 0.0,
            "meta": {"class": "A", "group": str(k % groups)} if groups else {},
            "marks": ["untrained weights"],
            "keys": {"protocol": sha256_json(made["protocol"]), "clip": f"video {k}"},
            "settings": made,
            "seeds": {"recipe": seed},
            "paths": {"device": card},
            "scores": {
                "psnr": {"mean": psnr},
                "ssim": {"mean": psnr / 100},
                "lpips": {"mean": 1 - psnr / 100 if lpips else None},
            },
            "cost": {"seconds": {"adapt": 2.0}, "peak_memory_bytes": None},
        }
        if cost:
            phases = {"encode": 1.0, "adapt": 2.0, "sample": cost[0] - 4.0, "decode": 1.0, "score": 99.0}
            result["cost"] = {"seconds": phases, "peak_memory_bytes": cost[1] * 2**30}
        RunDirectory(root).write_result(arm, f"c{k}", result)
    return root


@pytest.fixture
def run(tmp_path):
    write_arm(tmp_path / "run", "baseline", np.zeros(40))
    return write_arm(tmp_path / "run", "full", GAINS, "full")


def said(capsys, *roots):
    status = cli.main(["compare", *map(str, roots)])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_the_table_of_one_run(run, capsys):
    status, out, _ = said(capsys, run)
    expected = paired_difference(GAINS, np.zeros(40))
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    interval = expected.text(2).split(" ")
    assert ["full", "PSNR", "dB", *interval, "100%", "<0.001"] in lines
    assert ["adapt", "2.00", "s", "LPIPS", f"{-GAINS.mean() / 100:+.4f}"] == next(x for x in lines if "adapt" in x)[:5]
    assert "NOTE: untrained weights" in out
    assert "clips: 40 " in out and "groups" not in out
    assert "full: " not in out  # nothing speaks against it
    assert max(map(len, out.splitlines())) <= 80


def test_clusters_warnings_missing_clips_other_paths_and_failures_are_said(tmp_path, capsys):
    root = write_arm(tmp_path / "run", "baseline", np.zeros(9), groups=3, lpips=False)
    write_arm(root, "lora", [0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.0], "lora", groups=3, card="H100")
    RunDirectory(root).write_failure("lora", "c7", {"reason": "too short"})
    _, out, _ = said(capsys, root)
    assert "clips: 7 " in out and "groups: 3 " in out
    assert "lora: left out, because it has no result for them: c7 (seed 0), c8 (seed 0)\n" in out
    assert "lora: only 3 independent groups: the interval may miss" in out
    assert "lora: PSNR shows no difference; a true one of" in out
    assert 'lora: the baseline took another path (device: was "H200", now "H100")' in out
    assert "results missing: 1; the reasons are in arms/*/clips/*/failure.json" in out


def test_several_arms_are_corrected_and_one_name_with_other_settings_is_kept_apart(run, tmp_path, capsys):
    other = write_arm(tmp_path / "other", "full", GAINS * 0 + 0.1, "full", lr=1.0)
    write_arm(other, "baseline", np.zeros(40) + 0.1)  # its own baseline, not the first run's
    rows = compare_arms({root: read_results(root) for root in (run, other)})
    assert [row.arm for row in rows] == [f"{run}: full", f"{other}: full"]
    found = [row.scores["psnr"] for row in rows]
    assert [f and round(f.mean, 6) for f in found] == [round(GAINS.mean(), 6), 0]
    assert said(capsys, run, other)[0] == 0


def test_the_baseline_may_lie_in_another_run(tmp_path):
    alone = write_arm(tmp_path / "alone", "full", GAINS, "full")
    with pytest.raises(UserError, match="alone: no arm of kind none, so there is no baseline"):
        compare_arms({alone: read_results(alone)})
    base = write_arm(tmp_path / "base", "baseline", np.zeros(40))
    (row,) = compare_arms({root: read_results(root) for root in (alone, base)})
    assert row.scores["psnr"] is not None and row.scores["psnr"].n == 40


def test_runs_with_other_seeds_are_seeds_of_one_arm(run, tmp_path, capsys):
    second = write_arm(tmp_path / "second", "baseline", np.zeros(40), seed=1)
    write_arm(second, "full", GAINS[::-1], "full", seed=1)
    (row,) = compare_arms({root: read_results(root) for root in (run, second)})
    assert row.scores["psnr"] is not None and row.scores["psnr"].n == 40
    assert row.scores["psnr"].standard_error == pytest.approx((GAINS + GAINS[::-1]).std(ddof=1) / 2 / 40**0.5)
    assert "dB from seed to seed on one clip" in said(capsys, run, second)[1]


def test_mismatches_are_refused_in_one_sentence(run, tmp_path, capsys):
    small = write_arm(tmp_path / "small", "full", GAINS, "full", size=240)
    status, _, err = said(capsys, run, small)
    assert status == 2
    assert err == (
        f"error: {small}: its protocol is not that of {run} (size: was 480, now 240); "
        "compare runs that differ in the method or the seed alone\n"
    )
    swapped = RunDirectory(run).result("full", "c3")
    assert swapped is not None
    RunDirectory(run).write_result("full", "c3", swapped | {"keys": swapped["keys"] | {"clip": "video 4"}})
    assert "clip c3: arms baseline and full cannot be compared (video:" in said(capsys, run)[2]


def test_folders_without_results_and_baselines_alone_are_refused(tmp_path, capsys):
    assert (
        said(capsys, tmp_path)[2] == f"error: {tmp_path}: no finished result lies in it; give the output_dir of a run\n"
    )
    base = write_arm(tmp_path / "base", "baseline", np.zeros(2))
    assert "the baseline is the only arm; add a run with a method" in said(capsys, base)[2]


def test_fronts_and_equal_time_are_said(tmp_path, capsys):
    root = write_arm(tmp_path / "run", "baseline", np.zeros(40), cost=(14, 20))
    write_arm(root, "full", GAINS, "full", cost=(24, 55))
    write_arm(root, "full-random", GAINS + 9, "full", placebo="random", cost=(5, 1))  # a placebo is no method
    write_arm(root, "lora", GAINS / 2, "lora", cost=(20, 22))
    write_arm(root, "slow", GAINS / 3, "lora", cost=(30, 22), lr=1.0)
    write_arm(root, "equal_time", GAINS * 0 + 0.01, "more_sampling", cost=(23, 20))
    _, out, _ = said(capsys, root)
    half, mean = f"{GAINS.mean() / 2:+.2f}", f"{GAINS.mean():+.2f}"
    time = f"front of PSNR dB against time a clip: no adaptation (14.0 s, +0.00), lora (20.0 s, {half}), full (24.0 s, {mean})"
    assert f"{time}; behind it: equal_time, slow\n" in out
    memory = "front of PSNR dB against memory a clip: equal_time (20.0 GiB, +0.01), lora (22.0 GiB, "
    assert memory in out and "; behind it: no adaptation, slow\n" in out
    against = "full (24.0 s a clip) against the same time in more sampling, equal_time (23.0 s): "
    (line,) = (line for line in out.splitlines() if line.startswith(against))
    assert f"{GAINS.mean() - 0.01:+.2f} [" in line and line.endswith("dB, it is worth its time")


def test_without_costs_there_is_no_front(run, capsys):
    assert "front of" not in said(capsys, run)[1]
