"""The bench of which layers gain by float8."""

import pytest
import torch
from vidtta.bench import float8_sets, suite
from vidtta.bench.step_scene import small_scene
from vidtta.engine.models import float8, float8_linear


@pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the interpreter")
def test_a_row_computes_its_own_layers_in_float8_and_leaves_the_engines(float8_cast):
    before = float8.LINEARS, float8.LEARNING, float8_linear.FAST_ACCUMULATION
    names = ["sample3 plain", "sample3 float8, all six", "sample3 float8, fc1"]
    _, six, one = suite.run(float8_sets.rows(), names, small_scene(torch.device("cpu")), 600)
    assert six["in_sampling"] == float8_sets.ALL and one["in_sampling"] == ("mlp.fc1",)
    assert 0 < one["distance_from_eager"] < six["distance_from_eager"]
    assert before == (float8.LINEARS, float8.LEARNING, float8_linear.FAST_ACCUMULATION)
