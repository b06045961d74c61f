"""Seeds are a function of their names alone, and stay what they are: old results must come out again."""

import torch
from vidtta.engine.seeds import generator_for, normal, seed_for


def test_seeds_are_fixed():
    assert seed_for(0, "v_PlayingGuitar_g01_c01", "noise") == 6662730694170715704
    assert seed_for(42, "clip", "adapt", 7) == 2171604700308902196


def test_every_name_matters_and_none_runs_into_the_next():
    names = [
        (0, "clip", "noise", 0), (1, "clip", "noise", 0), (0, "clip2", "noise", 0), (0, "clip", "adapt", 0),
        (0, "clip", "noise", 1), (10, "clip", "noise", 0), (0, "clip", "noise", 10), (0, "clipnoise", "", 0),
        (0, "", "clipnoise", 0), (0, "clip", "noise1", 0),
    ]  # fmt: skip
    seeds = {seed_for(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_depend_on_no_order_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = normal((3, 4), 0, "a", "noise"), normal((3, 4), 0, "b", "noise")
    again_second, again_first = normal((3, 4), 0, "b", "noise"), normal((3, 4), 0, "a", "noise")
    assert torch.equal(first, again_first) and torch.equal(second, again_second)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_normal_numbers_come_from_the_named_generator():
    drawn = normal((2, 5), 3, "clip", "noise", 2)
    assert drawn.shape == (2, 5) and drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    assert torch.equal(drawn, torch.randn(2, 5, generator=generator_for(3, "clip", "noise", 2)))
    assert generator_for(3, "clip", "noise", 2).initial_seed() == seed_for(3, "clip", "noise", 2)
    many = normal((20_000,), 0, "clip", "noise")
    assert abs(many.mean().item()) < 0.03 and abs(many.std().item() - 1) < 0.03
