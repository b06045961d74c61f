"""Selective adaptation: a perfect predictor reaches the oracle, groups stay apart, features see known frames alone."""

import numpy as np
import pytest
from vidtta.engine import cli
from vidtta.engine.adaptive import left_out_predictions, policies
from vidtta.engine.errors import UserError
from vidtta.engine.predictor import NUMBERS, load_predictor

from .tiny_run import FULL, make_clip, tiny_lab


def test_a_perfect_predictor_reaches_the_oracle_and_others_regret():
    gains = np.array([0.5, -0.4, 0.1, -0.2])
    perfect = policies(gains, gains)
    assert perfect["selective"] == perfect["oracle"] and perfect["oracle"]["regret"] == 0
    assert perfect["always"]["regret"] == pytest.approx(0.15) and perfect["never"]["regret"] == pytest.approx(0.15)
    assert policies(gains, -gains)["selective"]["regret"] == pytest.approx(0.3)


def clips(count, seed=0):
    generator = np.random.default_rng(seed)
    rows = [{**dict(zip(NUMBERS, generator.normal(size=5), strict=True)), "class": "ab"[k % 2]} for k in range(count)]
    return rows, generator, np.array([f"g{k // 2}" for k in range(count)])


def test_what_is_linear_is_foreseen_and_noise_is_not():
    rows, generator, groups = clips(80)
    signal = np.array([row["flow"] - 0.5 * row["edges"] for row in rows])
    predicted = left_out_predictions(rows, signal + 0.1 * generator.normal(size=80), groups)
    assert np.corrcoef(predicted, signal)[0, 1] > 0.95
    noise = generator.normal(size=80)
    assert np.abs(left_out_predictions(rows, noise + 3, groups) - 3).max() < 1.0  # shrunk towards the mean
    with pytest.raises(UserError, match="at least 4"):
        left_out_predictions(rows[:6], noise[:6], groups[:6])


def test_no_clip_is_foreseen_from_its_own_group():
    """Half of the benefit only the group decides, by a class of its own: that half cannot be foreseen for a group left out."""
    rows, generator, _ = clips(200)
    groups = np.array([f"g{k // 10}" for k in range(200)])
    rows = [{**row, "class": group} for row, group in zip(rows, groups, strict=True)]
    flow, group = np.array([row["flow"] for row in rows]), np.repeat(generator.normal(size=20), 10)
    predicted = left_out_predictions(rows, flow + group, groups)
    assert np.corrcoef(predicted, flow)[0, 1] > 0.9
    assert abs(np.corrcoef(predicted - flow, group)[0, 1]) < 0.5  # 0.99 where clips of one group are on both sides


def test_the_command_prints_policies_and_writes_json(tmp_path, capsys):
    with tiny_lab(tmp_path) as lab:
        for k in range(4):
            make_clip(lab.root / "clips" / f"more{k}.mp4", seed=20 + k)
        assert lab.run("run", arms={"full": FULL}, keep=[]) == 0
        capsys.readouterr()
        out = tmp_path / "predictor.json"
        assert cli.main(["adaptive", str(lab.root / "run"), "--arm", "full", "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert "6 clips in 6 groups" in shown and all(
            name in shown for name in ("never", "always", "selective", "oracle")
        )
        fitted, _ = load_predictor(out)
        assert fitted.arm == "full" and len(fitted.videos) == len(fitted.groups) == 6
        assert fitted.settings["method"]["lr"] == FULL["lr"]
        assert cli.main(["adaptive", str(lab.root / "run"), "--arm", "x"]) == 2
    assert "--arm x" in capsys.readouterr().err
