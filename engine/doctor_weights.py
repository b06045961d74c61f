"""Whether a checkpoint is fit: its names and shapes, its numbers, and what it makes of a clip that comes with vidtta.

Checked on the first GPU in bfloat16, at 480x640 pixels; else on the CPU in float32, at 96x128.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adaptation import AdaptationSettings, Task
from .clip import encode_known
from .data.clips import Data, list_clips
from .data.video import read_window, to_model
from .doctor import Line
from .errors import UserError
from .evaluation import evaluate
from .metrics.psnr import psnr
from .models import load
from .models.checkpoint import open_state, read_config, resolve_source
from .models.rope import Rope
from .models.stdit3 import Caption, STDiT3
from .models.vae import CHUNK_FRAMES, VAE
from .sampler import SamplerSettings
from .window import Window

MIN_PSNR = 20.0  # dB; the published autoencoder is far above, one that was loaded wrongly far below
CLIPS = Data(clips="embedded:clips/clips.csv", limit=1)
LABELS = {"dit": "transformer", "vae": "autoencoder"}
RUNS_IN: dict[str, tuple[torch.dtype, tuple[int, int]]] = {
    "cuda": (torch.bfloat16, (480, 640)),
    "cpu": (torch.float32, (96, 128)),
}
"""What a kind of device computes in, and the height and width of the pictures."""
DOUBTFUL = 5  # names listed in a line before "and n more"

Model = TypeVar("Model", bound=nn.Module)


def weight_lines(source: str) -> Iterator[Line]:
    """The checks of `embedded`, a directory or a hub id, made as they are asked for; see `find_parts` for what is raised."""
    return _lines(find_parts(source))


def find_parts(source: str) -> dict[str, str]:
    """Where the transformer ("dit") and the autoencoder ("vae") of `source` are, by what their config.json says.

    Raises UserError when there is nothing, neither of them, or two of a kind.
    """
    root = load.EMBEDDED if source == "embedded" else resolve_source(source, "vidtta fetch opensora")
    here = (root / "config.json").is_file()
    parts: dict[str, str] = {}
    for folder in [root] if here else sorted(path.parent for path in root.glob("*/config.json")):
        kind = kind_of(read_config(folder))
        if kind in parts:
            raise UserError(
                f"{root} holds two folders with a {LABELS[kind]}, {parts[kind]} and {folder}; name one of them"
            )
        if kind:
            parts[kind] = str(folder)
    if not parts:
        raise UserError(
            f"{root} holds neither a transformer nor an autoencoder of Open-Sora v1.3; give a folder with config.json and "
            "the weights, or one with such folders directly inside"
        )
    return parts


def kind_of(config: Mapping[str, Any]) -> str | None:
    """ "dit", "vae", or None for a config.json of something else."""
    model_type = str(config.get("model_type", ""))
    if model_type.startswith("STDiT3") or (not model_type and {"hidden_size", "depth"} <= config.keys()):
        return "dit"
    if model_type.startswith("OpenSoraVAE") or (
        not model_type and ({"encoder", "decoder"} <= config.keys() or "z_channels" in config)
    ):
        return "vae"
    return None


def _lines(parts: dict[str, str]) -> Iterator[Line]:
    device = load.choose_device("auto")
    dtype, size = RUNS_IN[device.type]
    dit = vae = None
    if "dit" in parts:
        dit, state = yield from _load("dit", parts["dit"], load.load_dit, device, dtype)
        yield from transformer_lines(state)
    if "vae" in parts:
        vae, _ = yield from _load("vae", parts["vae"], load.load_vae, device, dtype)
        name = "autoencoder: reconstruction"
        if vae is None:
            yield Line("skipped", name, "it did not load")
        else:
            yield from _guarded(name, _reconstruction(name, vae, size))
    name = "continuation loss"
    lacking = [label for kind, label in LABELS.items() if kind not in parts]
    if lacking:
        yield Line("skipped", name, f"needs the {lacking[0]} too: give a folder that holds both")
    elif dit is None or vae is None:
        yield Line("skipped", name, "needs both the transformer and the autoencoder, and one did not load")
    else:
        yield from _guarded(name, _continuation(name, dit, vae, size))


def _load(
    kind: str,
    source: str,
    loader: Callable[[str, torch.device, torch.dtype], Model],
    device: torch.device,
    dtype: torch.dtype,
) -> Generator[Line, None, tuple[Model | None, dict[str, Tensor]]]:
    """Load one network, with the lines about its file; returns it, or None, and the tensors as they are stored."""
    label, model, state = LABELS[kind], None, {}
    name = f"{label}: keys and shapes"
    try:
        # The same prefix that loading takes off.
        state = {key.removeprefix("module."): value for key, value in open_state(Path(source)).items()}
        model = loader(source, device, dtype)
        count = sum(value.numel() for value in model.state_dict().values())
        yield Line("pass", name, f"{len(model.state_dict())} tensors, {count:,} numbers, {source}")
    except UserError as error:
        yield Line("FAIL", name, str(error))
    if state:
        yield from stored_lines(label, state)
    return model, state


def stored_lines(label: str, state: Mapping[str, Tensor]) -> Iterator[Line]:
    """The dtypes of a file, and whether each of its numbers is one."""
    counts = Counter(str(value.dtype).removeprefix("torch.") for value in state.values())
    whole = [name for name, value in state.items() if not value.is_floating_point()]
    listed = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    yield Line("FAIL" if whole else "pass", f"{label}: stored dtypes", listed + _named("; not floating point:", whole))
    wrong = [name for name, value in state.items() if not value.float().isfinite().all()]
    if wrong:
        yield Line("FAIL", f"{label}: finite", _named("NaN or infinity in", wrong))
    else:
        yield Line("pass", f"{label}: finite", "all values are finite")


def transformer_lines(state: Mapping[str, Tensor]) -> Iterator[Line]:
    """What tells a transformer that can continue a clip, by its stored tensors; none where there are no tensors."""
    if not state:
        return
    yield freqs_line(state.get("rope.freqs"))
    for part in ("x_embedder_cond", "x_embedder_cond_mask"):
        yield condition_line(part, state.get(f"{part}.proj.weight"), state.get(f"{part}.proj.bias"))
    name = "transformer: final layer"
    weight, table = state.get("final_layer.linear.weight"), state.get("final_layer.scale_shift_table")
    if weight is None or table is None or weight.numel() % 8:
        yield Line("skipped", name, "its tensors are missing or of another shape")
        return
    velocity, unused = (
        weight.float().reshape(4, 2, -1).unbind(1)
    )  # rows are (patch position, velocity or unused, channel)
    norms = f"norms: velocity {velocity.norm():.4g}, unused half {unused.norm():.4g}, table {table.float().norm():.4g}"
    if velocity.any():
        yield Line("pass", name, norms)
    else:
        yield Line("FAIL", name, f"{norms}: predicts a constant whatever it sees; was it ever trained?")


def freqs_line(freqs: Tensor | None) -> Line:
    """`rope.freqs` against its formula; it is loaded, so a wrong value would turn every query and key wrongly."""
    name = "transformer: rope.freqs"
    if freqs is None:
        return Line("skipped", name, "not in the file")
    found = freqs.float().flatten()
    formula = Rope(6 * len(found)).freqs.detach().to(found.device)
    error = (found / formula - 1).abs().max().item() if len(found) else 0.0
    if error <= 4 * torch.finfo(torch.float32).eps:  # the official code computes the formula in float32
        return Line("pass", name, f"{len(found)} values, equal to the formula in float32")
    if torch.equal(found, formula.bfloat16().float()):
        return Line("pass", name, f"{len(found)} values, equal to the formula rounded to bfloat16")
    return Line(
        "FAIL", name, f"neither the formula nor the formula in bfloat16: a value is off by {error:.2g} of itself"
    )


def condition_line(part: str, weight: Tensor | None, bias: Tensor | None) -> Line:
    """The embedding of known frames, or of where they are: zero until it is trained on known frames."""
    name = f"transformer: {part}"
    if weight is None or bias is None:
        return Line("skipped", name, "its tensors are not in the file")
    norms = f"norms: weight {weight.float().norm():.4g}, bias {bias.float().norm():.4g}"
    if weight.any():
        return Line("pass", name, norms)
    return Line(
        "FAIL",
        name,
        f"{norms}: the weight is all zero, so it never learned from known frames and cannot continue a clip",
        "vidtta fetch opensora (hpcai-tech/OpenSora-STDiT-v4-i2v was trained on known frames)",
    )


@torch.no_grad()
def _reconstruction(name: str, vae: VAE, size: tuple[int, int]) -> Iterator[Line]:
    clip_id, pixels_3FHW = _clip(CHUNK_FRAMES, size, next(vae.parameters()).device)
    rebuilt_3FHW = vae.decode(vae.encode(pixels_3FHW[None]))[0].float()
    value = psnr(rebuilt_3FHW, pixels_3FHW).mean().item()
    yield psnr_line(name, value, f"{clip_id}, {CHUNK_FRAMES} frames of {size[0]}x{size[1]}")


def psnr_line(name: str, value: float, of: str) -> Line:
    """value: dB; not a number fails."""
    good = value >= MIN_PSNR
    return Line("pass" if good else "FAIL", name, f"PSNR {value:.2f} dB ({of}; at least {MIN_PSNR:g} wanted)")


def _continuation(name: str, dit: STDiT3, vae: VAE, size: tuple[int, int]) -> Iterator[Line]:
    """The official evaluation's timesteps; its caption is replaced by the null caption, so that no text encoder is needed."""
    channels = dit.config.in_channels
    if channels != vae.config.z_channels:
        yield Line(
            "FAIL", name, f"the transformer takes {channels} channels, the autoencoder makes {vae.config.z_channels}"
        )
        return
    window = Window()
    clip_id, pixels_3FHW = _clip(window.encoded_frames, size, dit.device)
    with torch.no_grad():
        latents_1CKhw = encode_known(vae, pixels_3FHW, window)
        null: Tensor = dit.y_embedder.y_embedding  # type: ignore[assignment]
        task = Task(
            dit,
            latents_1CKhw,
            Caption(null[None]),
            AdaptationSettings(),
            recipe_seed=0,
            clip_id=clip_id,
            pixel_size=size,
            fps=window.fps,
            sampled_frames=window.model_frames,
            sampling_steps=SamplerSettings().steps,
        )
    pairs = []
    for level in evaluate(task):
        pairs.append((level.loss, level.zero_loss))
        yield Line("note", f"{name} at t = {level.t:.0f}", _compared(*pairs[-1]))
    yield mean_line(name, pairs)


def mean_line(name: str, pairs: list[tuple[float, float]]) -> Line:
    """pairs: the loss and that of predicting zero, by timestep. A loss that is not a number fails."""
    loss, zero = (sum(values) / len(values) for values in zip(*pairs, strict=True))
    if loss < zero:
        return Line("pass", f"{name}, mean", _compared(loss, zero))
    return Line("FAIL", f"{name}, mean", f"{_compared(loss, zero)}: no better than a network that predicts nothing")


def _compared(loss: float, zero: float) -> str:
    return f"{loss:.4f}, predicting zero {zero:.4f}"


def _clip(frames: int, size: tuple[int, int], device: torch.device) -> tuple[str, Tensor]:
    """Name and first frames of the first clip that comes with vidtta, [3, frames, H, W] in [-1, 1]."""
    clip = list_clips(CLIPS, Path.cwd())[0]
    height, width = size
    window = read_window(clip.path, start=clip.start, frames=frames, fps=Window().fps, height=height, width=width)
    return clip.id, to_model(window).to(device)


def _guarded(name: str, lines: Iterable[Line]) -> Iterator[Line]:
    """The lines of a check, or why this machine cannot make it."""
    try:
        yield from lines
    except torch.OutOfMemoryError:
        yield Line("skipped", name, "the GPU has too little free memory")
    except ImportError as error:
        yield Line("skipped", name, f"{error}; see `vidtta doctor`")
    except UserError as error:
        yield Line("skipped", name, str(error))


def _named(what: str, names: list[str]) -> str:
    """The first names behind `what`; empty for none."""
    more = f" and {len(names) - DOUBTFUL} more" if len(names) > DOUBTFUL else ""
    return f"{what} {', '.join(names[:DOUBTFUL])}{more}" if names else ""
