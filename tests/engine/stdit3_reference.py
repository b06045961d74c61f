"""STDiT3 once more, in float64 and laid out as the official code: what `vidtta.engine.models.stdit3` is compared with.

Windows are padded with zeros to 8 x 8 and padded keys masked; tokens of a window run row, column, time; known frames are picked by
index; the valid tokens of a caption are picked by its mask; samples run one after the other. Slow and plain.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from vidtta.engine.models.stdit3 import STDiT3


def rotate(x_NHd: Tensor, positions: list[list[float]], freqs: Tensor) -> Tensor:
    """Multiply channel pairs, taken as complex numbers, by exp(i position freq); positions: one list of N an axis."""
    angle_NP = torch.cat([torch.tensor(axis).double()[:, None] * freqs for axis in positions], dim=1)
    pairs = torch.view_as_complex(x_NHd.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_NP), angle_NP)[:, None]).flatten(-2)


def softmax_attention(q_NHd: Tensor, k_LHd: Tensor, v_LHd: Tensor, blocked_L: Tensor | None = None) -> Tensor:
    """Written out; blocked: keys that may not be seen."""
    logits = torch.einsum("nhd,lhd->hnl", q_NHd, k_LHd) / math.sqrt(q_NHd.shape[-1])
    if blocked_L is not None:
        logits = logits.masked_fill(blocked_L, -math.inf)
    return torch.einsum("hnl,lhd->nhd", logits.softmax(-1), v_LHd)


class Reference:
    """One sample at a time, from the weights of a model."""

    def __init__(self, model: STDiT3) -> None:
        self.w = {name: value.detach().double() for name, value in model.state_dict().items()}
        self.config = model.config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def patches(self, name: str, x_CTHW: Tensor) -> Tensor:
        """[T, rows, cols, D]"""
        x = F.pad(x_CTHW.double(), (0, x_CTHW.shape[-1] % 2, 0, x_CTHW.shape[-2] % 2))
        x = F.conv3d(x[None], self.w[f"{name}.proj.weight"], self.w[f"{name}.proj.bias"], stride=(1, 2, 2))
        return x[0].permute(1, 2, 3, 0)

    def position(self, rows: int, cols: int, scale: float) -> Tensor:
        dim, base = self.config.hidden_size, round(math.sqrt(rows * cols))
        w = 10000.0 ** (-2 * torch.arange(dim // 4).double() / (dim // 2))
        table = torch.empty(rows, cols, dim, dtype=torch.float64)
        for i in range(rows):
            for j in range(cols):
                x, y = j / scale * base / cols * w, i / scale * base / rows * w
                table[i, j] = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()])
        return table

    def scalar(self, name: str, value: float) -> Tensor:
        angle = value * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", torch.cat([angle.cos(), angle.sin()]))))

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def one_sequence(self, name: str, x_ND: Tensor, positions: list[list[float]], blocked: Tensor | None) -> Tensor:
        q, k, v = self.linear(f"{name}.qkv", x_ND).unflatten(-1, (3, self.config.num_heads, -1)).unbind(1)
        q, k = (
            rotate(self.rms(f"{name}.{norm}", t), positions, self.w["rope.freqs"])
            for norm, t in (("q_norm", q), ("k_norm", k))
        )
        return self.linear(f"{name}.proj", softmax_attention(q, k, v, blocked).flatten(1))

    def spatial(self, name: str, x_TRCD: Tensor, scale: float) -> Tensor:
        T, rows, cols, _ = x_TRCD.shape
        grid = [(0.0, i / scale, j / scale) for i in range(rows) for j in range(cols)]
        positions = [list(axis) for axis in zip(*grid, strict=True)]
        frames = [self.one_sequence(name, x_TRCD[t].flatten(0, 1), positions, None) for t in range(T)]
        return torch.stack(frames).unflatten(1, (rows, cols))

    def windows(self, name: str, x_TRCD: Tensor, scale: float) -> Tensor:
        T, rows, cols, _ = x_TRCD.shape
        x = F.pad(x_TRCD, (0, 0, 0, -cols % 8, 0, -rows % 8))
        out = torch.zeros_like(x)
        grid = [(float(t), i / scale, j / scale) for i in range(8) for j in range(8) for t in range(T)]
        positions = [list(axis) for axis in zip(*grid, strict=True)]
        for top in range(0, rows, 8):
            for left in range(0, cols, 8):
                tokens = x[:, top : top + 8, left : left + 8].permute(1, 2, 0, 3).flatten(0, 2)
                blocked = [top + i >= rows or left + j >= cols for i in range(8) for j in range(8) for _ in range(T)]
                window = self.one_sequence(name, tokens, positions, torch.tensor(blocked))
                out[:, top : top + 8, left : left + 8] = window.unflatten(0, (8, 8, T)).permute(2, 0, 1, 3)
        return out[:, :rows, :cols]

    def cross(self, name: str, x_TRCD: Tensor, text_LD: Tensor, null_LD: Tensor | None, known: list[int]) -> Tensor:
        out = torch.empty_like(x_TRCD)
        for t in range(x_TRCD.shape[0]):
            caption = null_LD if null_LD is not None and t in known else text_LD
            q = self.linear(f"{name}.q_linear", x_TRCD[t].flatten(0, 1)).unflatten(-1, (self.config.num_heads, -1))
            k, v = self.linear(f"{name}.kv_linear", caption).unflatten(-1, (2, self.config.num_heads, -1)).unbind(1)
            out[t] = self.linear(f"{name}.proj", softmax_attention(q, k, v).flatten(1)).view_as(out[t])
        return out

    def forward(
        self,
        x_CTHW: Tensor,
        t: float,
        fps: float,
        y_LC: Tensor,
        mask_L: Tensor,
        pixel_size: tuple[int, int],
        known: list[int] | None = None,
        cond: Tensor | None = None,
        cond_mask: Tensor | None = None,
        y_null_LC: Tensor | None = None,
    ) -> Tensor:
        """The velocity of one sample, [C, T, h, w]; known None: no condition is embedded."""
        scale = math.sqrt(pixel_size[0] * pixel_size[1]) / self.config.input_sq_size
        x = self.patches("x_embedder", x_CTHW)
        if known is not None:
            assert cond is not None and cond_mask is not None
            x = x + self.patches("x_embedder_cond", cond) + self.patches("x_embedder_cond_mask", cond_mask)
        x = x + self.position(*x.shape[1:3], scale)
        time = self.scalar("t_embedder", t) + self.scalar("fps_embedder", fps)
        modulation = self.linear("t_block.1", F.silu(time)).view(6, -1)
        text = self.mlp("y_embedder.y_proj", y_LC.double()[mask_L.bool()])
        null = None if y_null_LC is None else self.mlp("y_embedder.y_proj", y_null_LC.double()[mask_L.bool()])

        def norm(x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], eps=1e-6)

        for index in range(self.config.depth):
            for kind, attention in (("spatial", self.spatial), ("temporal", self.windows)):
                name = f"{kind}_blocks.{index}"
                shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.w[f"{name}.scale_shift_table"] + modulation
                x = x + gate_a * attention(f"{name}.attn", norm(x) * (1 + scale_a) + shift_a, scale)
                x = x + self.cross(f"{name}.cross_attn", x, text, null, known or [])
                x = x + gate_m * self.mlp(f"{name}.mlp", norm(x) * (1 + scale_m) + shift_m)
        shift, scale_f = self.w["final_layer.scale_shift_table"] + time
        patches = self.linear("final_layer.linear", norm(x) * (1 + scale_f) + shift)
        frames, rows, cols, _ = patches.shape
        C = self.config.in_channels
        out = torch.empty(2 * C, frames, 2 * rows, 2 * cols, dtype=torch.float64)
        for row in range(2):
            for col in range(2):
                corner = patches[..., (2 * row + col) * 2 * C : (2 * row + col + 1) * 2 * C]
                out[:, :, row::2, col::2] = corner.permute(3, 0, 1, 2)
        return out[:C, :, : x_CTHW.shape[-2], : x_CTHW.shape[-1]]
