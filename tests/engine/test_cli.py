import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from vidtta.engine import cli
from vidtta.engine.errors import Interrupted, UserError
from vidtta.engine.prepare.settings import Settings
from vidtta.engine.recipe import dump_recipe, load_recipe, recipe_schema
from vidtta.engine.recipe_files import list_recipes

RECIPES = [name for name, _ in list_recipes()]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """What the commands call, recorded; `calls.outcome` is returned, or raised if it is an exception."""
    record = types.SimpleNamespace(made=[], outcome=0)

    def answer(name):
        def function(*args, **kwargs):
            record.made.append((name, args, kwargs))
            if isinstance(record.outcome, BaseException):
                raise record.outcome
            return record.outcome

        return function

    for name in ("run", "fetch", "doctor"):
        module = types.ModuleType(f"vidtta.engine.{name}")
        setattr(module, name, answer(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return record


def refused(capsys, *argv):
    """The last line of an argument error, which exits with 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["recipes"], 0),
        (["--version"], 0),
        (["run", "nothing.yaml"], 2),
        (["run", "lora", "seed"], 2),
        (["run", "lora", "--batch-start", "3", "--batch-end", "3"], 2),
        (["fetch", "everything"], 2),
        (["compare"], 2),
        (["prepare", "--help"], 0),
        (["prepare", "ucf101", "--help"], 0),
        (["prepare", "ucf101", "--out", "o"], 2),
        (["prepare", "ucf101", "--source", "nothing", "--out", "o"], 2),
        (["prepare", "folder", "nothing", "--out", "o", "--frames", "9"], 2),
    ],
)
def test_help_listing_and_argument_errors_need_no_torch(argv, status):
    code = (
        "import sys\nfrom vidtta.engine.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as stop:\n    status = stop.code\n"
        "print(status or 0, sorted({'torch', 'pydantic', 'av', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"{status} []"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "vidtta.engine", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"vidtta {importlib.metadata.version('vidtta')}\n"


def test_help_names_every_command_and_an_example(capsys):
    for argv in ([], ["run"], ["recipes"], ["validate"], ["schema"], ["fetch"], ["prepare"], ["doctor"]):
        with pytest.raises(SystemExit) as caught:
            cli.main([*argv, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert "example: vidtta " + "".join(argv) in text
        if not argv:
            assert all(name in text for name in ("run", "recipes", "validate", "schema", "fetch", "prepare", "doctor"))


def test_recipes_lists_names_and_first_lines(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split(maxsplit=1)) for line in lines] == list_recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_packaged_recipes_validate(name, capsys):
    assert cli.main(["validate", f"recipes/{name}.yaml", "data.clips=DIR"]) == 0
    shown = capsys.readouterr()
    assert shown.out == dump_recipe(load_recipe(name, ["data.clips=DIR"]))
    warned = (
        ""
        if name in ("demo", "demo_base", "opensora_v13_360p") or name.endswith(".demo")
        else "warning: 640x480 lies outside the sizes v1.3 was trained at (360p, 720p)\n"
    )
    assert shown.err == warned


def test_a_mistake_is_one_sentence_without_a_traceback(capsys):
    assert cli.main(["validate", "lora"]) == 2
    shown = capsys.readouterr()
    message = "recipes/lora.yaml: data.clips: missing; write it in the recipe or give the override data.clips=..."
    assert (shown.out, shown.err) == ("", f"error: {message}\n")


def test_run_prints_the_resolved_recipe_and_hands_it_over(calls, capsys):
    calls.outcome = 1
    assert cli.main(["run", "lora", "data.clips=DIR", "method.rank=4"]) == 1
    recipe = load_recipe("lora", ["data.clips=DIR", "method.rank=4"])
    assert calls.made == [("run", (recipe,), {"batch_start": None, "batch_end": None, "quiet": False})]
    assert capsys.readouterr().out == dump_recipe(recipe) + "\n"


@pytest.mark.parametrize(
    "words",
    [
        ["data.clips=DIR", "seed=2", "--quiet", "--batch-start", "3", "--batch-end", "5"],
        ["--quiet", "--batch-start", "3", "data.clips=DIR", "--batch-end=5", "seed=2"],
        ["data.clips=DIR", "--batch-start=3", "--batch-end=5", "--quiet", "seed=2"],
    ],
    ids=["before", "between", "after"],
)
def test_overrides_and_options_stand_in_any_order(words, calls, capsys):
    assert cli.main(["run", "lora", *words]) == 0
    expected = load_recipe("lora", ["data.clips=DIR", "seed=2"])
    assert calls.made == [("run", (expected,), {"batch_start": 3, "batch_end": 5, "quiet": True})]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-start", "-1"], "vidtta run: error: --batch-start should be at least 0, was -1"),
        (["--batch-end", "0"], "vidtta run: error: --batch-end should be above --batch-start (0), was 0"),
        (
            ["--batch-start", "4", "--batch-end", "4"],
            "vidtta run: error: --batch-end should be above --batch-start (4), was 4",
        ),
        (["--batch-end", "x"], "vidtta run: error: argument --batch-end: invalid int value: 'x'"),
        (["--fast", "seed=1"], "vidtta run: error: unrecognized arguments: --fast"),
    ],
)
def test_arguments_that_are_refused(words, message, calls, capsys):
    assert refused(capsys, "run", "lora", "data.clips=DIR", *words) == message
    assert calls.made == []


def test_commands_without_overrides_take_no_extra_words(capsys):
    assert refused(capsys, "recipes", "seed=1").endswith("error: unrecognized arguments: seed=1")
    assert refused(capsys).endswith("error: the following arguments are required: COMMAND")


def test_schema_is_json(capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


def test_fetch_prints_the_paths(calls, capsys):
    calls.outcome = [Path("/cache/a"), Path("/cache/b")]
    assert cli.main(["fetch", "opensora"]) == 0
    assert calls.made == [("fetch", ("opensora",), {})]
    assert capsys.readouterr().out == "/cache/a\n/cache/b\n"


def test_prepare_hands_the_settings_over(monkeypatch):
    made = []
    run = types.SimpleNamespace(prepare=lambda *args, **options: made.append((args, options)) or 1)
    monkeypatch.setitem(sys.modules, "vidtta.engine.prepare.run", run)
    words = ["--count", "9", "--seed", "3", "--replace", "--height", "240", "--width", "424", "--fps", "30"]
    words += ["--frames", "49", "--conditioning-frames", "17", "--aspect", "pad", "--start", "middle"]
    words += ["--splits", "lists", "--workers", "5", "--quiet"]
    assert cli.main(["prepare", "ucf101", "--source", "a.rar", "--out", "o", *words]) == 1
    settings = Settings(
        count=9,
        seed=3,
        replace=True,
        height=240,
        width=424,
        fps=30.0,
        frames=49,
        conditioning_frames=17,
        aspect="pad",
        start="middle",
    )
    options = {"splits": Path("lists"), "workers": 5, "quiet": True}
    assert made.pop() == (("ucf101", Path("a.rar"), Path("o"), settings), options)
    options = {"splits": None, "workers": None, "quiet": False}
    assert cli.main(["prepare", "folder", "videos", "--out", "o"]) == 1
    assert made.pop() == (("folder", Path("videos"), Path("o"), Settings(count=None)), options)
    fetched = types.SimpleNamespace(download_ucf101=lambda folder, quiet: folder / "fetched.rar")
    monkeypatch.setitem(sys.modules, "vidtta.engine.prepare.download", fetched)
    assert cli.main(["prepare", "ucf101", "--download", "--out", "o"]) == 1
    assert made.pop() == (("ucf101", Path("o/downloads/fetched.rar"), Path("o"), Settings()), options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "error: count is 0; it must be at least 1"),
        (["--workers", "0"], "error: workers is 0; it must be at least 1"),
        (["--frames", "22"], "error: conditioning_frames is 22; it must be at least 1 and below frames (22)"),
    ],
)
def test_settings_of_prepare_that_are_refused(words, message, capsys):
    assert cli.main(["prepare", "folder", "videos", "--out", "o", *words]) == 2
    assert capsys.readouterr().err == message + "\n"


def test_doctor_gets_the_folder(calls):
    calls.outcome = 3
    assert cli.main(["doctor"]) == cli.main(["doctor", "--weights", "w"]) == 3
    assert calls.made == [("doctor", (None,), {}), ("doctor", (Path("w"),), {})]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("clips: none found; give a folder"), 2, "error: clips: none found; give a folder\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted("by SIGTERM"), 130, "interrupted by SIGTERM\n"),
    ],
)
def test_errors_end_in_one_line(error, status, line, calls, capsys):
    calls.outcome = error
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback(calls):
    calls.outcome = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["doctor"])


def test_a_closed_pipe_is_not_a_defect():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vidtta.engine", "recipes"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
