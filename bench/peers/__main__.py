"""Every peer in a process of its own, and what they measured in one file.

Run: python -m vidtta.bench.peers [--only PEER ...] [--out FILE.json] [--minutes M] [--check]

--only takes names of peers (opensora, peft, flash-attn, flash-attn-4, xformers) or beginnings of their rows.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from .. import record, suite

PEERS: dict[str, tuple[str, ...]] = {
    "opensora": ("opensora",),
    "peft": ("peft",),
    "flash-attn": ("attention", "flash-attn"),
    "flash-attn-4": ("attention", "flash-attn-4"),
    "xformers": ("attention", "xformers"),
}


def main() -> None:
    arguments = suite.parser("peers", __doc__, minutes=6.0).parse_args()
    if not arguments.list:
        suite.device(arguments.check)
    words = [*(["--check"] if arguments.check else []), *(["--commit", arguments.commit] if arguments.commit else [])]
    words += ["--list"] if arguments.list else []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, (module, *rest) in PEERS.items():
            only = [word for word in arguments.only or () if word == name or word.startswith(f"{name} ")]
            if arguments.only and not only:
                continue
            chosen = [] if name in only or not only else ["--only", *only]
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"vidtta.bench.peers.{module}", *rest, *words, "--out", str(file)]
            status = subprocess.run([*command, "--minutes", str(arguments.minutes), *chosen]).returncode
            failed += status != 0
            if status < 0 and not arguments.list:
                lost(file, name, status, arguments.check, arguments.commit)
            files += [file] if file.exists() else []
            if arguments.out:
                record.join(files, arguments.out, "peers")
    if failed:
        raise SystemExit(f"{failed} peers failed")


def lost(file: Path, name: str, status: int, check: bool, commit: str | None) -> None:
    """Add to what a process had written that a signal ended it."""
    import torch

    row = {"row": name, "error": f"the process was ended by signal {-status}"}
    print(suite.line(row), flush=True)
    if file.exists():
        record.add(file, row)
    else:
        record.write(file, "peers", record.environment(torch.device("cpu" if check else "cuda"), commit), [row])


if __name__ == "__main__":
    main()
