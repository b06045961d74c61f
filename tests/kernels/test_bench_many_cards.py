"""The bench of several cards, on processes without any: what it counts, compares and says when one fails."""

import json

import pytest
import torch
from vidtta.bench import many_cards

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the CPU")
SMALL = ["--check", "--path=eager", "--method=none"]


@on_cpu
def test_two_processes_make_the_clips_of_one_and_as_many_more(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "rows.json"
    assert many_cards.main([*SMALL, "--cards", "1", "2", "--clips=2", "--deterministic", f"--out={out}"]) == 0
    one, two = json.loads(out.read_text())["rows"]
    assert (one["clips"], two["clips"], two["same_bits"]) == (2, 4, "2 of 2")
    assert [[clip["clip"] for clip in card["clips"]] for card in two["processes"]] == [
        ["clip 0", "clip 2"],
        ["clip 1", "clip 3"],
    ]
    assert two["ratio"] == pytest.approx(two["clips_an_hour"] / one["clips_an_hour"])
    assert two["clips_an_hour"] == pytest.approx(4 / two["seconds"] * 3600)
    assert capsys.readouterr().out.count("clips an hour") == 2


@on_cpu
@pytest.mark.parametrize(("words", "said"), [(["--minutes=0"], "no time left"), (["--path=unheard"], "KeyError")])
def test_a_row_that_fails_says_why(tmp_path, capsys, words, said):
    assert many_cards.main([*SMALL, *words, "--cards", "2", "--clips=1", f"--out={tmp_path / 'rows.json'}"]) == 1
    assert said in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert said in row["error"] and "clips_an_hour" not in row


def test_other_bits_are_counted():
    def row(bits):
        return {"cards": 1, "processes": [{"clips": [{"clip": "clip 0", "latents": bits}]}]}

    rows = [row("a"), row("b")]
    many_cards.compare(rows, deterministic=True)
    assert rows[1]["same_bits"] == "0 of 1"
