"""The Fisher information: of single samples, kept with its hashes, on clips that nothing else uses."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from vidtta.engine import fisher as fisher_module
from vidtta.engine.fisher import empirical_fisher
from vidtta.engine.methods import LoRA
from vidtta.engine.seeds import generator_for

from .tiny import tiny_dit, tiny_latents, tiny_task
from .tiny_run import FULL, make_clip, one_sentence, tiny_lab


def test_it_equals_per_sample_gradients_computed_one_by_one():
    """In float64, of the log-likelihood written out; a batch's gradient squared would be another number."""
    model = tiny_dit(depth=1)
    adapter = LoRA(rank=2).attach(model, 0)
    with torch.no_grad():
        for i, one in enumerate(adapter.adapters.values()):  # away from B = 0, so that A counts too
            one.B.copy_(torch.randn(one.B.shape, generator=generator_for(0, "", "B", i)) * 0.02)
    tasks = [tiny_task(model, clip_id=clip, latents=tiny_latents(seed=k)) for k, clip in enumerate("ab")]
    found = empirical_fisher(adapter.masters.parameters, tasks, 2)

    squares, batch = [], []
    for task in tasks:
        for k in range(2):
            draw = task.draw(k)
            state = model.run_layers(task.embed(draw), *task.captions(), task.geometry)
            output = model.head(state, task.geometry)[:, :16, task.first_counted :].double()
            error = output - task.target(draw).double()
            variance = error.detach().square().mean()
            log_likelihood = -(error.square() / (2 * variance)).sum()
            gradients = torch.autograd.grad(log_likelihood, adapter.masters.parameters, allow_unused=True)
            squares.append([g.double().square() for g in gradients])
            batch.append([g.double() for g in gradients])
            assert found.numbers == error.numel()
    for i, diagonal in enumerate(found.diagonal):
        expected = torch.stack([one[i] for one in squares]).mean(0)
        of_mean = torch.stack([one[i] for one in batch]).mean(0).square()
        assert torch.allclose(diagonal.double(), expected, rtol=1e-3, atol=1e-4 * expected.max().item())
        assert not torch.allclose(diagonal.double(), of_mean, rtol=0.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        make_clip(lab.root / "validation" / "other.mp4", seed=7)
        yield lab


def arms(lab, folder="validation"):
    return {"arms": {"ewc": {**FULL, "ewc": {"clips": str(lab.root / folder), "weight": 1e3, "draws": 1}}}}


def test_a_run_keeps_it_reads_it_again_and_makes_a_damaged_one_again(lab, monkeypatch):
    made = []
    real = fisher_module.empirical_fisher
    monkeypatch.setattr(fisher_module, "empirical_fisher", lambda *a, **k: made.append(1) or real(*a, **k))
    one = ("data.limit=1", "keep=[]")
    assert lab.run("ewc", *one, **arms(lab)) == 0
    (stored,) = (lab.root / "ewc/shared/fisher").iterdir()
    first = lab.result("ewc", "ewc", "ball")
    assert made == [1] and first["adaptation"]["penalties"][0] == 0 < first["adaptation"]["penalties"][1]

    def again():
        (lab.root / "ewc/arms/ewc/clips/ball/result.json").unlink()
        assert lab.run("ewc", *one, **arms(lab)) == 0
        assert lab.result("ewc", "ewc", "ball")["generated"] == first["generated"]

    again()
    assert made == [1]
    tensors = load_file(stored)
    next(iter(tensors.values())).add_(1)
    with fisher_module.safe_open(stored, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, stored, metadata)
    again()
    assert made == [1, 1]


def test_arms_share_it_where_they_train_the_same_alone(lab):
    """Rates do not matter to it; LoRA's alpha does, though the tensors have equal shapes."""

    def lora(**own):
        ewc = {"clips": str(lab.root / "validation"), "weight": 1e3, "draws": 1}
        return {"kind": "lora", "rank": 2, "steps": 1, "lr": 1e-3, "ewc": ewc, **own}

    named = {"a": lora(alpha=2.0), "b": lora(alpha=2.0, lr=1e-2), "c": lora(alpha=8.0)}
    assert lab.run("alphas", "data.limit=1", "keep=[]", arms=named) == 0
    assert len(list((lab.root / "alphas/shared/fisher").iterdir())) == 2


def test_validation_clips_must_not_be_adapted_on_or_scored(lab, capsys):
    assert lab.run("shared", **arms(lab, "clips")) == 2
    assert one_sentence(capsys).endswith(
        "arms.ewc.ewc.clips shares the clip ball with data.clips; the two must be disjoint, so name other clips"
    )
    copy = lab.root / "copies" / "renamed.mp4"
    copy.parent.mkdir()
    copy.write_bytes((lab.root / "clips" / "wave.mp4").read_bytes())
    assert lab.run("shared", **arms(lab, "copies")) == 2
    assert "shares the video of clip renamed under another name with data.clips" in one_sentence(capsys)
