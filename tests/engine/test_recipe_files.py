import os

import pytest
from vidtta.engine.errors import UserError
from vidtta.engine.recipe_files import PACKAGED, find_recipe, list_recipes, read_layers


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder, so that messages name files as a user would."""
    monkeypatch.chdir(tmp_path)


def write(name, text):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def mistake(name, *overrides):
    with pytest.raises(UserError) as caught:
        read_layers(name, overrides)
    return str(caught.value)


def test_packaged_recipes_are_found_by_name_and_by_path():
    for name in ("lora", "lora.yaml", "recipes/lora.yaml"):
        assert find_recipe(name) == PACKAGED / "lora.yaml"
    assert read_layers("lora").name == "recipes/lora.yaml"


def test_a_file_goes_before_a_packaged_recipe():
    write("recipes/lora.yaml", "seed: 5")
    assert read_layers("recipes/lora.yaml").merged() == {"seed": 5}


@pytest.mark.parametrize("name", ["../recipes/lora", "recipes/recipes/lora.yaml", "/lora", "", "."])
def test_only_names_stand_for_packaged_recipes(name):
    with pytest.raises(UserError, match="there is no such recipe"):
        find_recipe(name)


def test_a_missing_recipe_names_the_closest():
    names = ", ".join(path.stem for path in sorted(PACKAGED.glob("*.yaml")))
    assert mistake("recipes/lorra.yaml") == (
        f"recipes/lorra.yaml: there is no such recipe (perhaps lora); packaged ones are {names}"
    )


def test_every_packaged_recipe_has_a_description_a_launch_line_and_a_page():
    recipes = dict(list_recipes())
    assert {"delta", "delta_closed_form", "full", "lora", "opensora_v13"} <= recipes.keys()
    for name, description in recipes.items():
        first, second = (PACKAGED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
        assert first == f"# {description}" and description.endswith(".")
        assert second.startswith(f"# Run: vidtta run recipes/{name}.yaml")


@pytest.mark.parametrize("name", ["delta", "delta_closed_form", "full", "lora", "opensora_v13"])
def test_every_page_names_its_recipe_and_question(name):
    page = (PACKAGED / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n\n**Question.**")
    assert f"vidtta run recipes/{name}.yaml data.clips=DIR" in page and "**Reading the result.**" in page


def test_bases_merge_in_order_over_folders():
    write("a.yaml", "seed: 1\nwindow: {fps: 8.0, total_frames: 45}\nkeep: [video, latents]")
    write("sub/b.yaml", "base: ../a.yaml\nseed: 2\nwindow: {fps: 12.0}")
    write("sub/deep/c.yaml", "base: ../b.yaml\nkeep: [adapter]")
    merged = read_layers("sub/deep/c.yaml", ["window.known_frames=17"]).merged()
    assert merged == {"seed": 2, "window": {"fps": 12.0, "total_frames": 45, "known_frames": 17}, "keep": ["adapter"]}


def test_a_base_may_be_a_packaged_recipe():
    write("mine.yaml", "base: opensora_v13.yaml\nseed: 3")
    assert read_layers("mine.yaml").merged() == read_layers("opensora_v13", ["seed=3"]).merged()


def test_another_kind_replaces_the_mapping_and_the_same_kind_merges():
    write("a.yaml", "method: {kind: lora, rank: 4, lr: 1e-3}")
    write("same.yaml", "base: a.yaml\nmethod: {kind: lora, rank: 8}")
    write("silent.yaml", "base: a.yaml\nmethod: {rank: 8}")
    write("other.yaml", "base: a.yaml\nmethod: {kind: delta}")
    assert read_layers("same.yaml").merged()["method"] == {"kind": "lora", "rank": 8, "lr": 1e-3}
    assert read_layers("silent.yaml").merged()["method"] == {"kind": "lora", "rank": 8, "lr": 1e-3}
    assert read_layers("other.yaml").merged()["method"] == {"kind": "delta"}
    overridden = read_layers("a.yaml", ["method.steps=3", "method.kind=delta"])  # in either order
    assert overridden.merged()["method"] == {"kind": "delta", "steps": 3}


def test_arms_replace_the_method_of_a_base_and_the_other_way_round():
    write("method.yaml", "method: {kind: lora}")
    write("arms.yaml", "base: method.yaml\narms: {a: {kind: full}}")
    write("back.yaml", "base: arms.yaml\nmethod: {kind: delta}")
    assert read_layers("arms.yaml").merged() == {"arms": {"a": {"kind": "full"}}}
    assert read_layers("back.yaml").merged() == {"method": {"kind": "delta"}}


def test_merging_leaves_the_layers_as_they_were_read():
    write("a.yaml", "window: {fps: 8.0}")
    layers = read_layers("a.yaml", ["window.fps=9.0"])
    assert layers.merged() == layers.merged() == {"window": {"fps": 9.0}}
    assert layers.layers[0].values == {"window": {"fps": 8.0}}


def test_a_circle_of_bases_is_refused():
    write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: sub/../a.yaml")
    os.mkdir("sub")
    message = "b.yaml: base: sub/../a.yaml leads back to a file it is the base of; end the circle"
    assert mistake("a.yaml") == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: 3", "x.yaml: base: should be the path of another recipe, was 3"),
        ("", "x.yaml: should be a mapping of settings, was empty"),
        ("- a", "x.yaml: should be a mapping of settings, was a list"),
        ("hello", "x.yaml: should be a mapping of settings, was 'hello'"),
        ("seed: 1\nseed: 2", "x.yaml: line 2: the key seed is given twice"),
    ],
)
def test_files_that_are_no_recipe(text, message):
    assert mistake(write("x.yaml", text)) == message


def test_a_mistake_in_a_base_names_the_base():
    write("bad.yaml", "seed: [1")
    assert mistake(write("x.yaml", "base: bad.yaml")).startswith("bad.yaml: line 1: expected ','")
    missing = mistake(write("y.yaml", "base: gone.yaml"))
    assert missing.startswith("y.yaml: base: gone.yaml: there is no such recipe; packaged ones are ")


def test_large_files_and_other_encodings_are_refused():
    write("big.yaml", "#" * 1_000_001)
    assert mistake("big.yaml") == "big.yaml: the file is 1000001 bytes; a recipe has at most 1 MB"
    with open("latin.yaml", "wb") as file:
        file.write("output_dir: é".encode("latin-1"))
    assert mistake("latin.yaml") == "latin.yaml: is not UTF-8 text"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed"], "override seed: should read key.sub=value, for example sampler.steps=20"),
        (["=3"], "override =3: should read key.sub=value, for example sampler.steps=20"),
        (["a..b=3"], "override a..b=3: should read key.sub=value, for example sampler.steps=20"),
        (["a=1", "a=2"], "override a=2: a is given twice; give it once"),
        (["a=1", "a.b=2"], "override a.b=2: another override gives a a value; give one of the two"),
        (["a.b=2", "a=1"], "override a=1: another override gives a key below it; give one of the two"),
        (["a=[1"], "override a=[1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_overrides_that_are_refused(overrides, message):
    assert mistake("lora", *overrides) == message


def test_override_values_are_yaml():
    overrides = ["a=1e-4", "b.c=[x, 2]", "d=no", "e=", "f=k=v", "g={kind: lora}"]
    assert read_layers("lora", overrides).layers[-1].values == {
        "a": 1e-4,
        "b": {"c": ["x", 2]},
        "d": "no",
        "e": None,
        "f": "k=v",
        "g": {"kind": "lora"},
    }
