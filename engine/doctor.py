"""`vidtta doctor`: what this machine can run and what it lacks, or whether a checkpoint is fit for use.

Nothing is imported before it is looked up, so a broken installation is reported and not stumbled over. What could take the
whole process down is tried in another one: attention in bfloat16, and xformers beside FlashAttention 4.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType
from typing import Literal

from .errors import UserError

Mark = Literal["found", "missing (optional)", "missing (required)", "pass", "note", "skipped", "FAIL"]
BAD: tuple[Mark, ...] = ("missing (required)", "FAIL")
STYLES = {"found": "green", "pass": "green", "missing (required)": "bold red", "FAIL": "bold red"}
NAME_WIDTH = 41

# Module to import, what pip calls it, what is needed for, whether nothing works without it.
PACKAGES = (
    ("numpy", "numpy", "arrays", True),
    ("yaml", "pyyaml", "recipes", True),
    ("pydantic", "pydantic", "recipes", True),
    ("safetensors.torch", "safetensors", "weights", True),
    ("av", "av", "videos", True),
    ("transformers.models.t5.modeling_t5", "transformers", "T5", True),
    ("sentencepiece", "sentencepiece", "T5's tokenizer", False),
    ("google.protobuf", "protobuf", "T5's tokenizer", False),
    ("lpips", "lpips", "LPIPS", True),
    ("huggingface_hub", "huggingface-hub", "vidtta fetch", False),
)
CODECS = (("decode", "h264", True), ("decode", "mpeg4", False), ("decode", "vp9", False), ("encode", "libx264", True))
SDPA = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
HEADS, HEAD_DIM = 16, 72  # of STDiT3-XL/2
OPENSORA = "pip install --no-deps git+https://github.com/hpcaitech/Open-Sora@opensora/v1.3"
SECONDS = 180  # for another process to import torch on a slow disk


@dataclass(frozen=True)
class Line:
    """One thing that was looked up. detail: version, path, number or reason; get: the command that mends it, if there is one."""

    mark: Mark
    name: str
    detail: str
    get: str = ""


def doctor(weights: Path | None = None) -> int:
    """Print what was found here or, given weights, the checks of them; return 1 if one fails or something required is missing.

    weights: a directory of the transformer or the autoencoder, a folder that holds such directories, or `embedded`.
    Raises UserError when there are no such weights to check.
    """
    if weights is None:
        return show(environment_lines())
    module, reason = _imported("torch")
    if module is None:
        raise UserError(f"--weights needs torch, which is not usable here ({reason}); run `{_install('torch')}`")
    from .doctor_weights import weight_lines

    return show(weight_lines(str(weights)))


def show(lines: Iterable[Line]) -> int:
    """Print the lines as they come, as a table in a terminal, else one below the other; return 1 if one is bad, else 0."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        return _show_table(lines)
    status = 0
    for line in lines:
        status |= line.mark in BAD
        print(f"{line.mark:18}  {line.name:{NAME_WIDTH}}  {line.detail}{line.get and f'  ->  {line.get}'}", flush=True)
    return status


def _show_table(lines: Iterable[Line]) -> int:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[2].overflow = "fold"
    status = 0
    with Live(table, console=Console()):
        for line in lines:
            status |= line.mark in BAD
            detail = Text(line.detail) + (Text(f"\n{line.get}", "bold") if line.get else Text())
            table.add_row(Text(line.mark, STYLES.get(line.mark, "yellow")), Text(line.name), detail)
    return status


def environment_lines() -> Iterator[Line]:
    """Look everything up that a run can use, one after the other."""
    yield Line("found", "Python", f"{platform.python_version()} ({sys.executable})")
    torch, reason = _imported("torch")
    if torch is None:
        yield Line("missing (required)", "torch", reason, _install("torch"))
    else:
        yield from _devices(torch)
        from .torchvision_ops import declare_missing_operators

        declare_missing_operators()
    yield _triton(torch)
    for module, distribution, purpose, required in PACKAGES:
        yield _package(module, distribution, f"{distribution} ({purpose})", required)
    yield _package("cv2", "opencv-python", "cv2 (labels, optical flow)", False, "pip install opencv-python-headless")
    yield from _codecs()
    if torch is not None:
        yield from _attention()
    yield _package("flash_attn.cute", "flash-attn-4", "FlashAttention 4", False)
    fa2 = "pip install flash-attn --no-build-isolation"
    yield _package("flash_attn.flash_attn_interface", "flash-attn", "FlashAttention 2", False, fa2)
    yield _xformers()
    yield _opensora()
    if torch is not None:
        yield from _weights()
    free = shutil.disk_usage(Path.cwd()).free
    yield Line("note", "disk", f"{free / 1e9:.0f} GB free at {Path.cwd()}")


def _devices(torch: ModuleType) -> Iterator[Line]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Line("found", "torch", f"{torch.__version__} ({build})")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(cards):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        yield Line("found", f"cuda:{index}", f"{card.name}, {memory}, capability {card.major}.{card.minor}")
    if not cards:
        yield Line("missing (optional)", "GPU", "no GPU: runs on the CPU")


def _triton(torch: ModuleType | None) -> Line:
    module, reason = _imported("triton")
    if module is None:
        return Line("missing (optional)", "triton", reason, _install("triton"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        how = "interpreter (TRITON_INTERPRET=1)"
    elif torch is not None and torch.cuda.is_available():
        how = "compiled"
    else:
        how = "no GPU to compile for: kernels run under TRITON_INTERPRET=1 alone"
    return Line("found", "triton", f"{module.__version__}, {how}")


def _package(module_name: str, distribution: str, name: str, required: bool, get: str = "") -> Line:
    module, reason = _imported(module_name)
    if module is None:
        mark = "missing (required)" if required else "missing (optional)"
        return Line(mark, name, reason, get or _install(distribution))
    return Line("found", name, getattr(module, "__version__", None) or _version(distribution) or "version unknown")


def _codecs() -> Iterator[Line]:
    for use, codec, required in CODECS:
        name = f"{use} {codec}"
        try:
            from av.codec import Codec

            Codec(codec, "w" if use == "encode" else "r")
            yield Line("found", name, "through PyAV")
        except Exception as error:
            yield Line("missing (required)" if required else "missing (optional)", name, _reason(error), _install("av"))


def _attention() -> Iterator[Line]:
    """Each back end of scaled_dot_product_attention, tried in another process; one that ends it is left out of the next try."""
    waiting = list(SDPA)
    while waiting:
        code = f"import sys; from {__name__} import try_attention; try_attention(sys.argv[1:])"
        status, out, _ = _in_another_process(code, *waiting)
        for name, device, why_not in map(json.loads, out.splitlines()):
            waiting.remove(name)
            mark = "missing (optional)" if why_not else "found"
            yield Line(mark, f"SDPA {name}", why_not or f"runs {HEADS} heads of {HEAD_DIM} in bfloat16 on {device}")
        if not waiting:
            break
        # oneDNN trusts processors that announce AMX but do not let programs use it.
        mend = "export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16" if status == "died of SIGILL" else ""
        detail = f"{HEADS} heads of {HEAD_DIM} in bfloat16: the process {status or 'stopped'}"
        yield Line("missing (optional)", f"SDPA {waiting.pop(0)}", detail, mend)


def try_attention(names: list[str]) -> None:
    """Print [name, device, "" or why not] as JSON for each back end; called in a process that it may take down."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q_BHND = torch.ones(1, HEADS, 64, HEAD_DIM, dtype=torch.bfloat16, device=device)
    for name in names:
        why_not = ""
        try:
            with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
                warnings.simplefilter("ignore")
                torch.nn.functional.scaled_dot_product_attention(q_BHND, q_BHND, q_BHND).sum().item()
        except Exception as error:
            why_not = f"not on {device}: {_reason(error).split('. ')[0]}"
        print(json.dumps([name, device, why_not]), flush=True)


def _xformers() -> Line:
    """Found by its metadata and imported elsewhere: with FlashAttention 4 in the process, importing it fails."""
    found = _version("xformers")
    if found is None:
        return Line("missing (optional)", "xformers", "not installed", _install("xformers"))
    status, _, err = _in_another_process("import xformers.ops")
    if status:
        detail = f"{found} does not import: {err.strip().splitlines()[-1] if err.strip() else status}"
        return Line("missing (optional)", "xformers", detail, _install("xformers"))
    return Line("found", "xformers", found)


def _opensora() -> Line:
    """Looked for and not imported: the official code has requirements of its own, which cannot all be met here."""
    spec = importlib.util.find_spec("opensora")
    if spec is None:
        return Line("missing (optional)", "opensora (official code)", "not installed; for comparison alone", OPENSORA)
    place = (spec.submodule_search_locations or [spec.origin])[0]
    return Line("found", "opensora (official code)", f"{_version('opensora') or 'version unknown'}, {place}")


def _weights() -> Iterator[Line]:
    from .fetch import HUB_FILES, HUB_REPOSITORIES, torch_hub_file, verify_hub_file
    from .metrics.lpips import LPIPS
    from .models.checkpoint import open_state, read_config, resolve_source
    from .text.t5_files import DEFAULT_T5, find_t5_files

    def repository(source: str) -> Path:
        folder = resolve_source(source, "vidtta fetch opensora")
        read_config(folder)
        open_state(folder)  # maps the file: says whether it is whole, reads next to nothing
        return folder

    def lpips() -> Path:
        if reason := LPIPS.available():
            raise UserError(reason)
        return torch_hub_file(HUB_FILES["lpips"])

    def raft() -> Path:
        verify_hub_file(torch_hub_file(HUB_FILES["raft"]))
        return torch_hub_file(HUB_FILES["raft"])

    for source in HUB_REPOSITORIES["opensora"]:
        yield _located(f"weights {source}", lambda source=source: repository(source), "vidtta fetch opensora")
    yield _located(f"weights {DEFAULT_T5}", lambda: find_t5_files(DEFAULT_T5).folder, "vidtta fetch t5")
    yield _located("weights of LPIPS", lpips, "vidtta fetch lpips")
    yield _located("weights of RAFT", raft, "vidtta fetch raft")


def _located(name: str, find: Callable[[], Path], get: str) -> Line:
    try:
        return Line("found", name, str(find()))
    except Exception as error:  # files of others: a damaged one can raise anything
        return Line("missing (optional)", name, _reason(error).split(";")[0], get)


def _imported(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why it cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name), ""
    except ModuleNotFoundError as error:
        # Another name than a part of ours is a requirement that is missing.
        own = error.name and f"{name}.".startswith(f"{error.name}.")
        return None, "not installed" if own else f"does not import: {_reason(error)}"
    except Exception as error:
        return None, f"does not import: {_reason(error)}"


def _in_another_process(code: str, *arguments: str) -> tuple[str, str, str]:
    """How a Python process that runs `code` ended ("" is well), and what it wrote to both streams."""
    command = [sys.executable, "-c", code, *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _reason(error), "", ""
    status = ended.returncode
    how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}" if status else ""
    return how, ended.stdout, ended.stderr


def _install(distribution: str) -> str:
    """The pip command for a package, in the versions that vidtta declares."""
    try:
        declared = requires("vidtta") or []
    except PackageNotFoundError:
        declared = []
    matching = (text.split(";")[0].strip() for text in declared if re.match(r"[\w.-]+", text)[0] == distribution)  # type: ignore[index]
    return f'pip install "{next(matching, distribution)}"'


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
