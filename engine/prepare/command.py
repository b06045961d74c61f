"""The arguments of `vidtta prepare`."""

import argparse
from pathlib import Path
from typing import get_args

from ..errors import UserError
from .settings import Aspect, Settings, Start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `ucf101` and `folder` with their options."""
    kinds = parser.add_subparsers(title="sources", metavar="SOURCE", dest="kind", required=True)
    ucf101 = kinds.add_parser(
        "ucf101",
        help="a sample of UCF-101",
        description="Prepare a sample of UCF-101, spread evenly over its classes and their groups.",
        epilog="example: vidtta prepare ucf101 --source UCF101.rar --out data/ucf101",
    )
    given = ucf101.add_mutually_exclusive_group(required=True)
    given.add_argument("--source", type=Path, metavar="PATH", help="the archive (.rar, .zip, .tar.*) or its folder")
    given.add_argument("--download", action="store_true", help="fetch the archive (6.5 GB) into DIR/downloads first")
    ucf101.add_argument(
        "--splits", type=Path, metavar="PATH", help="folder or zip of the official train and test lists"
    )
    ucf101.add_argument("--replace", action="store_true", help="choose another clip for each one that is rejected")
    folder = kinds.add_parser(
        "folder",
        help="every video of a folder",
        description="Prepare every video of a folder, at any depth.",
        epilog="example: vidtta prepare folder videos --out data/videos",
    )
    folder.add_argument("source", type=Path, metavar="FOLDER", help="videos at any depth")
    folder.set_defaults(download=False, splits=None, replace=False)
    _add_common(ucf101, Settings.count)
    _add_common(folder, None)


def _add_common(parser: argparse.ArgumentParser, count: int | None) -> None:
    shown = "all" if count is None else count
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="where the clips go; a new folder or its own"
    )
    parser.add_argument("--count", type=int, metavar="N", default=count, help=f"clips to choose (default: {shown})")
    parser.add_argument("--seed", type=int, metavar="N", default=Settings.seed, help="of the choice (default: 0)")
    for name in ("height", "width", "frames"):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=f"of a clip (default: {default})")
    parser.add_argument("--fps", type=float, metavar="X", default=Settings.fps, help="frames a second (default: 24)")
    parser.add_argument(
        "--conditioning-frames",
        type=int,
        metavar="N",
        default=Settings.conditioning_frames,
        help="known frames, for the manifest (default: 22)",
    )
    parser.add_argument(
        "--aspect",
        choices=get_args(Aspect),
        default=Settings.aspect,
        help="fill the frame and cut what stands out, or show all between black bars (default: crop)",
    )
    parser.add_argument("--start", choices=get_args(Start), default=Settings.start, help="of the clip within the video")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each CPU, at most 16)")
    parser.add_argument("--quiet", action="store_true", help="print the last line alone")


def prepare_command(args: argparse.Namespace) -> int:
    """Run `vidtta prepare`; the exit status."""
    if args.workers is not None and args.workers < 1:
        raise UserError(f"workers is {args.workers}; it must be at least 1")
    names = Settings.__dataclass_fields__
    try:
        settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
    except ValueError as error:
        raise UserError(str(error)) from error
    from .run import prepare

    source = args.source
    if args.download:
        from .download import download_ucf101

        source = download_ucf101(args.out / "downloads", quiet=args.quiet)
    return prepare(args.kind, source, args.out, settings, splits=args.splits, workers=args.workers, quiet=args.quiet)
