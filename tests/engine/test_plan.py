"""What a run says before it begins."""

from vidtta.engine import cli

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
