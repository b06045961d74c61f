"""What the feature cache costs in quality for the work it saves, on clips of the small trained model; the table of engine/sampler.md.

Run: python -m vidtta.bench.caching [--clips 8] [--samplers demo v1.3] [--methods none lora] [--every 2 3] [--first 0 2 6] [--check]

For each sampler and method, every interval and number of first layers: the share of layer evaluations reused, PSNR to the output without
a cache, PSNR and SSIM to the real frames, and how far the change from frame to frame is from theirs; means over shifted tuning clips
of the world made by code. Each line is printed when it is done. --check: one clip, two layers, small pictures.
"""

import argparse
from dataclasses import replace

import torch

from ..engine.determinism import make_deterministic
from ..engine.sampler import SamplerSettings
from .clip_quality import METHODS, Quality

SAMPLERS = {
    "demo": SamplerSettings(steps=10, text_guidance=1.0, image_guidance=1.0),
    "v1.3": SamplerSettings(),
}
"""recipes/demo.yaml's, one branch; and v1.3's, three branches and from step 10 on by turns one."""
HEAD = """| sampler | method | every | first | layers reused | PSNR to exact | PSNR | SSIM | temporal error, dB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def lines(quality: Quality, sampler: str, method: str, intervals: list[int], firsts: list[int]) -> None:
    """Print a method's lines of the table: without a cache, then with each."""
    grid = [{}] + [{"cache_every": every, "cache_first": first} for every in intervals for first in firsts]
    for cached in grid:
        row = quality.measure(method, "plain", **cached)
        every, first = (cached[name] if cached else none for name, none in (("cache_every", 1), ("cache_first", "-")))
        reused, exact = row.get("quality_layers_reused", 0.0), row.get("psnr_to_exact")
        cells = [sampler, method, every, first, f"{reused:.0%}", "same bits" if exact is None else f"{exact:.1f}"]
        cells += [f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['temporal_error']:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["none"])
    parser.add_argument(
        "--check", action="store_true", help="one clip and two layers in few steps: no figures that mean anything"
    )
    parser.add_argument("--every", nargs="+", type=int, default=[2, 3], help="intervals, above 1")
    parser.add_argument("--first", nargs="+", type=int, default=[0, 2, 6], help="how many layers run at every step")
    arguments = parser.parse_args(words)
    make_deterministic()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.check else "cpu")
    print(HEAD, flush=True)
    for name in arguments.samplers:
        sampler = replace(SAMPLERS[name], steps=3, force_steps=2) if arguments.check else SAMPLERS[name]
        clips = 1 if arguments.check else arguments.clips
        quality = Quality(device, torch.float32, clips, short=arguments.check, sampler=sampler)
        for method in arguments.methods:
            lines(quality, name, method, arguments.every, [0, 1] if arguments.check else arguments.first)


if __name__ == "__main__":
    main()
