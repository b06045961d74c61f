"""The options of `vidtta submit`."""

import argparse
import math

from .ranges import seconds_of


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    parser.add_argument("--time", type=_limit, metavar="LIMIT", default="48:00:00", help="longest time limit of a task")
    parser.add_argument("--hours", type=_positive, metavar="H", default=4.0, help="work of a task (default: 4)")
    parser.add_argument("--gpus", type=_count, metavar="N", default=1, help="GPUs of a task, one process each")
    parser.add_argument("--at-once", type=_count, metavar="N", help="tasks that may run at the same time")
    parser.add_argument(
        "--seconds-a-clip", type=_positive, metavar="S", help="of all arms; measured where results are there"
    )
    parser.add_argument("--after", metavar="JOB", help="begin when this job has ended well")
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="RECIPE",
        help="the next stage, after all tasks ended well; repeatable",
    )
    parser.add_argument(
        "--allow-failed", action="store_true", help="report and go on to the next stage although clips failed"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="for every sbatch, as --sbatch=--partition=gpu"
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"was {text!r}; give a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"was {text!r}; give a number above 0")
    return number


def _limit(text: str) -> str:
    seconds_of(text)
    return text
