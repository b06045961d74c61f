"""Every packaged recipe's small variant runs on the embedded default: one clip, two steps, all arms finished."""

from pathlib import Path

import pytest
import torch
from vidtta.engine import cli
from vidtta.engine.recipe import load_recipe
from vidtta.engine.recipe_files import PACKAGED, list_recipes
from vidtta.engine.rundir import read_json

from .tiny_run import WINDOW

DEMOS = [name for name, _ in list_recipes() if name.endswith(".demo")]


def test_every_numbered_recipe_has_a_page_and_a_small_variant():
    numbered = [name for name, _ in list_recipes() if name[:2].isdigit() and not name.endswith(".demo")]
    assert len(numbered) >= 10
    for name in numbered:
        assert f"{name}.demo" in DEMOS
        page = (PACKAGED / f"{name}.md").read_text(encoding="utf-8")
        assert all(part in page for part in ("**Question.**", "**Keys worth turning.**", "**Cost.**", "**Reading"))


@pytest.mark.parametrize("name", DEMOS)
def test_small_variants_run(name, tmp_path, monkeypatch):
    """Smaller still than they are: 48x32 pixels, 2 sampling steps, and 2 steps for every gradient method. Where a recipe has no window
    of its own it is a short one, but for one recipe, that of all methods."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    recipe = load_recipe(name)
    clips = 2 if recipe.placebos else 1
    words = [f"data.limit={clips}", "data.height=32", "data.width=48", "sampler.steps=2", "keep=[]", "output_dir=out"]
    if name != "08_method_comparison.demo" and recipe.window == load_recipe("demo").window:
        words += [f"window.{key}={value}" for key, value in WINDOW.items()] + ["adaptation.context_latents=2"]
    for arm, method in recipe.arms.items():
        searched = recipe.search is not None and recipe.search.arm == arm
        if hasattr(method, "steps") and not searched:
            words.append(f"arms.{arm}.steps=2")
    if recipe.search:
        words += ["search.grid={steps: [1, 2], lr: [1e-4]}", "search.confirm_limit=1"]
    words += ["diagnostics.every=2"] if recipe.diagnostics.every else []
    words += ["adaptation.draws=2"] if not any(getattr(m, "ranges", 1) > 1 for m in recipe.arms.values()) else []
    try:
        assert cli.main(["run", name, "--quiet", "model.device=cpu", *words]) == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)
    results = [read_json(path) for path in Path("out/arms").glob("*/clips/*/result.json")]
    assert len(results) >= 2 * clips
    adapted = [result for result in results if result and result["adaptation"]["steps"]]
    assert adapted and all(
        result["adaptation"]["change"]["changed"] or result["adaptation"]["kept_step"] == 0 for result in adapted
    )
