"""What a recipe says of the networks: where their weights come from, and how they compute."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Weights in the published layout: a directory, a weight file beside its config.json, or a hub id found in the local cache
    (`vidtta fetch`); or `embedded`."""

    dit: str = "hpcai-tech/OpenSora-STDiT-v4-i2v"
    """The diffusion transformer, STDiT3 v1.3."""
    vae: str = "hpcai-tech/OpenSora-VAE-v1.3"
    """The video autoencoder, v1.3."""
    text: str = "DeepFloyd/t5-v1_1-xxl"
    """The text encoder, T5 v1.1."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the transformer and the autoencoder compute in; the text encoder is float32, as in the official inference."""
    device: str = "auto"
    """auto (the first GPU, of several tasks on a host each its own; else the CPU), cpu, or cuda:N."""
    deterministic: bool = True
    """Use deterministic algorithms alone, so that the same inputs give the same bits on the same card and versions."""
    allow_untrained: bool = False
    """Allow weights that were never trained; every output is then marked."""
    kernels: Literal["auto", "plain", "compile", "triton"] = "auto"
    """Which code computes the networks: plain (PyTorch, an operation at a time), compile (that through torch.compile), triton (the
    project's kernels), or auto: the fastest by measurement on a GPU, plain on a CPU."""
    compile: Literal["auto", "all", "training", "none"] = "auto"
    """What torch.compile is put around, of the kernels or the plain code: all work, steps with gradients alone, nothing, or what is
    faster by measurement."""
    attention: Literal["auto", "torch", "cudnn", "flash", "efficient", "math", "fa2", "fa4", "xformers"] = "auto"
    """Which attention: one of these at every shape, torch (PyTorch's own choice), or auto: the fastest by measurement on each shape
    of a GPU, PyTorch's choice on the plain path."""

    float8: Literal["none", "sampling", "all"] = "none"
    """Compute those of the layers' frozen linear layers that gain by it in 8 bits (e4m3, a scale a token and an output channel): nowhere,
    in sampling, or also in the MLPs' steps and features where the method leaves them frozen. Changes results: arms that are compared
    share it."""

    remade: tuple[Literal["rotation", "hidden", "half_hidden"], ...] = ()
    """What training on the kernels computes again in the backward pass instead of keeping it, for less memory and the same bits: the
    rotated queries, keys and values (rotation; nothing where the norms of queries and keys are frozen, for then their projection
    is not kept), what enters a frozen MLP's activation (hidden, or half_hidden: in every other layer). Another path keeps
    everything."""

    def __post_init__(self) -> None:
        if {"hidden", "half_hidden"} <= set(self.remade):
            raise ValueError(
                f"remade must have one of hidden and half_hidden, was {list(self.remade)}; hidden is the more"
            )
        if self.remade and self.kernels in ("plain", "compile"):
            raise ValueError(
                f"remade must be empty where kernels is {self.kernels}, which keeps everything, was {list(self.remade)}; "
                "take kernels: auto or triton"
            )
        if self.kernels == "plain" and self.compile in ("all", "training"):
            raise ValueError(
                f"compile must be auto or none where kernels is plain, was {self.compile}; or set kernels to compile"
            )
        if self.kernels == "compile" and self.compile == "none":
            raise ValueError("compile must not be none where kernels is compile; take kernels: plain for that")
