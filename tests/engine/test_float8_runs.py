"""Float8 in a run: what a card lacks, and results that say so."""

import pytest
import torch
from vidtta.engine.errors import UserError
from vidtta.engine.models import float8 as float8_module
from vidtta.engine.models.float8 import put_float8_in_force, use_float8
from vidtta.engine.models.float8_linear import float8_linear_reference
from vidtta.engine.models.settings import ModelSettings
from vidtta.engine.models.stdit3 import STDiT3

from .tiny import tiny_dit
from .tiny_run import DELTA, FULL, one_sentence, tiny_lab

pytestmark = pytest.mark.usefixtures("quick_compiler")


def test_a_product_that_cannot_run_on_a_card_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    model = tiny_dit()

    def refuse(model: STDiT3) -> None:
        raise RuntimeError("no kernel image\nmore of it")

    monkeypatch.setattr(float8_module, "_missing", lambda settings, device: "")
    monkeypatch.setattr(float8_module, "_try_product", refuse)
    monkeypatch.setattr(STDiT3, "device", torch.device("cuda"))
    with pytest.raises(UserError) as found:
        put_float8_in_force(model, ModelSettings(float8="all"), 4)
    assert str(found.value) == (
        "model.float8 was all, which cannot run here (no kernel image); take model.float8: none"
    )
    assert model.float8 is None and not any(getattr(m, "float8", None) for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "capability", "said"),
    [
        ({}, (8, 0), "needs a card of compute capability 8.9 or more, and NAME has 8.0; take model.float8: none"),
        ({"kernels": "plain"}, (9, 0), "is a Triton kernel on a GPU, and model.kernels plain takes none; take model.kernels: auto"),
        ({"dtype": "float32"}, (9, 0), "give bfloat16 on a GPU, and model.dtype was float32; take model.dtype: bfloat16"),
        ({}, (8, 9), ""),
        ({}, (9, 0), ""),
    ],
)  # fmt: skip
def test_what_a_card_lacks(settings, capability, said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NAME")
    found = float8_module._missing(ModelSettings(float8="sampling", **settings), torch.device("cuda"))
    assert found.endswith(said) and bool(found) == bool(said) and "\n" not in found


def test_a_product_that_is_wrong_on_a_card_is_found(monkeypatch: pytest.MonkeyPatch):
    model = tiny_dit()
    use_float8(model, "sampling")
    float8_module._try_product(model)
    monkeypatch.setattr(float8_module, "float8_linear", lambda x, *rest: 1.03 * float8_linear_reference(x, *rest[:3]))
    with pytest.raises(ArithmeticError, match=r"attn\.qkv lies 0\.03 from the reference"):
        float8_module._try_product(model)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"full": FULL, "delta": DELTA}
        yield lab


def test_a_run_in_float8_says_so_and_shares_no_result_with_one_that_is_not(lab, capsys):
    assert lab.run("exact", "data.limit=1") == 0
    exact = lab.results("exact")
    for result in exact.values():
        assert "float8" not in result["settings"]["protocol"] and "float8" not in result["paths"]
        assert "quantise" not in lab.result("exact", result["arm"], "ball")["cost"]["seconds"]
    assert lab.run("exact", "data.limit=1", "model.float8=sampling") == 2
    assert 'was made under other settings (protocol.float8: was null, now "sampling")' in one_sentence(capsys)
    assert lab.run("float8", "data.limit=1", "model.float8=sampling") == 0
    rounded = lab.results("float8")
    for name, result in rounded.items():
        assert result["settings"]["protocol"]["float8"] == result["paths"]["float8"] == "sampling"
        assert result["keys"]["protocol"] != exact[name]["keys"]["protocol"]
        assert result["generated"] != exact[name]["generated"]
        assert lab.result("float8", *name.split("/"))["cost"]["seconds"]["quantise"] >= 0
        # What sampling alone rounds, adapting does not: the same losses to the bit.
        assert result["adaptation"].get("losses") == exact[name]["adaptation"].get("losses")
        assert abs(result["scores"]["psnr"]["mean"] - exact[name]["scores"]["psnr"]["mean"]) < 1
    summary = (lab.root / "float8" / "summary.csv").read_text()
    assert "float8 sampling" in summary and "float8" not in (lab.root / "exact" / "summary.csv").read_text()
    assert lab.run("float8", "data.limit=1", "model.float8=all") == 2
    assert 'protocol.float8: was "sampling", now "all"' in one_sentence(capsys)


def test_a_baseline_of_another_arithmetic_is_refused_by_its_key(lab, capsys):
    """Results put side by side by hand: the arm in float8, its baseline not."""
    from vidtta.engine.rundir import check_paired

    assert lab.run("one", "data.limit=1") == 0
    assert lab.run("two", "data.limit=1", "model.float8=all") == 0
    baseline, ours = lab.result("one", "baseline", "ball"), lab.result("two", "delta", "ball")
    with pytest.raises(ValueError, match="this result cannot be compared with that of arm baseline"):
        check_paired(baseline, ours)
    check_paired(lab.result("two", "baseline", "ball"), ours)
    from vidtta.engine import cli

    capsys.readouterr()
    assert cli.main(["compare", str(lab.root / "one"), str(lab.root / "two")]) == 2
    assert "float8" in one_sentence(capsys)
