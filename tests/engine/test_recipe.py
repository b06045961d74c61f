import json
from dataclasses import fields, is_dataclass, replace

import pytest
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.errors import UserError
from vidtta.engine.methods import METHODS
from vidtta.engine.methods.delta import Delta, DeltaClosedForm
from vidtta.engine.methods.full import FullFineTuning
from vidtta.engine.methods.lora import LoRA
from vidtta.engine.methods.none import NoAdaptation
from vidtta.engine.models.load import ModelSettings
from vidtta.engine.recipe import dump_recipe, list_recipes, load_recipe, recipe_schema, warnings
from vidtta.engine.sampler import SamplerSettings
from vidtta.engine.window import Window

HEAD = "output_dir: runs/x\ndata: {clips: DIR}\n"
NONE_KEYS = "every arm is of kind none, so nothing is adapted"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder, so that messages name files as a user would."""
    monkeypatch.chdir(tmp_path)


def load(text, *overrides, name="x.yaml"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return load_recipe(name, overrides)


def mistake(text, *overrides):
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


def method_mistake(method, *overrides):
    return mistake(f"{HEAD}method: {{kind: {method}}}", *overrides)


def test_the_smallest_recipe_has_the_defaults():
    recipe = load(HEAD + "method: {kind: lora}")
    assert recipe.window == Window() and recipe.sampler == SamplerSettings()
    assert recipe.model == ModelSettings() and recipe.adaptation == AdaptationSettings()
    assert (recipe.seed, recipe.keep, recipe.scores.lpips, recipe.prompt.aesthetic) == (0, ("video",), "required", 7.0)
    assert list(recipe.arms.items()) == [("baseline", NoAdaptation()), ("lora", LoRA())]


def test_values_become_their_types():
    recipe = load(
        HEAD
        + "keep: [latents, adapter]\nprompt: {aesthetic: null, camera_motion: pan left}\n"
        + "method: {kind: lora, lr: 1E-3, alpha: 8, betas: [0, .5], last_layers: 4, targets: [mlp.fc1]}"
    )
    assert recipe.keep == ("latents", "adapter") and recipe.prompt.aesthetic is None
    lora = recipe.arms["lora"]
    assert lora == LoRA(lr=1e-3, alpha=8.0, betas=(0.0, 0.5), last_layers=4, targets=("mlp.fc1",))
    assert isinstance(lora, LoRA) and type(lora.alpha) is float and type(lora.betas[0]) is float


def test_overrides_reach_every_level_and_create_keys():
    recipe = load(HEAD + "arms: {a: {kind: lora}}", "arms.a.rank=4", "arms.b={kind: full}", "window.fps=12", "seed=7")
    assert recipe.arms["a"] == LoRA(rank=4) and recipe.arms["b"] == FullFineTuning()
    assert recipe.window.fps == 12.0 and recipe.seed == 7


def test_the_baseline_comes_first_and_once():
    assert list(load(HEAD + "arms: {a: {kind: full}, plain: {kind: none}}").arms) == ["plain", "a"]
    assert list(load(HEAD + "method: {kind: none}").arms) == ["none"]
    assert list(load(HEAD + "arms: {a: {kind: full}}").arms) == ["baseline", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede: 1", "sede: unknown key (perhaps seed); a recipe takes adaptation, arms, base, data, diagnostics, gate, keep, method, "
         "model, output_dir, placebos, prompt, sampler, samples, scores, search, seed, window"),
        ("window: {fsp: 1}", "window.fsp: unknown key (perhaps fps); window takes fps, known_chunks, known_frames, "
         "model_frames, posterior, scored_from, total_frames"),
        ("prompt: {zzz: 1}", "prompt.zzz: unknown key; prompt takes aesthetic, camera_motion, motion"),
        ("seed: -1", "seed: should be at least 0, was -1"),
        ("seed: 1.0", "seed: should be a whole number, was 1.0"),
        ("seed: true", "seed: should be a whole number, was true"),
        ("seed: null", "seed: should be a whole number, was null"),
        ("window: {fps: '24'}", "window.fps: should be a number, was '24'"),
        ("window: {fps: true}", "window.fps: should be a number, was true"),
        ("window: {fps: .inf}", "window.fps: should be a finite number, was inf"),
        ("window: {fps: .nan}", "window.fps: should be a finite number, was nan"),
        ("sampler: {sdedit: yes}", "sampler.sdedit: should be true or false, was 'yes'"),
        ("sampler: {sdedit: 1}", "sampler.sdedit: should be true or false, was 1"),
        ("model: {vae: 3}", "model.vae: should be text, was 3"),
        ("model: {dtype: float16}", "model.dtype: should be 'bfloat16' or 'float32', was 'float16'"),
        ("window: 3", "window: should be a mapping, was 3"),
        ("window: null", "window: should be a mapping, was null"),
        ("keep: video", "keep: should be a list, was 'video'"),
        ("keep: [video, film]", "keep.1: should be 'video', 'latents' or 'adapter', was 'film'"),
        ("adaptation: {draws: few}", "adaptation.draws: should be a whole number or 'fresh', was 'few'"),
        ("adaptation: {draws: {a: 1}}", "adaptation.draws: should be a whole number or 'fresh', was {'a': 1}"),
        (f"adaptation: {{draws: {'x' * 99}}}",
         f"adaptation.draws: should be a whole number or 'fresh', was '{'x' * 56}..."),
        ("window: {known_frames: 45}", "window: known_frames must be at least 1 and below total_frames (45), was 45"),
        ("sampler: {steps: 0}", "sampler: steps must be at least 1, was 0"),
        (
            "sampler: {cache_every: 0}",
            "sampler: cache_every must be at least 1 (every layer runs at every step), was 0",
        ),
        ("sampler: {cache_every: 2.5}", "sampler.cache_every: should be a whole number, was 2.5"),
        ("seed: x\nwindow: {fps: x}\nkeep: 3", "seed: should be a whole number, was 'x' (and 2 more)"),
    ],
)  # fmt: skip
def test_mistakes_in_sections(text, message):
    assert mistake(f"{HEAD}method: {{kind: full}}\n{text}") == f"x.yaml: {message}"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lora, lrr: 1", "method.lrr: unknown key (perhaps lr); lora takes alpha, betas, cache_prefix, "
         "early_stopping, eps, ewc, gradient_clip, kind, l2, last_layers, lr, rank, schedule, start, steps, targets, warmup, "
         "weight_decay"),
        ("lora, l2: {wieght: 1}", "method.l2.wieght: unknown key (perhaps weight); l2 takes step, weight (and 1 more)"),
        ("full, ewc: {clips: A, draws: x}", "method.ewc.draws: should be a whole number, was 'x'"),
        ("full, l2: {weight: 0}", "method.l2: weight must be positive, was 0.0; for no penalty leave l2 out"),
        ("full, schedule: step", "method.schedule: should be 'constant', 'linear' or 'cosine', was 'step'"),
        ("none, lr: 1", "method.lr: unknown key; none takes kind"),
        ("lora, lr: fast", "method.lr: should be a number, was 'fast'"),
        ("lora, lr: 0", "method: lr must be positive, was 0.0"),
        ("lora, betas: [1]", "method.betas: should have 2 entries, had 1"),
        ("lora, betas: []", "method.betas: should have 2 entries, had 0"),
        ("lora, betas: [0, 0, 0]", "method.betas: should have 2 entries, had 3"),
        ("lora, betas: [0, x]", "method.betas.1: should be a number, was 'x'"),
        ("lora, last_layers: none", "method.last_layers: should be a whole number or 'all', was 'none'"),
        ("lroa", "method.kind: should be one of none, more_sampling, full, lora, delta, delta_closed_form, was 'lroa' (perhaps lora)"),
        ("3", "method.kind: should be one of none, more_sampling, full, lora, delta, delta_closed_form, was 3"),
        ("delta_closed_form, site: pre", "method.site: should be 'post' or 'mid', was 'pre'"),
        ("delta", "method: a delta needs adaptation.draws to be a number, was fresh: its features are cached for fixed draws"),
    ],
)  # fmt: skip
def test_mistakes_in_a_method(method, message):
    assert method_mistake(method) == f"x.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe needs a method (a kind: none, more_sampling, full, lora, delta, delta_closed_form) or arms"),
        ("method: {kind: lora}\narms: {a: {kind: lora}}",
         "method: method and arms are both given; give one of them (the key of one arm is arms.NAME.KEY)"),
        ("method: lora", "method: should be a mapping, was 'lora'"),
        ("method: {}", "method.kind: missing; it is one of none, more_sampling, full, lora, delta, delta_closed_form"),
        ("method: {kind: [a]}",
         "method.kind: should be one of none, more_sampling, full, lora, delta, delta_closed_form, was ['a']"),
        ("arms: {}", "arms: should name at least one arm, was empty"),
        ("arms: [a]", "arms: should be a mapping, was ['a']"),
        ("arms: {a: 3}", "arms.a: should be a mapping, was 3"),
        ("arms: {a: {rank: 3}}", "arms.a.kind: missing; it is one of none, more_sampling, full, lora, delta, delta_closed_form"),
        ("arms: {a/b: {kind: full}}",
         "arms.a/b: an arm's name becomes a folder: it should be made of letters, digits, _ and -"),
        ('arms: {"a\\n": {kind: full}}',
         "arms.a\n: an arm's name becomes a folder: it should be made of letters, digits, _ and -"),
        ("arms: {lora: {kind: lora, lora: 1, kind2: 3}}", "arms.lora.lora: unknown key (perhaps lr); lora takes alpha, betas, "
         "cache_prefix, early_stopping, eps, ewc, gradient_clip, kind, l2, last_layers, lr, rank, schedule, start, steps, targets, "
         "warmup, weight_decay (and 1 more)"),
        ("arms: {baseline: {kind: full}}", "arms.baseline: the name is kept for the arm of kind none; give another"),
        ("arms: {a: {kind: none}, b: {kind: none}}",
         "arms.b: one arm of kind none is enough, every other arm is compared with it"),
        ("arms: {a: {kind: full}, b: {kind: delta}}",
         "arms.b: a delta needs adaptation.draws to be a number, was fresh: its features are cached for fixed draws"),
    ],
)  # fmt: skip
def test_mistakes_in_arms(text, message):
    assert mistake(HEAD + text) == f"x.yaml: {message}"


def test_missing_keys_are_named_after_unknown_ones():
    assert mistake("method: {kind: full}\noutput_dir: x") == (
        "x.yaml: data.clips: missing; write it in the recipe or give the override data.clips=..."
    )
    assert mistake("method: {kind: full}\ndata: {clip: DIR}\noutput_dir: x") == (
        "x.yaml: data.clip: unknown key (perhaps clips); data takes captions, clips, height, limit, width (and 1 more)"
    )
    assert mistake("method: {kind: full}\ndata: {clips: DIR}") == (
        "x.yaml: output_dir: missing; write it in the recipe or give the override output_dir=..."
    )
    assert (
        mistake("method: {kind: full}\ndata: {clips: DIR}\noutput_dir: ''") == "x.yaml: output_dir: should not be empty"
    )


def test_a_mistake_names_where_it_was_written():
    assert method_mistake("lora", "method.lr=fast") == (
        "x.yaml: method.lr: should be a number, was 'fast' (given by the override method.lr=fast)"
    )
    assert method_mistake("lora", "seedling=1", "window.fps=x").endswith(
        "(given by the override seedling=1) (and 1 more)"
    )
    with open("base.yaml", "w", encoding="utf-8") as file:
        file.write(HEAD + "window: {fps: fast}\nmethod: {kind: full}")
    assert mistake("base: base.yaml") == "base.yaml: window.fps: should be a number, was 'fast'"
    assert mistake("base: base.yaml\nwindow: {fps: slow}") == "x.yaml: window.fps: should be a number, was 'slow'"
    assert mistake("base: base.yaml", "window.fps=x") == (
        "x.yaml: window.fps: should be a number, was 'x' (given by the override window.fps=x)"
    )


def test_a_method_override_needs_a_recipe_with_a_method():
    assert mistake(HEAD + "arms: {a: {kind: lora}}", "method.rank=4") == (
        "x.yaml: method: method and arms are both given; give one of them (the key of one arm is arms.NAME.KEY)"
    )
    assert list(load(HEAD + "arms: {a: {kind: lora}}", "method.kind=full").arms) == ["baseline", "full"]


UNREAD = [
    ("adaptation: {objective: denoise, context_latents: 3}\nmethod: {kind: full}", "adaptation.context_latents",
     "with adaptation.objective: denoise no frame conditions"),
    ("sampler: {oscillate_text: false, oscillate_image: false, force_steps: 10}\nmethod: {kind: full}", "sampler.force_steps",
     "with sampler.oscillate_text and sampler.oscillate_image off every step guides"),
    ("sampler: {cache_first: 3}\nmethod: {kind: full}", "sampler.cache_first",
     "with sampler.cache_every: 1 every layer runs at every step"),
    *((f"adaptation: {{{key}: {value}}}\nmethod: {{kind: none}}", f"adaptation.{key}", NONE_KEYS)
      for key, value in [("objective", "denoise"), ("context_latents", 2), ("timesteps", "sampler"), ("draws", 4),
                         ("adapted_branches", "conditional"), ("temporal", 0.5), ("reset", "never")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "why"), UNREAD)
def test_written_keys_that_nothing_reads_are_refused(text, key, why):
    assert mistake(HEAD + text) == f"x.yaml: {key}: nothing reads it: {why}; leave it out"


def test_every_adaptation_key_is_in_the_table_of_none():
    assert {key.split(".")[1] for _, key, why in UNREAD if why == NONE_KEYS} == {
        f.name for f in fields(AdaptationSettings)
    }


def test_an_unread_override_is_refused_and_named():
    text = HEAD + "adaptation: {objective: denoise}\nmethod: {kind: full}"
    assert mistake(text, "adaptation.context_latents=2") == (
        "x.yaml: adaptation.context_latents: nothing reads it: with adaptation.objective: denoise no frame conditions; "
        "leave it out (given by the override adaptation.context_latents=2)"
    )


def test_what_a_later_layer_switches_off_falls_back_to_its_default():
    text = HEAD + "adaptation: {context_latents: 2, draws: 16}\nmethod: {kind: delta}"
    recipe = load(text, "adaptation.objective=denoise")
    assert recipe.adaptation == AdaptationSettings(objective="denoise", draws=16)
    assert load(text, "method.kind=none").adaptation == AdaptationSettings()
    child = load("base: x.yaml\nadaptation: {objective: denoise}", name="child.yaml")
    assert child == recipe


def test_unread_keys_may_be_left_to_their_defaults():
    assert load(HEAD + "adaptation: {objective: denoise}\nmethod: {kind: full}").adaptation.context_latents == 3


def test_context_latents_must_leave_a_latent_to_predict():
    adaptation = HEAD + "method: {kind: full}\nadaptation: {context_latents: 7}"
    assert mistake(adaptation) == (
        "x.yaml: adaptation.context_latents: should be below the 7 latent frames that the window makes known, was 7; "
        "at least one must be left to predict"
    )
    assert load(adaptation.replace("7", "6")).adaptation.context_latents == 6
    short = "window: {known_frames: 5}\n"  # 2 latent frames, below the default of 3
    assert "was 3; at least one must be left" in mistake(f"{HEAD}{short}method: {{kind: full}}")
    assert load(f"{HEAD}{short}method: {{kind: none}}").window.known_latents == 2
    assert load(f"{HEAD}{short}method: {{kind: full}}\nadaptation: {{objective: denoise}}").window.known_latents == 2


def test_ranges_must_not_outnumber_the_sampling_steps():
    text = HEAD + "adaptation: {draws: 4}\nsampler: {steps: 3}\narms: {a: {kind: delta, ranges: 4}}"
    assert mistake(text) == "x.yaml: arms.a.ranges: should be at most sampler.steps (3), was 4"
    assert load(text, "sampler.steps=4").sampler.steps == 4


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_packaged_recipes_load_and_round_trip(name):
    recipe = load_recipe(f"recipes/{name}.yaml", ["data.clips=DIR"])
    assert recipe.output_dir == f"runs/{name}" and recipe.data.clips == "DIR"
    text = dump_recipe(recipe)
    assert load(text) == recipe
    assert dump_recipe(load(text)) == text


def test_the_packaged_methods():
    def adapted(name):
        recipe = load_recipe(name, ["data.clips=DIR"])
        (method,) = [m for m in recipe.arms.values() if m.kind != "none"]
        return method, recipe.adaptation

    assert adapted("full") == (FullFineTuning(steps=20, lr=1e-5), AdaptationSettings())
    assert adapted("lora") == (LoRA(rank=16, alpha=16.0, lr=1e-4, steps=20), AdaptationSettings())
    sixteen = AdaptationSettings(timesteps="sampler", draws=16)
    assert adapted("delta") == (Delta(site="pre", steps=50), sixteen)
    assert adapted("delta_closed_form") == (DeltaClosedForm(site="mid", ridge=1e-4), sixteen)


def test_the_base_is_the_published_sampling_and_the_window_of_45():
    recipe = load_recipe("opensora_v13", ["data.clips=DIR"])
    assert recipe.sampler == SamplerSettings(
        steps=30, text_guidance=7.5, image_guidance=5.0, decreasing_image_weight=True, oscillate_text=True,
        oscillate_image=True, force_steps=10, sdedit=True,
    )  # fmt: skip
    assert recipe.window == Window(total_frames=45, known_frames=22, model_frames=49, fps=24.0)
    assert (recipe.data.height, recipe.data.width) == (480, 640)
    assert recipe.model == ModelSettings() and recipe.prompt.aesthetic == 7.0 and recipe.prompt.motion is None


def test_a_packaged_recipe_asks_for_its_clips():
    with pytest.raises(UserError) as caught:
        load_recipe("lora")
    assert str(caught.value) == (
        "recipes/lora.yaml: data.clips: missing; write it in the recipe or give the override data.clips=..."
    )


@pytest.mark.parametrize(
    "text",
    [
        "adaptation: {objective: denoise}\nmethod: {kind: full}",
        "sampler: {text_guidance: 1, oscillate_text: false, oscillate_image: false}\nmethod: {kind: none}",
        "arms: {none: {kind: none}, '1': {kind: lora, betas: [0, 0.1], lr: 1e-7}, 'no': {kind: full}}",
        "model: {dit: 'yes', vae: '1e-4', text: \"a\\tb: #\"}\nprompt: {aesthetic: null}\nkeep: []\nmethod: {kind: full}",
    ],
)
def test_dumps_load_again_to_an_equal_recipe(text):
    recipe = load(HEAD + text)
    assert load(dump_recipe(recipe)) == recipe


def test_a_dump_leaves_out_what_nothing_reads():
    text = dump_recipe(load(HEAD + "adaptation: {objective: denoise}\nmethod: {kind: full}"))
    assert "context_latents" not in text and "draws: fresh" in text
    assert "adaptation" not in dump_recipe(load(HEAD + "method: {kind: none}"))
    assert "  full:\n    kind: full\n" in text and "    steps: 20\n" in text


def test_warnings_name_untrained_sizes_and_lengths():
    recipe = load(HEAD + "method: {kind: none}\nwindow: {model_frames: 45}")
    size = "640x480 lies outside the sizes v1.3 was trained at (360p, 720p)"
    assert warnings(recipe) == [size, "45 frames (14 latents) is a length v1.3 was not trained at"]
    assert warnings(replace(recipe, window=Window())) == [size]
    wide = replace(recipe.data, height=720, width=1280)
    assert warnings(replace(recipe, data=wide, window=Window())) == []
    for dit in ("embedded", "embedded:trained"):
        assert warnings(replace(recipe, model=ModelSettings(dit=dit))) == []


def objects(schema):
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


def test_the_schema_is_closed_described_and_knows_the_kinds():
    schema = recipe_schema()
    assert json.loads(json.dumps(schema)) == schema
    found = list(objects(schema))
    assert len(found) == 4 + len(
        schema["$defs"]
    )  # the recipe, its arms, its gates, a search's grid, each section and method
    open_keys = [one for one in found if one["additionalProperties"] is not False]
    assert (
        len(open_keys) == 1 and open_keys[0] is schema["$defs"]["Search"]["properties"]["grid"]
    )  # its keys are a method's
    assert set(schema["properties"]) == {
        "base", "method", "output_dir", "placebos", "seed", "model", "data", "window", "prompt", "sampler", "adaptation", "arms",
        "diagnostics", "gate", "samples", "scores", "search", "keep",
    }  # fmt: skip
    undescribed = [
        (name, key)
        for name, definition in {"Recipe": schema, **schema["$defs"]}.items()
        for key, value in definition["properties"].items()
        if key != "kind" and not value.get("description")
    ]
    assert undescribed == []
    for kind, method in METHODS.items():
        definition = schema["$defs"][method.__name__]
        assert definition["properties"]["kind"]["const"] == kind and definition["required"] == ["kind"]
        assert set(definition["properties"]) == {field.name for field in fields(method)}
    (named,) = schema["properties"]["arms"]["patternProperties"].values()
    assert (
        set(named["discriminator"]["mapping"])
        == set(METHODS)
        == set(schema["properties"]["method"]["discriminator"]["mapping"])
    )


def test_an_inherited_key_keeps_the_description_of_its_own_class():
    definitions = recipe_schema()["$defs"]
    steps = definitions["LoRA"]["properties"]["steps"]
    assert steps["description"] == "Gradient steps a clip."
    clip = definitions["Delta"]["properties"]["gradient_clip"]["description"]
    assert clip == "Largest L2 norm of the gradient; 0 switches clipping off."


def test_sections_are_frozen():
    recipe = load(HEAD + "method: {kind: full}")
    sections = [recipe, *(value for value in vars(recipe).values() if is_dataclass(value)), recipe.arms["full"]]
    assert len(sections) == 10
    for section in sections:
        with pytest.raises(AttributeError):
            setattr(section, fields(section)[0].name, 1)
