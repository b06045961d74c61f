"""Which outcome holds, on differences whose outcome is known."""

import numpy as np
import pytest
from vidtta.engine import cli
from vidtta.engine.compare import SCORES, Compared, compare_arms, read_results
from vidtta.engine.decide import Thresholds, decide_arm, decision_lines, parse_thresholds
from vidtta.engine.errors import UserError
from vidtta.engine.statistics import Pairs

from .test_compare import write_arm
from .tiny_run import FULL, tiny_lab


def compared(differences, score="psnr"):
    """Clips with these differences to the baseline, one value a sample."""

    def result(values):
        samples = [{score: value} for value in values]
        return {"scores": {score: {"mean": values[0]}}, "samples": samples, "meta": {}}

    clips = {(f"c{k:03d}", 0): values for k, values in enumerate(differences)}
    treated = {unit: result(values) for unit, values in clips.items()}
    baseline = {unit: result([0.0] * len(values)) for unit, values in clips.items()}
    pairs = Pairs(treated, baseline, (), ())
    return Compared("arm", pairs, {name: pairs.compare(name) for name in SCORES})


SPREAD = [(-1) ** k * 0.01 * k for k in range(40)]


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([[0.5 + s] for s in SPREAD], "improvement"),
        ([[-0.5 + s] for s in SPREAD], "degradation"),
        ([[s / 10] for s in SPREAD], "none"),
        ([[(-1) ** k * 1.0 + 0.001 * k] for k in range(40)], "mixed"),
        ([[0.05 + s / 100] for s in SPREAD], "none"),  # surely above 0, and too small to matter
        ([[(-1) ** k * 1.0 + 0.001 * k + n for n in (-0.1, 0.1)] for k in range(40)], "mixed"),
        ([[(-1) ** k * 0.3 + n for n in (-3, 3)] for k in range(40)], "none"),  # the sampler's noise is larger
    ],
)
def test_outcomes(differences, outcome):
    decision = decide_arm(compared(differences), Thresholds())
    assert decision is not None and decision.outcome == outcome


@pytest.mark.parametrize(
    ("other_clip", "random", "outcome", "said"),
    [
        (0.1, -0.2, "improvement", ["adapted on another clip: +0.", "a random change of equal norm: +0.7"]),
        (0.5, -0.2, "none", ["adapted on another clip: -0.01", "may not be owed to this clip, and is no improvement"]),
        (
            0.1,
            0.6,
            "none",
            ["a random change of equal norm: -0.10", "may not be owed to what was learnt, and is no improvement"],
        ),
        (None, None, "improvement", ["no placebo ran, so this may be what any adapting brings"]),
    ],
)
def test_an_improvement_must_beat_its_placebos(tmp_path, other_clip, random, outcome, said):
    spread = np.random.default_rng(0).normal(0, 0.02, (4, 40))
    root = write_arm(tmp_path / "run", "baseline", np.zeros(40))
    write_arm(root, "full", 0.5 + spread[0], "full")
    for name, gain, noise in (("other_clip", other_clip, spread[1]), ("random", random, spread[2])):
        if gain is not None:
            write_arm(root, f"full-{name}", gain + noise, "full", placebo=name)
    write_arm(root, "lora", 0.5 + spread[3], "lora")  # whose placebos these are not
    compared = compare_arms({root: read_results(root)})
    decisions = {row.arm: decide_arm(row, Thresholds(), compared) for row in compared}
    decision = decisions["full"]
    assert decision is not None and decision.outcome == outcome
    text = "; ".join(decision.reasons)
    assert all(part in text for part in said), text
    assert decisions["lora"] is not None and decisions["lora"].outcome == "improvement"
    assert any(reason.startswith("no placebo ran") for reason in decisions["lora"].reasons)
    lines = list(decision_lines(compared, Thresholds()))
    assert f"full: {outcome}" in lines
    if random is not None:
        assert "full-random: a placebo, a random change of equal norm" in lines
        assert not any(line.startswith("full-random: improvement") for line in lines)


def test_less_is_better_for_lpips():
    decision = decide_arm(compared([[-0.5 + s] for s in SPREAD], "lpips"), Thresholds(metric="lpips"))
    assert decision is not None and decision.outcome == "improvement"


def test_what_could_not_have_been_shown_is_said():
    decision = decide_arm(compared([[0.4], [-0.3], [0.05], [-0.02], [0.01]]), Thresholds())
    assert decision is not None and decision.outcome == "none"
    assert any("no evidence of absence" in reason for reason in decision.reasons)


def test_thresholds_are_settings():
    differences = compared([[0.5 + s] for s in SPREAD])
    strict = decide_arm(differences, parse_thresholds(["smallest=1.0"]))
    assert strict is not None and strict.outcome == "none"
    for text in ("small=1", "smallest", "smallest=x", "smallest=-1", "metric=fvd"):
        with pytest.raises(UserError, match="threshold"):
            parse_thresholds([text])


def test_the_command_names_the_outcome_and_what_to_run_next(tmp_path, capsys):
    with tiny_lab(tmp_path) as lab:
        assert lab.run("run", arms={"full": FULL}, keep=[]) == 0
        capsys.readouterr()
        assert cli.main(["decide", str(lab.root / "run"), "smallest=50"]) == 0
    shown = capsys.readouterr().out
    assert "full: none" in shown and "next: 02_hyperparameter_search" in shown and "PSNR dB" in shown
