"""Which path computes what: what a recipe leaves open, how the fastest is found, and that a run keeps to it."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from vidtta.engine import choices as choices_module
from vidtta.engine import choose, measure_paths, path_table
from vidtta.engine.choices import TORCHS_OWN, WORKS, Choices, Way, allowed_ways, describe_choices, put_in_force
from vidtta.engine.cluster.attempts import MEMORY
from vidtta.engine.errors import UserError
from vidtta.engine.methods import Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from vidtta.engine.models.paths import Paths, PathsByWork, use_paths
from vidtta.engine.models.settings import ModelSettings
from vidtta.engine.models.stdit3 import Layer
from vidtta.kernels import delta_features
from vidtta.kernels.attention import BACKENDS, Choice
from vidtta.kernels.common import INTERPRETED

from .test_machine_faults import failing
from .tiny import tiny_experiment, tiny_task
from .tiny_run import CLIPS, one_sentence, tiny_lab

ROOT = Path(__file__).resolve().parents[2]
LORA = {"kind": "lora", "steps": 2, "rank": 4}
interpreted = pytest.mark.skipif(torch.cuda.is_available() or not INTERPRETED, reason="for Triton's interpreter alone")


pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"lora": LORA}
        yield lab


@pytest.fixture(scope="module")
def plain(lab):
    assert lab.run("plain") == 0
    return lab.results("plain")


@pytest.fixture
def plain_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder stays on the plain path, whatever is chosen."""
    for module in (choices_module, measure_paths):
        monkeypatch.setattr(module, "use_vae_way", lambda vae, way: None)


@pytest.mark.parametrize(
    ("kernels", "compile_", "gpu", "training", "sampling", "vae"),
    [
        ("auto", "auto", False, "plain", "plain", "plain"),
        ("auto", "all", False, "compile", "compile", "compile"),
        ("auto", "auto", True, "plain|compile|triton|triton + compile", "plain|compile|triton|triton + compile",
         "plain|compile|triton"),
        ("auto", "none", True, "plain|triton", "plain|triton", "plain|triton"),
        ("auto", "training", True, "compile|triton + compile", "plain|triton", "plain|triton"),
        ("plain", "auto", True, "plain", "plain", "plain"),
        ("compile", "auto", False, "compile", "compile", "compile"),
        ("compile", "training", True, "compile", "plain", "plain"),
        ("triton", "auto", True, "triton|triton + compile", "triton|triton + compile", "triton"),
        ("triton", "training", True, "triton + compile", "triton", "triton"),
        ("triton", "none", True, "triton", "triton", "triton"),
    ],
)  # fmt: skip
def test_what_a_recipe_leaves_open(kernels, compile_, gpu, training, sampling, vae):
    settings = ModelSettings(kernels=kernels, compile=compile_)
    found = {work: "|".join(allowed_ways(settings, work, gpu)) for work in WORKS}
    assert found == {"training": training, "features": sampling, "sampling": sampling, "vae": vae}


def test_contradictions_and_what_a_cpu_cannot_do_are_one_sentence(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="compile must be auto or none where kernels is plain, was all"):
        ModelSettings(kernels="plain", compile="all")
    with pytest.raises(ValueError, match="compile must not be none"):
        ModelSettings(kernels="compile", compile="none")
    monkeypatch.setattr(choices_module, "INTERPRETED", False)
    with pytest.raises(UserError, match=r"model\.kernels was triton, which needs a GPU"):
        allowed_ways(ModelSettings(kernels="triton"), "vae", False)
    monkeypatch.setattr(choices_module, "INTERPRETED", True)
    with pytest.raises(UserError, match="cannot be compiled around"):
        allowed_ways(ModelSettings(kernels="triton", compile="all"), "vae", False)


def test_the_attention_key_names_every_back_end():
    assert get_args(get_type_hints(ModelSettings)["attention"]) == ("auto", "torch", *BACKENDS)


def test_choices_survive_json():
    measured = Choice({"1x2x2x3x4": "cudnn"}, {"1x2x2x3x4": "flash"})
    one = Choices(training="triton + compile", sampling="triton", attention=measured, cross="flash", why={"vae": "a"})
    for value in (one, Choices(), Choices(training=None, attention=Choice(pinned="efficient"))):
        assert Choices.from_json(json.loads(json.dumps(value.to_json()))) == value
    assert Choices.from_json({"training": "plain"}) is None
    assert Choices.from_json(one.to_json() | {"vae": "quick"}) is None
    assert Choices.from_json(one.to_json() | {"attention": {"pinned": "quick", "cross": None}}) is None
    assert "attention cudnn+flash; lora: one product" in describe_choices(one.to_json(), {"lora": "one product"})


def test_which_kinds_of_work_matter_to_a_run():
    assert choose.works_of([NoAdaptation()], diagnostics=False) == ("sampling", "vae")
    assert choose.works_of([NoAdaptation(), FullFineTuning()], diagnostics=False) == ("training", "sampling", "vae")
    assert choose.works_of([Delta()], diagnostics=False) == ("features", "sampling", "vae")
    assert choose.works_of([DeltaClosedForm(), LoRA()], diagnostics=False) == WORKS
    assert choose.works_of([LoRA(cache_prefix=True, last_layers=2)], diagnostics=False) == WORKS
    assert choose.works_of([LoRA()], diagnostics=True) == WORKS


def test_ways_are_measured_against_the_plain_path_and_what_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch):
    experiment = tiny_experiment()
    for work in ("training", "sampling"):
        rows = measure_paths.measure_ways(experiment, work, ("plain", "compile"), None, None, LoRA(rank=4))
        assert [row["way"] for row in rows] == ["plain", "compile"]
        assert all(row["milliseconds"] > 0 and row["distance"] < 1e-5 for row in rows), rows
    forward = Layer.forward

    def off(self: Layer, *inputs: Any) -> torch.Tensor:
        return forward(self, *inputs) * (1.01 if torch.compiler.is_compiling() else 1.0)

    monkeypatch.setattr(Layer, "forward", off)
    (row,) = measure_paths.measure_ways(experiment, "features", ("compile",), None, None, LoRA())
    assert "from the plain path, allowed 0.001" in row["refused"] and "milliseconds" not in row
    settings = ModelSettings(kernels="compile")
    with pytest.raises(UserError, match=r"model\.kernels was compile .* cannot run here for features \(compile: Arith"):
        choose._pick(settings, "features", ("compile",), [row])
    assert experiment.dit.paths is None and not experiment.vae.fast


def test_what_the_table_names_is_tried_and_where_it_is_wrong_all_are_measured(monkeypatch: pytest.MonkeyPatch):
    experiment, said, broken = tiny_experiment(), [], []

    def measured(experiment: Any, work: Any, ways: Any, *rest: Any) -> list[dict[str, Any]]:
        times = {"plain": 3.0, "triton": 2.0, "compile": 1.0}
        rows = [{"work": work, "way": way, "milliseconds": times.get(way, 9.0)} for way in ways if way not in broken]
        return rows + [{"work": work, "way": way, "refused": "far off"} for way in ways if way in broken]

    monkeypatch.setattr(choose, "measure_ways", measured)
    monkeypatch.setattr(choose, "fastest_known", lambda experiment, work, ways: ("triton", "fastest in a bench"))
    monkeypatch.setattr(choose, "allowed_ways", lambda settings, work, gpu: ("plain", "compile", "triton"))
    arguments = (Choices(training=None, features=None, sampling=None, vae=None, why={"attention": ""}), ModelSettings())
    found, rows = choose._complete(*arguments, experiment, WORKS, LoRA(), said.append)
    assert {found.way(work) for work in WORKS} == {"triton"} and set(found.why.values()) == {"", "fastest in a bench"}
    assert len(rows) == 4 and said[0] == "trying triton for training, fastest in a bench"
    broken.append("triton")
    found, rows = choose._complete(*arguments, experiment, ("sampling", "vae"), LoRA(), said.append)
    assert (found.training, found.features, found.sampling, found.vae) == (None, "compile", "compile", "compile")
    assert found.why["vae"] == "measured here, fastest" and len(rows) == 8
    assert found.why["features"] == "as sampling, nothing is fitted there"
    monkeypatch.setattr(choose, "fastest_known", lambda *_: ("plain", "fastest in a bench"))
    measured_attention = replace(arguments[0], attention=Choice({"a": "flash"}), cross="flash")
    found, _ = choose._complete(measured_attention, ModelSettings(), experiment, WORKS, LoRA(), said.append)
    assert (
        found.attention is None and found.shaping_videos() is None and "all layers are plain" in found.why["attention"]
    )


def test_the_fastest_that_ran_is_taken():
    rows = [{"way": way, "milliseconds": ms} for way, ms in (("plain", 3.0), ("triton", 2.0))]
    rows.append({"way": "compile", "refused": "no"})
    ways: tuple[Way, ...] = ("plain", "compile", "triton")
    assert choose._pick(ModelSettings(), "sampling", ways, rows) == "triton"
    assert choose._pick(ModelSettings(), "sampling", ("plain", "compile"), rows) == "plain"


def test_the_shipped_table_is_the_benches_results(monkeypatch: pytest.MonkeyPatch):
    made = json.loads(path_table.TABLE.read_text())
    files = [ROOT / name for row in made for name in row["from"]]
    assert sorted((ROOT / "bench" / "results").glob("steps-*.json")) == files
    assert made == path_table.make_table(files), (path_table.__doc__ or "").splitlines()[2]
    experiment, every = tiny_experiment(), ("plain", "compile", "triton", "triton + compile")
    assert path_table.fastest_known(experiment, "sampling", every) is None
    row, config = made[0], experiment.dit.config
    monkeypatch.setattr(path_table, "device_name", lambda device: row["device"])
    own = {
        "network": [config.depth, config.hidden_size, config.num_heads],
        "dtype": "float32",
        "size": [16, 32],
    }
    monkeypatch.setattr(path_table.json, "loads", lambda text: [row | own])
    for work in WORKS:
        times = row["milliseconds"][work]
        ways = tuple(times)
        found = path_table.fastest_known(experiment, work, ways)
        assert found and times[found[0]] <= 1.03 * min(times.values()) and row["from"][0] in found[1]
        assert "compile" not in found[0]  # none of these gains what compiling costs
    row["milliseconds"]["training"].pop("triton")  # a way on the kernels that nobody timed
    assert path_table.fastest_known(experiment, "training", every) is None


def test_paths_follow_the_work(monkeypatch: pytest.MonkeyPatch):
    experiment, ran = tiny_experiment(), []
    model = experiment.dit
    put_in_force(Choices(training="compile"), model, experiment.vae, features_tokens=42, strict=False)
    assert isinstance(model.paths, PathsByWork) and not experiment.vae.fast
    assert (model.paths.features, model.paths.sampling, model.paths.methods) == (None, None, "fused")
    for name in ("training", "features", "sampling"):
        path = Paths()
        monkeypatch.setattr(Paths, "prepare", lambda self, *rest: ran.append(self) or Layer.__call__)
        use_paths(
            model,
            replace(model.paths, **{"training": None, "features": None, "sampling": None, name: path}),
        )
        ran.clear()
        task = tiny_task(model)  # 42 tokens
        if name == "training":
            task.loss(task.draw(0))
        else:
            use_paths(model, replace(model.paths, features_tokens=42 if name == "features" else 41))
            with torch.no_grad():
                task.loss(task.draw(0))
        assert ran == [path], name


def test_clips_of_five_caption_lengths_compile_nothing_anew(lab, monkeypatch: pytest.MonkeyPatch):
    """The count is in each result; the paths are in the results, in choices.json and in the summary. Memory runs out on one clip, which is
    tried again on the same path."""
    rows = [f"clip{n},{lab.root}/clips/ball.mp4,{' '.join(['word'] * n)}" for n in range(2, 7)]
    (lab.root / "lengths.csv").write_text("\n".join(["id,path,caption", *rows]) + "\n")
    sections = {"data": {**lab.settings["data"], "clips": str(lab.root / "lengths.csv")}, "prompt": {"aesthetic": None}}
    assert lab.run("slow", "data.limit=1", **sections) == 0
    calls = failing(monkeypatch, torch.OutOfMemoryError("no"), 1, clip="clip4")
    assert lab.run("lengths", "model.kernels=compile", **sections) == 0
    assert calls == [False, True]
    fast = lab.results("lengths")
    lengths = {r["made_from"]["caption"] for r in fast.values()}
    assert len(fast) == 10 and len(lengths) == 5
    for arm in ("baseline", "lora"):
        costs = [lab.result("lengths", arm, f"clip{n}")["cost"] for n in range(2, 7)]
        assert [cost["graphs"] for cost in costs[1:]] == [0] * 4, costs
        assert (costs[0]["graphs"] > 0) == (arm == "lora")  # the baseline's were made when the path was tried
        assert not any(cost["graph_breaks"] for cost in costs)
    for result in fast.values():
        assert result["paths"]["why"]["sampling"] == "the recipe" and result["paths"]["vae"] == "compile"
    for name, slow in lab.results("slow").items():
        assert fast[name]["scores"]["psnr"]["mean"] == pytest.approx(slow["scores"]["psnr"]["mean"], rel=1e-4)
        assert fast[name]["keys"]["protocol"] != slow["keys"]["protocol"]
    assert {name: result["retries"] for name, result in fast.items() if result["retries"]} == {"lora/clip4": [MEMORY]}
    assert fast["lora/clip2"]["adaptation"]["ways"]["lora"] == "one product"
    with (lab.root / "lengths" / "summary.csv").open(newline="") as handle:
        table = [row for row in csv.DictReader(handle) if row["arm"] == "lora"]
    assert "sampling compile" in table[0]["paths"] and [row["graphs"] for row in table][1:] == ["0"] * 4
    held = lab.read("lengths", "choices.json")
    assert {row["work"] for row in held.pop("measured")} == set(WORKS) - {"features"}
    assert held == lab.result("lengths", "lora", "clip2")["paths"]


def test_another_path_on_resume_is_refused(lab, plain, capsys):
    assert lab.run("plain", "model.attention=flash") == 2
    assert "was made under other settings (protocol.paths: was null, now {" in one_sentence(capsys)
    assert lab.read("plain", "choices.json")["attention"] == TORCHS_OWN  # a refused run changes nothing
    assert lab.run("plain", "model.kernels=plain") == 0  # what auto had chosen


def test_the_first_of_several_tasks_chooses_for_all(lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    settings, experiment = ModelSettings(kernels="compile"), tiny_experiment()
    calls: list[str] = []

    def measured(experiment: Any, work: Any, ways: Any, *rest: Any) -> list[dict[str, Any]]:
        calls.append(work)
        return [{"work": work, "way": way, "milliseconds": 1.0} for way in ways]

    def chosen(**more: Any) -> Choices:
        return choose.choose_paths(
            more.get("settings", settings), experiment, tmp_path, methods=[NoAdaptation()], diagnostics=False,
            describe=lambda c: {"device": "cpu (here)", **c.to_json()},
        )  # fmt: skip

    monkeypatch.setattr(choose, "measure_ways", measured)
    first = chosen()
    assert calls == ["sampling", "vae"] and (first.training, first.features) == (None, "compile")
    assert chosen() == first and len(calls) == 2  # read, not measured
    path = tmp_path / "choices.json"
    held = json.loads(path.read_text())
    path.unlink()

    def late(experiment: Any, work: Any, ways: Any, *rest: Any) -> list[dict[str, Any]]:
        path.write_text(json.dumps(held | {"why": held["why"] | {"vae": "another task"}}))
        return measured(experiment, work, ways)

    monkeypatch.setattr(choose, "measure_ways", late)
    assert chosen().why["vae"] == "another task"  # it was first, so its choices hold here too
    path.write_text("{")
    monkeypatch.setattr(choose, "measure_ways", measured)
    assert chosen() == first and Choices.from_json(json.loads(path.read_text())) == first  # damaged: chosen again
    path.write_text(json.dumps(held | {"device": "NVIDIA H100"}))
    calls.clear()
    assert chosen() == first and calls  # of another kind of device
    path.write_text(json.dumps(held | {"deterministic": not torch.are_deterministic_algorithms_enabled()}))
    calls.clear()
    assert chosen() == first and calls  # attention may have been chosen otherwise
    assert chosen(settings=ModelSettings()) == Choices(
        training="plain", features="plain", sampling="plain", vae="plain", why=chosen(settings=ModelSettings()).why
    )


def test_attention_is_pinned_or_refused_by_name(lab, capsys):
    assert lab.run("flash", "model.attention=flash", "data.limit=1") == 0
    result = lab.result("flash", "lora", "ball")
    assert result["paths"]["attention"]["pinned"] == "flash" and result["paths"]["sampling"] == "plain"
    assert result["adaptation"]["ways"]["lora"] == "three products"
    assert result["settings"]["protocol"]["paths"]["attention"] == "flash"
    assert lab.run("cudnn", "model.attention=cudnn", "data.limit=1") == 2
    assert "model.attention was cudnn, which does not run here at shape " in one_sentence(capsys)


def test_attention_is_measured_at_every_shape_of_a_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "MEASURED", ("flash", "math", "cudnn"))
    experiment = tiny_experiment()
    found, cross, why, rows = choose._attention(ModelSettings(), experiment, WORKS, True, lambda text: None)
    assert found is not None and "measured" in why and cross is None
    for shape, grad in choose.shapes_of(experiment, WORKS):
        assert found.backend(shape, grad) in ("flash", "math")
    assert all("refused" in row for row in rows if row["backend"] == "cudnn")
    monkeypatch.setattr(choose, "MEASURED", ("cudnn",))
    found, _, why, _ = choose._attention(ModelSettings(), experiment, WORKS, True, lambda text: None)
    assert found is None and why.startswith("torch's choice, as none of cudnn runs at ")


def test_what_a_recipe_has_computed_again_is_in_force_for_training_on_the_kernels_alone(lab, capsys):
    experiment = tiny_experiment()
    for way, wanted in (("triton", ("rotation", "hidden")), ("compile", ())):
        choices = Choices(training=way, features="plain", sampling="triton", vae="plain")
        put_in_force(
            choices, experiment.dit, experiment.vae, features_tokens=42, strict=False, remade=("rotation", "hidden")
        )
        paths = experiment.dit.paths
        assert paths.training.remade == wanted and paths.sampling.remade == ()
        adapter = LoRA(rank=2).attach(experiment.dit, 0)
        assert adapter.ways.get("computed again") == (" and ".join(wanted) or None)
        adapter.detach()
        use_paths(experiment.dit, None)
    assert lab.run("plain ways", "model.kernels=plain", "model.remade=[hidden]", arms={"lora": LORA}) == 2
    assert "remade must be empty where kernels is plain" in one_sentence(capsys)
    assert lab.run("both", "model.remade=[hidden,half_hidden]", arms={"lora": LORA}) == 2
    assert "remade must have one of hidden and half_hidden" in one_sentence(capsys)


@interpreted
def test_the_kernels_run_a_recipe(lab, plain, plain_vae, capsys, monkeypatch):
    """Layers, LoRA and the delta; the VAE's kernels take a minute a clip under the interpreter."""
    monkeypatch.setattr(delta_features, "BLOCK_N", 16)  # and so does a token at a time
    monkeypatch.setattr(delta_features, "PROGRAMS", 3)
    arms = {"lora": LORA, "delta": {"kind": "delta", "steps": 3, "lr": 0.1}}
    words = ("model.kernels=triton", "data.limit=1")
    assert lab.run("triton", *words, arms=arms) == 0
    results = lab.results("triton")
    assert results["lora/ball"]["paths"]["training"] == "triton"
    assert results["delta/ball"]["adaptation"]["ways"] == {
        "features": "launched",
        "fit on cached features": "Triton kernels, all steps on the device",
    }
    assert len(results["delta/ball"]["adaptation"]["losses"]) == 3
    for arm in ("baseline", "lora"):
        new, old = (found[f"{arm}/ball"]["scores"]["psnr"]["mean"] for found in (results, plain))
        assert math.isclose(new, old, rel_tol=1e-4)
    arms["delta"] = {"kind": "delta", "steps": 3, "early_stopping": {}}
    assert lab.run("strict", *words, arms=arms) == 2
    assert one_sentence(capsys) == (
        "error: arm delta: the delta's kernels do not take early_stopping; take model.kernels: auto, which records this, or plain"
    )


def test_what_was_plain_stays_so_to_the_bit(lab, plain):
    assert set(plain) == {f"{arm}/{clip}" for arm in ("baseline", "lora") for clip in CLIPS}
    for result in plain.values():
        assert "paths" not in result["settings"] and "paths" not in result["settings"]["protocol"]
