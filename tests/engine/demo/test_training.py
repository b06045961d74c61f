"""The trainings of the small models: their losses, their steps, several cards, weight files, and what ships."""

import json
import math
import multiprocessing
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from vidtta.engine.demo import train
from vidtta.engine.demo.train_dit import DROP, WORDS, Bank, continuation_loss, initialise
from vidtta.engine.demo.train_vae import recolour, vae_loss
from vidtta.engine.demo.training import PIECE_BYTES, Cards, Plan, Trainer, save_pieces
from vidtta.engine.models.checkpoint import open_state
from vidtta.engine.models.load import EMBEDDED
from vidtta.engine.models.stdit3 import STDiT3, STDiT3Config
from vidtta.engine.models.vae import VAE, VAEConfig, latent_stats

from ..tiny import noise

CPU = Cards(0, 1, torch.device("cpu"))
CONFIG = STDiT3Config(hidden_size=24, depth=1, num_heads=2, caption_channels=8, model_max_length=WORDS)


def small_dit(seed=0):
    torch.manual_seed(seed)
    dit = STDiT3(CONFIG)
    initialise(dit)
    return dit


def batch(B=4, T=7):
    latents, drawn = noise(0, B, 16, T, 4, 6), noise(1, B, 16, T, 4, 6)
    rows = torch.full((B, WORDS), -1)
    rows[:, :5] = torch.randint(0, 1024, (B, 5), generator=torch.Generator().manual_seed(2))
    return {
        "latents": latents,
        "noise": drawn,
        "t": torch.full((B,), 500.0),
        "drop": torch.full((B,), 0.9),
        "rows": rows,
    }


def loss_of(dit, table, **values):
    T = values["latents"].shape[2]
    geometry = dit.geometry(T, (4, 6), (32, 48), (0, 1, 2))
    return continuation_loss(dit, table, geometry, **values)


@pytest.fixture
def table():
    return nn.Parameter(noise(3, 1025, 8) / 8)


def test_a_network_that_gives_zero_has_the_loss_of_the_frames_to_predict(table):
    values = batch()
    loss = loss_of(small_dit(), table, **values)  # the official start gives an output of zero
    expected = (values["latents"] - values["noise"])[:, :, 3:].square().mean()
    torch.testing.assert_close(loss, expected)


def test_what_is_dropped_is_not_seen(table):
    """Four parts of the uniform number: text dropped, both, condition, nothing. At t = 1000 known latents are seen as condition alone."""
    dit = small_dit()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(noise(4, *parameter.shape), alpha=0.1)
    seen = {}
    for name, drop in (("text", 0.5), ("both", 1.5), ("condition", 2.5), ("nothing", 3.5)):
        values = batch() | {"t": torch.full((4,), 1000.0), "drop": torch.full((4,), drop * DROP)}
        base = loss_of(dit, table, **values)
        other = values["latents"].clone()
        other[:, :, :3] += 1
        words = values["rows"].flip(0)
        seen[name] = (
            not torch.equal(loss_of(dit, table, **values | {"rows": words}), base),
            not torch.equal(loss_of(dit, table, **values | {"latents": other}), base),
        )
    assert seen == {"text": (False, True), "both": (False, False), "condition": (True, False), "nothing": (True, True)}


def test_steps_learn_a_batch_by_heart(table):
    dit, values = small_dit(), batch()
    trainer = Trainer([table, *dit.parameters()], Plan(60, 4, 3e-3, warmup=5, decay=0.5), CPU)
    first = loss_of(dit, table, **values).item()
    for _ in range(60):
        loss_of(dit, table, **values).backward()
        more = trainer.step()
    assert not more
    trainer.take_averages()
    assert loss_of(dit, table, **values).item() < 0.7 * first


def test_the_vae_learns_a_chunk_and_keeps_latents_near_the_normalisation():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1))
    stats = latent_stats(torch.device("cpu"))
    ramp = torch.linspace(-0.8, 0.8, 24).expand(2, 3, 5, 16, 24)
    trainer = Trainer(vae.parameters(), Plan(40, 2, 2e-3, warmup=2), CPU)
    _, before, *_ = vae_loss(vae, stats, ramp)
    for _ in range(40):
        loss, error, *_ = vae_loss(vae, stats, ramp)
        loss.backward()
        trainer.step()
    assert error < 0.3 * before


def test_what_recording_adds_to_the_gradients_does_not_count(monkeypatch):
    """Recording runs the computation several times: afterwards the buffer must hold one batch's gradient."""

    class Runs:
        def __init__(self, compute, inputs, *, warm_ups):
            self.compute = compute
            for _ in range(warm_ups + 1):
                compute(*inputs)

        def __call__(self, *inputs):
            self.result = self.compute(*inputs)
            return self.result

    monkeypatch.setattr("vidtta.engine.demo.training.Recorded", Runs)
    weight = nn.Parameter(torch.ones(2))
    trainer = Trainer([weight], Plan(3, 1, 0.1), CPU)
    card = SimpleNamespace(device=SimpleNamespace(type="cuda"), autocast=CPU.autocast)
    monkeypatch.setattr(trainer, "cards", card)
    for kind, factor in (("a", 1.0), ("a", 2.0), ("b", 3.0)):
        trainer.gradient.zero_()
        values = trainer.backward(kind, lambda x: ((weight * x).sum(), x.sum()), torch.full((2,), factor))
        assert values.tolist() == [2 * factor, 2 * factor] and not values.requires_grad
        assert values.data_ptr() != trainer.records[kind].result.data_ptr()  # the next replay writes there
        assert weight.grad is not None
        assert weight.grad.tolist() == trainer.gradient.tolist() == [factor, factor]
    assert set(trainer.records) == {"a", "b"}


def test_the_rate_rises_falls_and_ends():
    weight = nn.Parameter(torch.zeros(1))
    trainer = Trainer([weight], Plan(steps=10, batch=1, lr=1.0, warmup=4), CPU)
    rates, more = [], []
    for _ in range(10):
        weight.sum().backward()
        more.append(trainer.step())
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    expected = [min(1, (k + 1) / 4) * (0.5 + 0.5 * math.cos(math.pi * k / 10)) for k in range(10)]
    assert rates == pytest.approx(expected)
    assert more == [True] * 9 + [False]


def test_a_time_limit_ends_a_training():
    weight = nn.Parameter(torch.zeros(1))
    trainer = Trainer([weight], Plan(steps=10**9, batch=1, lr=1.0, minutes=1e-9), CPU)
    assert [trainer.step() for _ in range(20)] == [True] * 19 + [False]


def test_recolouring_leaves_every_second_clip_and_the_range():
    clips = noise(5, 4, 3, 2, 4, 4).clamp(-1, 1)
    mixed = recolour(clips.clone(), 0)
    assert torch.equal(mixed[1::2], clips[1::2])
    assert not torch.equal(mixed[::2], clips[::2])
    assert mixed.abs().max() <= 1


def _one_card(rank, port, queue):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cards = Cards.join()
    weights = [nn.Parameter(torch.full((3,), 1.0)), nn.Parameter(torch.zeros(2, 2))]
    trainer = Trainer(weights, Plan(5, 1, 0.1, warmup=1), cards)
    for _ in range(5):
        ((weights[0] * (rank + 1)).sum() - (weights[1] * (3 - rank)).sum()).backward()
        trainer.step()
    queue.put((rank, [w.tolist() for w in weights]))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_cards_take_the_step_of_the_mean_gradient():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    cards = [context.Process(target=_one_card, args=(rank, port, queue)) for rank in range(2)]
    for card in cards:
        card.start()
    found = dict(queue.get() for _ in cards)
    for card in cards:
        card.join()
    weights = [nn.Parameter(torch.full((3,), 1.0)), nn.Parameter(torch.zeros(2, 2))]
    trainer = Trainer(weights, Plan(5, 1, 0.1, warmup=1), CPU)
    for _ in range(5):
        ((weights[0] * 1.5).sum() - (weights[1] * 2.5).sum()).backward()
        trainer.step()
    assert found[0] == found[1] == [w.tolist() for w in weights]


def test_the_bank_takes_new_clips_in_place():
    parts = [Bank(torch.full((2, 1), float(k)), torch.full((2, 1), float(k)), torch.full((2, 1), k)) for k in range(3)]
    bank = Bank(*(torch.cat([getattr(p, n) for p in parts]) for n in ("whole", "alone", "rows")))
    bank.replace(2, Bank(torch.full((2, 1), 9.0), torch.full((2, 1), 9.0), torch.full((2, 1), 9)))
    for held in (bank.whole, bank.alone, bank.rows):
        assert held.flatten().tolist() == [0, 0, 9, 9, 2, 2]


def test_weights_come_in_pieces_that_load_again(tmp_path, monkeypatch):
    monkeypatch.setattr("vidtta.engine.demo.training.PIECE_BYTES", 20_000)
    dit = small_dit()
    save_pieces(dit, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    state = open_state(tmp_path)
    assert state.keys() == dit.state_dict().keys()
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in dit.state_dict().items())


def test_a_training_goes_on_from_an_earlier_one(tmp_path, monkeypatch, capsys):
    small = {"dit": vars(CONFIG), "vae": {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}}
    for part, config in small.items():
        (tmp_path / "embedded" / part).mkdir(parents=True)
        (tmp_path / "embedded" / part / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(train, "EMBEDDED", tmp_path / "embedded")
    sizes = ["--vae-batch", "1", "--dit-batch", "1", "--bank", "1"]

    def run(out, *words):
        monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / out), *sizes, *words])
        train.main()
        return json.loads((tmp_path / out / "training.json").read_text())

    first = run("first", "--vae-steps", "1", "--dit-steps", "1")
    second = run("second", "--vae-steps", "0", "--dit-steps", "2", "--start-from", str(tmp_path / "first"))
    assert first["vae"]["log"] == second["vae"]["log"]  # what was taken over keeps its record
    assert (first["dit"]["log"][-1]["step"], second["dit"]["log"][-1]["step"]) == (1, 2)
    vaes, dits = ([open_state(tmp_path / out / part) for out in ("first", "second")] for part in ("vae", "dit"))
    assert all(torch.equal(value, vaes[1][name]) for name, value in vaes[0].items())
    assert any(not torch.equal(value, dits[1][name]) for name, value in dits[0].items())


def test_what_ships_is_small():
    files = [path for path in EMBEDDED.rglob("*.safetensors") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= PIECE_BYTES < 16 * 2**20
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
