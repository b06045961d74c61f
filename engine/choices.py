"""Which path computes each kind of work of a run: what the recipe allows, what was chosen, and how it is put in force.

    training    steps with gradients
    features    the known latents without gradients: what a delta is fitted on, a cached prefix, held-out losses, the preflight
    sampling    the whole clip's latents, all guidance branches
    vae         encoding and decoding

choose.py chooses. A run's choices lie in its choices.json, where all its tasks take them from, and are part of what two results
must share to be compared or to belong to one run.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from ..kernels.attention import Choice
from ..kernels.common import INTERPRETED
from .errors import UserError
from .models.paths import MethodPath, Paths, PathsByWork, use_paths
from .models.settings import ModelSettings
from .models.stdit3 import STDiT3
from .models.vae import VAE
from .models.vae_fast import use_channels_last

Way = Literal["plain", "compile", "triton", "triton + compile"]
"""plain: PyTorch, an operation at a time; compile: that through torch.compile; triton: the kernels of kernels/, and with compile
what lies between them too."""
Work = Literal["training", "features", "sampling", "vae"]
WAYS: tuple[Way, ...] = get_args(Way)
WORKS: tuple[Work, ...] = get_args(Work)
TORCHS_OWN = "torch scaled_dot_product_attention"

COMPILER: str | Callable[..., Any] = "inductor"
"""torch.compile's back end."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The way of each work; None: not chosen yet, as nothing in the run needed it. attention: None leaves it to PyTorch; cross: the
    back end of attention to a caption. why: for each part, where the choice comes from."""

    training: Way | None = "plain"
    features: Way | None = "plain"
    sampling: Way | None = "plain"
    vae: Way | None = "plain"
    attention: Choice | None = None
    cross: str | None = None
    why: dict[str, str] = field(default_factory=dict)

    def way(self, work: Work) -> Way | None:
        return getattr(self, work)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for choices.json and for each result's `paths`."""
        attention: Any = TORCHS_OWN if self.attention is None else {**asdict(self.attention), "cross": self.cross}
        return {**{work: self.way(work) for work in WORKS}, "attention": attention, "why": self.why}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Choices | None":
        """What `to_json` gave; None where these are none."""
        attention: Any = value.get("attention")
        if not all(value.get(work, "") in (*WAYS, None) for work in WORKS) or not isinstance(value.get("why"), dict):
            return None
        ways = {work: value[work] for work in WORKS}
        if attention == TORCHS_OWN:
            return cls(**ways, why=value["why"])
        try:
            parts = dict(attention)
            cross = parts.pop("cross")
            return cls(**ways, attention=Choice(**parts), cross=cross, why=value["why"])
        except (TypeError, ValueError, KeyError):
            return None

    def shaping_videos(self) -> dict[str, Any] | None:
        """What shapes every arm's video, plain JSON; None on the plain path."""
        return _unless_plain(self, ("sampling", "vae"), training=False)

    def shaping_adaptation(self) -> dict[str, Any] | None:
        """What shapes what a method does to the weights, plain JSON; None on the plain path."""
        return _unless_plain(self, ("training", "features"), training=True)


PLAIN = Choices()


def _unless_plain(choices: Choices, works: tuple[Work, ...], *, training: bool) -> dict[str, Any] | None:
    ways = {work: choices.way(work) for work in works}
    if choices.attention is None and set(ways.values()) <= {"plain", None}:
        return None
    found = choices.attention
    backends = None if found is None else found.pinned or {**found.forward, **(found.training if training else {})}
    return {**ways, "attention": backends, "cross": choices.cross}


def allowed_ways(settings: ModelSettings, work: Work, gpu: bool) -> tuple[Way, ...]:
    """The ways that a recipe leaves open for a kind of work on a device; raises UserError where it asks for what cannot be there."""
    if settings.kernels == "triton" and not gpu:
        if not INTERPRETED:
            raise UserError(
                "model.kernels was triton, which needs a GPU (or TRITON_INTERPRET=1, for small tests); use auto or compile"
            )
        if settings.compile in ("all", "training"):
            raise UserError(
                f"model.compile was {settings.compile}, but Triton's interpreter cannot be compiled around; use auto or none"
            )
    if settings.kernels == "auto":
        kernels = ("plain", "triton") if gpu else ("plain",)
    else:
        kernels = ("triton",) if settings.kernels == "triton" else ("plain",)
    compiled = {"all": (True,), "training": (work == "training",), "none": (False,), "auto": (False, True)}[
        settings.compile
    ]
    if settings.kernels == "compile" and settings.compile == "auto":
        compiled = (True,)
    elif settings.kernels == "plain" or (settings.compile == "auto" and not gpu):
        compiled = (False,)
    names: dict[tuple[str, bool], Way] = {
        ("plain", False): "plain",
        ("plain", True): "compile",
        ("triton", False): "triton",
        ("triton", True): "triton + compile",
    }
    ways: list[Way] = [names[kernel, with_compile] for kernel in kernels for with_compile in compiled]
    if work == "vae":  # between its kernels lie convolutions alone, which a compiler leaves as they are
        ways = ["triton" if way == "triton + compile" else way for way in ways]
    return tuple(dict.fromkeys(ways))


def paths_of(way: Way | None, attention: Choice | None, cross: str | None) -> Paths | None:
    """The layers' path of a way; None is the plain one. Of attention, the plain way takes only what was pinned."""
    if way in ("plain", None):
        if attention is None or attention.pinned is None:
            return None
        return Paths(attention=attention, cross=cross, methods="plain")
    return Paths(
        kernels="triton" if "triton" in way else "torch",
        compiled="compile" in way,
        attention=attention,
        cross=cross,
        gelu_in_product="triton" in way,
        compiler=COMPILER,
    )


def put_in_force(choices: Choices, dit: STDiT3, vae: VAE, *, features_tokens: int, strict: bool) -> None:
    """Compute by these choices from now on. features_tokens: of the known latents; strict: whether a method that cannot take its
    fast path is refused, else it says so."""
    training, features, sampling = (
        paths_of(way, choices.attention, choices.cross)
        for way in (choices.training, choices.features, choices.sampling)
    )
    methods: MethodPath = "plain" if choices.training in ("plain", None) else "fused"
    if "triton" in f"{choices.training} {choices.features}":
        methods = "triton"
    if training or features or sampling:
        use_paths(
            dit,
            PathsByWork(
                training=training,
                features=features,
                sampling=sampling,
                features_tokens=features_tokens,
                methods=methods,
                strict=strict,
            ),
        )
    use_vae_way(vae, choices.vae)


def use_vae_way(vae: VAE, way: Way | None) -> None:
    """Encode and decode in this way from now on."""
    if way not in ("plain", None):
        use_channels_last(vae, triton=way == "triton", compiled=way == "compile", compiler=COMPILER)


def merged(stored: Choices | None, settings: ModelSettings, gpu: bool) -> Choices:
    """Of what a run directory holds, the choices that the recipe leaves open; the others are None."""
    if stored is None:
        return Choices(training=None, features=None, sampling=None, vae=None)
    kept = {work: way if (way := stored.way(work)) in allowed_ways(settings, work, gpu) else None for work in WORKS}
    return replace(stored, **kept)


def describe_choices(paths: dict[str, Any], ways: dict[str, str]) -> str:
    """A result's paths and its method's own ways in a line, for tables."""
    attention = paths.get("attention")
    if isinstance(attention, dict):
        attention = attention["pinned"] or "+".join(
            sorted({*attention["forward"].values(), *attention["training"].values()})
        )
    elif attention == TORCHS_OWN:
        attention = "torch's choice"
    parts = [f"{work} {paths[work]}" for work in WORKS if paths.get(work)]
    parts += [f"features cached {paths['feature_cache']}"] if "feature_cache" in paths else []
    parts += [f"float8 {paths['float8']}"] if "float8" in paths else []
    return "; ".join([*parts, f"attention {attention}", *(f"{part}: {way}" for part, way in ways.items())])
