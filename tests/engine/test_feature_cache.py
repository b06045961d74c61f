"""The feature cache: a worked example, which branches are refreshed when, each branch against itself, and what it may not change."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from vidtta.engine import clip as clip_module
from vidtta.engine.clip import Outcome, continue_clip
from vidtta.engine.denoiser import ALL, PROMPT, REST, Denoiser
from vidtta.engine.feature_cache import FeatureCache
from vidtta.engine.methods import AnyMethod, Delta, LoRA, NoAdaptation
from vidtta.engine.models.paths import Paths, use_paths
from vidtta.engine.models.stdit3 import Caption, Condition, Embedded, STDiT3
from vidtta.engine.sampler import ContinuationGuidance, SamplerSettings
from vidtta.kernels.common import INTERPRETED

from .tiny import noise, tiny_dit, tiny_experiment, tiny_known

SHAPE = (1, 16, 5, 4, 6)
GUIDED = [True, True, False, True, False, True]  # whether all branches run, step by step
METHODS: dict[str, AnyMethod] = {
    "none": NoAdaptation(),
    "lora": LoRA(steps=2, lr=1e-1, rank=2),
    "delta": Delta(steps=2, lr=1e-1),
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def state(tokens: float, modulation: float) -> Embedded:
    return Embedded(torch.full((1, 1, 1), tokens), torch.full((1, 6, 1), modulation), torch.zeros(1, 1), torch.zeros(1))


def two_layers(at: Embedded, start: int = 0, stop: int | None = None) -> Embedded:
    """Layer 0 doubles its input, layer 1 adds the modulation."""
    for layer in range(2)[start:stop]:
        tokens = 2 * at.tokens if layer == 0 else at.tokens + at.modulation[:, :1]
        at = at._replace(tokens=tokens)
    return at


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        # Step 0: 2 * 1 = 2, + 10 = 12, of which layer 1 added 10. Step 1: 2 * 3 = 6, + 10. Step 2 runs both: 2 * 4 + 30.
        (1, [12.0, 16.0, 38.0, 40.0]),
        # Both layers added 12 - 1 = 11 at step 0 and 38 - 4 = 34 at step 2.
        (0, [12.0, 14.0, 38.0, 39.0]),
    ],
)
def test_two_layers_by_hand(first: int, expected: list[float]):
    cache, found = FeatureCache(every=2, first=first, layers=2, branches=1), []
    for tokens, modulation in ((1.0, 10.0), (3.0, 50.0), (4.0, 30.0), (5.0, 70.0)):
        cache.next_step()
        found.append(cache.run(slice(0, 1), state(tokens, modulation), two_layers).tokens.item())
    assert found == expected
    assert cache.counts == {"computed": 4 + 2 * first, "reused": 4 - 2 * first}


def schedule(settings: SamplerSettings, split: bool = False) -> list[str]:
    """What runs at each step, by the sampler's own rule: a letter a branch (prompt, null, unconditional), capital where it is refreshed."""
    cache, told = FeatureCache(settings.cache_every, first=1, layers=2), []
    guidance = ContinuationGuidance(None, settings, 3)  # type: ignore[arg-type]
    for step in range(settings.steps):
        cache.next_step()
        line = ""
        batches = [PROMPT] if guidance.scales(step) == (1.0, 1.0) else [PROMPT, REST] if split else [ALL]
        for branches in batches:
            before = cache.counts["reused"]
            names = "pnu"[branches]
            batch = Embedded(*(t.expand(len(names), *t.shape[1:]) for t in state(1.0, 1.0)))
            cache.run(branches, batch, two_layers)
            line += names if cache.counts["reused"] > before else names.upper()
        told.append(line)
    return told


def test_branches_of_a_batch_are_refreshed_together_before_any_is_too_old():
    settings = SamplerSettings(steps=12, force_steps=4, cache_every=2)
    assert schedule(settings) == ["PNU", "pnu", "PNU", "pnu", *4 * ["PNU", "p"]]
    # Step 9 refreshes the prompt alone, so at step 10 null and unconditional, of step 6, are too old, and the prompt goes with them.
    three = ["PNU", "pnu", "pnu", "PNU", "pnu", "p", "PNU", "p", "pnu", "P", "PNU", "p"]
    assert schedule(replace(settings, cache_every=3)) == three
    # In batches of their own, as under `adapted_branches: conditional`, each goes by its own age.
    assert schedule(replace(settings, cache_every=3), split=True) == [*three[:10], "pNU", "p"]
    assert schedule(replace(settings, cache_every=1)) == [*4 * ["PNU"], *4 * ["PNU", "P"]]


def test_a_branch_that_never_ran_is_computed():
    settings = SamplerSettings(steps=3, text_guidance=7.5, force_steps=0, cache_every=3)
    guidance = ContinuationGuidance(None, settings, 3)  # type: ignore[arg-type]
    assert [guidance.scales(step)[0] for step in range(3)] == [7.5, 1.0, 7.5]
    cache = FeatureCache(every=3, first=0, layers=2)
    for branches, computed in ((PROMPT, 2), (ALL, 2 + 6), (PROMPT, 2 + 6)):
        cache.next_step()
        batch = Embedded(*(t.expand(len("pnu"[branches]), *t.shape[1:]) for t in state(1.0, 1.0)))
        cache.run(branches, batch, two_layers)
        assert cache.counts["computed"] == computed


class Clip:
    """A denoiser's arguments on a small network of four layers; frames 0 and 1 of 5 are known."""

    def __init__(self, length: int = 5, model: STDiT3 | None = None) -> None:
        self.model = model or tiny_dit()
        mask = torch.zeros(SHAPE)
        mask[:, :, :2] = 1
        self.condition = Condition(noise(2, *SHAPE) * mask, mask)
        self.geometry = self.model.geometry(5, SHAPE[-2:], (480, 640), (0, 1))
        self.prompt = Caption(noise(3, 1, length, 16))

    def denoiser(self, cache: FeatureCache | None, **options) -> Denoiser:
        return Denoiser(self.model, self.geometry, 24.0, self.prompt, self.condition, cache=cache, **options)

    def walk(self, cache: FeatureCache | None, guided: list[bool] = GUIDED, **options) -> list[list[Tensor]]:
        """Each step's velocities by branch, on latents and timesteps that change from step to step."""
        with torch.no_grad():
            denoiser = self.denoiser(cache, **options)
            return [
                list(denoiser(latent(step), timestep(step), all_branches=every)) for step, every in enumerate(guided)
            ]


def latent(step: int) -> Tensor:
    return noise(10, *SHAPE) + 0.2 * step * noise(11, *SHAPE)


def timestep(step: int) -> Tensor:
    return torch.tensor(900.0 - 100.0 * step)


def adapted(model: STDiT3) -> Callable[[], AbstractContextManager[None]]:
    """Change a weight of an early and one of a late layer; gives `base_weights`."""
    weights = [model.layers[at].mlp.fc2.weight.data for at in (0, 3)]
    base = [weight.clone() for weight in weights]
    changed = [weight + 0.2 * noise(20, *weight.shape) for weight in weights]

    def take(values: list[Tensor]) -> None:
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)

    @contextmanager
    def base_weights() -> Iterator[None]:
        take(base)
        yield
        take(changed)

    take(changed)
    return base_weights


@pytest.mark.parametrize("split", [False, True], ids=["all", "conditional"])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_each_branch_reuses_its_own_residual(first: int, split: bool):
    """Against each branch run alone, with the steps that compute written out."""
    clip = Clip()
    base = adapted(clip.model) if split else None
    cached = clip.walk(FeatureCache(2, first, 4), base_weights=base)
    exact = clip.walk(None, base_weights=base)
    # GUIDED guides at 0, 1, 3 and 5. Null and unconditional of step 0 serve at 1 and not at 3; those of step 3 not at 5.
    prompt_at = [0, 0, 2, 2, 4, 4] if split else [0, 0, 2, 3, 3, 5]
    rest_at = [0, 0, None, 3, None, 5]
    model, geometry = clip.model, clip.geometry
    null = model.null_caption(clip.prompt)
    without = Condition(torch.zeros_like(clip.condition.latents), clip.condition.mask)
    branches = [(clip.prompt, clip.condition, prompt_at), (null, clip.condition, rest_at), (null, without, rest_at)]
    for row, (caption, condition, computed_at) in enumerate(branches):
        with base() if base is not None and row > 0 else nullcontext():
            text, known = model.text_states(caption), model.text_states(null)
            added: list[Tensor] = []
            for step, at in enumerate(computed_at):
                embedded = model.embed(latent(step), timestep(step)[None], torch.tensor([24.0]), geometry, condition)
                start = model.run_layers(embedded, text, known, geometry, 0, first)
                added.append(model.run_layers(start, text, known, geometry, first).tokens - start.tokens)
                if at is None:
                    continue
                expected = model.head(start._replace(tokens=start.tokens + added[at]), geometry)[:, :16]
                torch.testing.assert_close(cached[step][row], expected, rtol=0, atol=5e-5)
                moved = (cached[step][row] - exact[step][row]).abs().max()
                assert moved > 1e-2 if at < step else moved == 0


@pytest.mark.parametrize(
    "kernels", ["plain", "compiled"]
)  # the kernels' own run takes half a minute under the interpreter
def test_an_interval_of_one_has_the_bits_of_no_cache(kernels: str, fresh_compiler: None):
    clip = Clip()
    if kernels == "compiled":
        use_paths(clip.model, Paths(compiled=True, compiler="aot_eager"))
    exact = clip.walk(None)
    for first in (0, 1, 3):
        cache = FeatureCache(1, first, 4)
        for found, expected in zip(clip.walk(cache), exact, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert cache.counts == {"computed": 4 * (4 * 3 + 2), "reused": 0}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_paths_reuse_alike(kernels: str, fresh_compiler: None):
    if kernels == "triton" and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("Triton needs a GPU or its interpreter")
    clip = Clip()
    plain = clip.walk(FeatureCache(2, 1, 4))
    use_paths(clip.model, Paths(kernels=kernels, compiled=kernels == "torch", compiler="aot_eager"))  # type: ignore[arg-type]
    for found, expected in zip(clip.walk(FeatureCache(2, 1, 4)), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


def test_nothing_compiles_anew_between_clips(fresh_compiler: None):
    """Two kinds of layers by batches of three and of one, whatever the caption's length and whether a step reuses."""
    model, counter = tiny_dit(), CompileCounterWithBackend("aot_eager")
    use_paths(model, Paths(compiled=True, compiler=counter))
    for length in (5, 3, 7):
        Clip(length, model).walk(FeatureCache(2, 1, 4))
        assert counter.frame_count == 4


def test_storage_stays_and_no_gradient_hangs_on_it():
    clip, cache = Clip(), FeatureCache(2, 1, 4)
    places = set()
    with torch.no_grad():
        denoiser = clip.denoiser(cache)
        for step, every in enumerate(GUIDED):
            denoiser(latent(step), timestep(step), all_branches=every)
            held = cache._residual_BND
            assert held is not None and not held.requires_grad and held.shape[0] == 3
            places.add(held.data_ptr())
    assert len(places) == 1


def run(
    method: AnyMethod, every: int, *, samples: int = 1, branches: str = "all", times: int = 1, **sampler
) -> Outcome:
    experiment = tiny_experiment()
    experiment = replace(
        experiment,
        sampler=replace(experiment.sampler, cache_every=every, **sampler),
        adaptation=replace(experiment.adaptation, adapted_branches=branches),  # type: ignore[arg-type]
        samples=samples,
    )
    adapter = method.attach(experiment.dit, 0)
    try:
        for before in range(1, times):
            continue_clip(experiment, tiny_known(experiment, f"earlier {before}"), adapter)
        return continue_clip(experiment, tiny_known(experiment), adapter)
    finally:
        adapter.detach()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("branches", ["all", "conditional"])
def test_a_clips_bits_depend_on_no_clip_before_it(name: str, branches: str):
    alone, later = (run(METHODS[name], 2, branches=branches, times=times) for times in (1, 3))
    assert torch.equal(alone.latents, later.latents)
    # Four steps, the first two and the third guide; 4 layers, of which 2 run always. Reused: all branches at step 1, the prompt at 3.
    assert alone.layers == later.layers == {"computed": 4 * 10 - 2 * 4, "reused": 2 * 4}
    exact = run(METHODS[name], 1, branches=branches)
    assert exact.layers == {} and not torch.equal(exact.latents, alone.latents)
    assert exact.made_from["sampler"] != alone.made_from["sampler"]


def test_every_sample_has_a_cache_of_its_own():
    two, one = run(NoAdaptation(), 2, samples=2), run(NoAdaptation(), 2)
    assert torch.equal(two.latents, one.latents)
    assert two.layers == {name: 2 * count for name, count in one.layers.items()}


def test_off_is_the_code_and_the_key_of_before(monkeypatch: pytest.MonkeyPatch):
    def unused(*arguments: object) -> None:
        raise AssertionError("a cache was made")

    monkeypatch.setattr(clip_module, "FeatureCache", unused)
    assert run(NoAdaptation(), 1, cache_first=1).layers == {}
    with pytest.raises(AssertionError, match="a cache was made"):
        run(NoAdaptation(), 2)
    names = [
        "steps", "text_guidance", "image_guidance", "decreasing_image_weight", "oscillate_text", "oscillate_image", "force_steps",
        "sdedit",
    ]  # fmt: skip
    assert list(SamplerSettings(cache_first=1).shaping_videos()) == names
    on = SamplerSettings(cache_every=2)
    assert on.shaping_videos() == asdict(on) and list(asdict(on)) == [*names, "cache_every", "cache_first"]


@pytest.mark.parametrize(("every", "first"), [(0, 1), (2, -1), (2, 4)])
def test_refuses_what_caches_nothing(every: int, first: int):
    with pytest.raises(ValueError, match=f"every must be at least 1 and first in 0 .. 3, were {every} and {first}"):
        FeatureCache(every, first, 4)
