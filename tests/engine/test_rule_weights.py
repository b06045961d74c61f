"""The weights rule of the parity fixtures, against numbers worked out by hand from its statement."""

import pytest
import torch
from torch import nn
from vidtta.engine.models.rule_weights import fill_by_rule


class Model(nn.Module):
    """One tensor of every kind that the rule tells apart."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.proj = nn.Linear(3, 2)
        self.table = nn.Parameter(torch.zeros(1, 2, 2))
        self.freqs = nn.Parameter(torch.tensor([5.0]))
        self.kept = nn.Buffer(torch.zeros(2))
        self.passing = nn.Buffer(torch.zeros(2), persistent=False)


# standard_normal draws of numpy's default_rng(crc32(key)); PCG64's stream is fixed, so these never change.
NORMALS = {
    "norm.weight": [-0.7842990, 0.2820093],
    "norm.bias": [0.1665238, -0.6900802],
    "proj.weight": [2.3353087, 0.2558822, 1.4759144, -0.4687904, -0.6625022, -0.0372612],
    "table": [-2.5800664, -0.2936403, -0.6701130, 0.4389116],
    "kept": [0.3592698, -0.5423535],
    "freqs": [-2.5730513],
}


def test_values_follow_key_shape_and_dimensions():
    model = Model()
    fill_by_rule(model)
    normal = {key: torch.tensor(values) for key, values in NORMALS.items()}
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(model.norm.weight.data, 1 + 0.1 * normal["norm.weight"], **close)
    torch.testing.assert_close(model.norm.bias.data, 0.1 * normal["norm.bias"], **close)
    torch.testing.assert_close(model.proj.weight.data, normal["proj.weight"].view(2, 3) / 3**0.5, **close)
    torch.testing.assert_close(model.table.data, normal["table"].view(1, 2, 2) / 2, **close)
    torch.testing.assert_close(model.kept, 0.1 * normal["kept"], **close)
    assert model.passing.tolist() == [0.0, 0.0]


def test_skipped_keys_keep_their_value():
    model = Model()
    fill_by_rule(model)
    assert model.freqs.tolist() == [5.0]
    fill_by_rule(model, skip=())
    assert model.freqs.tolist() == pytest.approx([0.1 * NORMALS["freqs"][0]], abs=1e-6)


def test_fills_in_place_and_rounds_to_the_dtype():
    exact, rounded = Model(), Model().to(torch.bfloat16)
    storage = rounded.proj.weight.data_ptr()
    fill_by_rule(exact)
    fill_by_rule(rounded)
    assert rounded.proj.weight.data_ptr() == storage
    assert torch.equal(rounded.proj.weight, exact.proj.weight.bfloat16())


def test_refuses_a_module_without_storage():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="weight has no storage to fill"):
        fill_by_rule(model)
