"""What a run says before it begins."""

from types import SimpleNamespace
from typing import Any

from vidtta.engine import cli
from vidtta.engine.arms import Arm
from vidtta.engine.methods import FullFineTuning, LoRA, NoAdaptation
from vidtta.engine.plan import estimate

from .tiny_run import DELTA, FULL, tiny_lab


def test_a_plan_says_what_is_done_measured_and_how_much_disk(tmp_path, capsys):
    with tiny_lab(tmp_path) as lab:
        arms = {"full": FULL, "longer": {**FULL, "steps": 3}, "delta": DELTA}

        def plan(*words):
            capsys.readouterr()
            argv = [
                word for word in lab.argv("run", *words, arms=arms, keep=["latents", "adapter"]) if word != "--quiet"
            ]
            assert cli.main(argv) == 0
            return capsys.readouterr().out

        first = plan("--batch-end", "1")
        assert "plan: 1 clips, 4 arms" in first and "full: 0 of 1 done, time not measured yet" in first
        assert "and 4 arms not measured yet" in first
        trained = sum(lab.result("run", arm, "ball")["adaptation"]["change"]["trained"] for arm in arms)
        latents = 4 * 16 * 5 * 2 * 3  # four arms keep [16, 5, 2, 3] float32
        assert f"about {4 * (trained + latents) / 2**20:,.1f} MiB, videos not counted" in first
        (lab.root / "run/arms/longer/clips/ball/result.json").unlink()
        second = plan()
        assert "full: 1 of 2 done, about" in second and "longer: 0 of 2 done, about" in second
        assert "not measured yet" not in second


def test_an_arm_that_nothing_measured_takes_its_steps_at_the_mean_of_its_kind():
    phases = {"read": 1.0, "encode": 1.0, "sample": 5.0, "decode": 2.0, "score": 1.0}
    kinds = {
        "baseline": NoAdaptation(),
        "short": FullFineTuning(steps=2),
        "long": FullFineTuning(steps=30),
        "lora": LoRA(),
    }
    arms = {name: Arm(name, method) for name, method in kinds.items()}
    session: Any = SimpleNamespace(arms=arms, baseline="baseline", steps=lambda arm: getattr(kinds[arm], "steps", 0))
    measured = {
        "baseline": [phases | {"adapt": 0.0, "steps": 0}],
        "short": [phases | {"adapt": 1.0, "steps": 2}, phases | {"adapt": 2.0, "steps": 2}],
        "long": [],
        "lora": [],
    }
    assert estimate(session, "short", measured) == 10 + 1.5
    assert estimate(session, "long", measured) == 10 + 30 * 0.75
    assert estimate(session, "lora", measured) is None
