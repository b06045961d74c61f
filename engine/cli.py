"""The command line. torch is imported only once a command has work for it."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from .errors import Interrupted, UserError
from .fetch import What
from .prepare.command import add_arguments as add_prepare_arguments
from .recipe_files import list_recipes, read_layers

if TYPE_CHECKING:
    from .recipe import Recipe

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a user's mistake, 130 when interrupted, or what the run gives."""
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        status = args.command(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"interrupted {error}".rstrip(), file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again while it exits
        return 1


def _run(args: argparse.Namespace) -> int:
    recipe = _load(args)
    from .recipe import dump_recipe

    if not args.quiet:
        print(dump_recipe(recipe), flush=True)
    from .run import run

    return run(recipe, batch_start=args.batch_start, batch_end=args.batch_end, quiet=args.quiet)


def _validate(args: argparse.Namespace) -> int:
    recipe = _load(args)
    from .recipe import dump_recipe, warnings

    print(dump_recipe(recipe), end="")
    for warning in warnings(recipe):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    recipes = list_recipes()
    width = max(len(name) for name, _ in recipes)
    for name, description in recipes:
        print(f"{name:{width}}  {description}")
    return 0


def _schema(args: argparse.Namespace) -> int:
    import json

    from .recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from .compare import compare

    return compare(args.runs)


def _decide(args: argparse.Namespace) -> int:
    from .decide import decide

    return decide(args.run, args.thresholds)


def _adaptive(args: argparse.Namespace) -> int:
    from .adaptive import adaptive

    return adaptive(args.run, args.arm, args.out)


def _fetch(args: argparse.Namespace) -> int:
    from .fetch import fetch

    for path in fetch(args.what):
        print(path)
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from .prepare.command import prepare_command

    return prepare_command(args)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(args.weights)


def _load(args: argparse.Namespace) -> "Recipe":
    read_layers(args.recipe, args.overrides)  # mistakes in the YAML are told at once: torch takes two seconds to import
    from .recipe import load_recipe

    return load_recipe(args.recipe, args.overrides)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on overrides that stand after an option: `run x.yaml --quiet seed=1`.
    late = [word for word in rest if not word.startswith("-")] if hasattr(args, "overrides") else []
    if len(late) < len(rest):
        commands[args.name].error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late)}")
    if late:
        args.overrides = [*args.overrides, *late]
    if args.name == "run":
        _check_batch(args, commands["run"])
    return args


def _check_batch(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    start, end = args.batch_start or 0, args.batch_end
    if start < 0:
        parser.error(f"--batch-start should be at least 0, was {start}")
    if end is not None and end <= start:
        parser.error(f"--batch-end should be above --batch-start ({start}), was {end}")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="vidtta",
        description="Adapt a video generator to each clip it is shown, then let it continue the clip.",
        epilog="example: vidtta run recipes/lora.yaml data.clips=DIR method.steps=4",
    )
    parser.add_argument("--version", action="version", version=f"vidtta {importlib.metadata.version('vidtta')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name", required=True)
    made: dict[str, argparse.ArgumentParser] = {}

    def command(
        name: str, action: Callable[[argparse.Namespace], int], help: str, example: str
    ) -> argparse.ArgumentParser:
        made[name] = commands.add_parser(name, help=help, description=help, epilog=f"example: vidtta {name}{example}")
        made[name].set_defaults(command=action)
        return made[name]

    run = command(
        "run", _run, "Run a recipe: adapt, continue and score every clip.", " recipes/lora.yaml data.clips=DIR"
    )
    _add_recipe(run)
    run.add_argument("--batch-start", type=int, metavar="N", help="first clip in list order, counted from 0")
    run.add_argument("--batch-end", type=int, metavar="M", help="the clip after the last one")
    run.add_argument("--quiet", action="store_true", help="print neither the resolved recipe nor progress")
    validate = command(
        "validate",
        _validate,
        "Check a recipe and print it resolved.",
        " recipes/lora.yaml data.clips=DIR method.rank=4",
    )
    _add_recipe(validate)
    command("recipes", _recipes, "List the packaged recipes.", "")
    command("schema", _schema, "Print the JSON schema of a recipe, for editors.", " > recipe.schema.json")
    compare = command(
        "compare", _compare, "Compare the arms of runs with their baseline, with intervals.", " runs/lora runs/delta"
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the output_dir of a run")
    decide = command("decide", _decide, "Say which outcome each arm of a run has, and what to run next.", " runs/full")
    decide.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    decide.add_argument(
        "thresholds",
        metavar="key=value",
        nargs="*",
        help="metric, smallest, win_rate or mixed_share (see engine/decide.py)",
    )
    adaptive = command(
        "adaptive",
        _adaptive,
        "Foresee which clips gain, and what adapting only those would give.",
        " runs/lora --arm lora",
    )
    adaptive.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    adaptive.add_argument("--arm", required=True, help="the arm whose benefit is foreseen")
    adaptive.add_argument("--out", type=Path, metavar="FILE", help="write the predictor there, as JSON")
    fetch = command("fetch", _fetch, "Download published weights into the caches that runs read.", " opensora")
    fetch.add_argument("what", choices=get_args(What), help="which weights")
    prepare = command(
        "prepare",
        _prepare,
        "Make clips of one size, rate and length from UCF-101 or any folder of videos.",
        " ucf101 --source UCF101.rar --out data/ucf101",
    )
    add_prepare_arguments(prepare)
    doctor = command("doctor", _doctor, "Report what this machine can run, and why not the rest.", " --weights DIR")
    doctor.add_argument("--weights", type=Path, metavar="DIR", help="a folder of weights to check too")
    return parser, made


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="replace a setting; the value is read as YAML"
    )
