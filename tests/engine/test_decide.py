"""Which outcome holds, on differences whose outcome is known."""

import pytest
from vidtta.engine import cli
from vidtta.engine.compare import SCORES, Compared
from vidtta.engine.decide import Thresholds, decide_arm, parse_thresholds
from vidtta.engine.errors import UserError
from vidtta.engine.statistics import Pairs

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
