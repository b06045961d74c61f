"""Nothing is compiled anew for another clip or another caption, and the count tells when something is."""

import pytest
import torch
from vidtta.bench import compiles, suite
from vidtta.bench.step_scene import small_scene
from vidtta.engine.models.attention import TextStates

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the CPU")


def row_of(name: str, clips: int) -> suite.Row:
    (row,) = suite.run(compiles.rows(clips), [name], small_scene(torch.device("cpu")), 600)
    assert "error" not in row, row
    return row


def test_clips_with_captions_of_five_lengths_compile_once():
    row = row_of("compiles lora compiled", 6)
    assert row["caption_lengths"] == [2, 3, 5, 6, 8] and row["clips"] == 6
    assert row["graphs_first"] > 0 and (row["graphs_more"], row["breaks_more"]) == (0, 0)


def test_lengths_that_the_compiler_is_not_told_of_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TextStates, "mark_length", lambda self: None)
    assert row_of("compiles none compiled", 2)["graphs_more"] > 0
