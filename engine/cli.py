"""The command line. torch is imported only once a command has work for it."""

import argparse
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from .cluster.options import add_submit_arguments
from .errors import Interrupted, MachineFailed, UserError
from .fetch import What
from .prepare.command import add_arguments as add_prepare_arguments
from .recipe_files import list_recipes, read_layers
from .stop import listen_for_out_of_time

if TYPE_CHECKING:
    from .recipe import Recipe

EXIT_CRASHED = 70
"""EX_SOFTWARE of sysexits.h: an error of vidtta itself. Python's own 1 is a run's `some clips failed`."""


def entry() -> None:
    """`vidtta` as a program: `main`, an exit status of its own for what it does not foresee, and an end that nothing holds up."""
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = EXIT_CRASHED
    if status == MachineFailed.exit_status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # destructors of a failed GPU's tensors abort the process, with another status
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: that of the error (see errors.py), or what the command gives."""
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        status = args.command(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except MachineFailed as error:
        print(f"error: {error}; finished clips are kept, and the same command goes on from here", file=sys.stderr)
        return error.exit_status
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"interrupted {error}".rstrip(), file=sys.stderr)
        return error.exit_status if isinstance(error, Interrupted) else Interrupted.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again while it exits
        return 1


def _run(args: argparse.Namespace) -> int:
    listen_for_out_of_time()
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
    from .recipe_reference import recipe_reference

    schema = recipe_schema()
    print(
        recipe_reference(schema) if args.markdown else json.dumps(schema, indent=2), end="" if args.markdown else "\n"
    )
    return 0


def _compare(args: argparse.Namespace) -> int:
    from .compare import compare

    return compare(args.runs)


def _status(args: argparse.Namespace) -> int:
    from .cluster.status import print_status

    return print_status(args.run)


def _submit(args: argparse.Namespace) -> int:
    for name in (args.recipe, *args.then):
        read_layers(name, args.overrides)
    from .cluster.submit import Wishes, submit

    wishes = Wishes(
        limit=args.time,
        hours=args.hours,
        gpus=args.gpus,
        at_once=args.at_once,
        seconds_a_clip=args.seconds_a_clip,
        after=args.after,
        options=tuple(args.sbatch),
        allow_failed=args.allow_failed,
    )
    return submit((args.recipe, *args.then), args.overrides, wishes, dry_run=args.dry_run)


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
    listen_for_out_of_time()
    from .prepare.command import prepare_command

    return prepare_command(args)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(args.weights)


def _show(args: argparse.Namespace) -> int:
    from .show import show

    return show(args.run, args.clip, arms=args.arm, video=args.video)


def _report(args: argparse.Namespace) -> int:
    from .report import make_report

    return make_report(args.runs, args.out, args.figures)


def _bench(args: argparse.Namespace) -> int:
    import subprocess

    return subprocess.run([sys.executable, "-m", "vidtta.bench", *args.words]).returncode


def _load(args: argparse.Namespace) -> "Recipe":
    read_layers(args.recipe, args.overrides)  # mistakes in the YAML are told at once: torch takes two seconds to import
    from .recipe import load_recipe

    return load_recipe(args.recipe, args.overrides)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if argv[:1] == ["bench"]:  # a program of its own, which needs neither pydantic nor av, and parses its words itself
        return argparse.Namespace(command=_bench, words=argv[1:])
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
    schema = command("schema", _schema, "Print the JSON schema of a recipe, for editors.", " > recipe.schema.json")
    schema.add_argument("--markdown", action="store_true", help="print the reference of every key as Markdown instead")
    compare = command(
        "compare", _compare, "Compare the arms of runs with their baseline, with intervals.", " runs/lora runs/delta"
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the output_dir of a run")
    status = command(
        "status", _status, "Show how far a run is, who works on it, and when it may be done.", " runs/lora"
    )
    status.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    submit = command(
        "submit",
        _submit,
        "Submit a recipe to Slurm as an array, its report behind it.",
        " recipes/lora.yaml data.clips=DIR",
    )
    _add_recipe(submit)
    add_submit_arguments(submit)
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
    show = command(
        "show", _show, "Show what a run says of one clip.", " runs/demo shifted-test-000000 --video clip.mp4"
    )
    show.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    show.add_argument("clip", metavar="CLIP", help="the clip's id")
    show.add_argument(
        "--arm", action="append", metavar="ARM", help="this arm and the baseline alone; may be given again"
    )
    show.add_argument("--video", type=Path, metavar="FILE", help="write baseline, arms and truth side by side there")
    report = command(
        "report", _report, "Write a page that says whether adapting helped, where and at what cost.", " runs/demo"
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the output_dir of a run")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; by default analysis_report.html in the first run"
    )
    report.add_argument("--figures", type=Path, metavar="DIR", help="also write figures and tables for a paper there")
    command("bench", _bench, "Measure kernels, steps and clips on this card, or compare two measurements.", " steps")
    return parser, made


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="replace a setting; the value is read as YAML"
    )
