"""What the command says of one clip, and its videos side by side."""

import pytest
import torch
from vidtta.bench.synthetic_run import write_synthetic_run
from vidtta.engine import cli
from vidtta.engine.data.decode import Limits, open_pictures
from vidtta.engine.data.video import read_window, write_video
from vidtta.engine.rundir import RunDirectory, read_json

CLIP = "v_Biking_g00_c00"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_synthetic_run(tmp_path_factory.mktemp("runs") / "run", 10)
    directory = RunDirectory(root)
    key = (directory.result("lora", CLIP) or {})["keys"]["clip"]
    grey = {"baseline": 60, "lora": 120}
    videos = {directory.clip(arm, CLIP) / "video.mp4": value for arm, value in grey.items()}
    for path, value in (videos | {directory.truth(CLIP, key): 200}).items():
        write_video(path, torch.full((45, 3, 32, 32), value, dtype=torch.uint8), 24)
    return root


def said(capsys, *words):
    status = cli.main(["show", *map(str, words)])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_scores_differences_losses_costs_and_files(root, capsys):
    status, out, _ = said(capsys, root, CLIP)
    results = {arm: read_json(root / f"arms/{arm}/clips/{CLIP}/result.json") or {} for arm in ("baseline", "lora")}
    before, after = (result["scores"]["psnr"]["mean"] for result in results.values())
    assert status == 0
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    at = next(k for k, line in enumerate(lines) if line[0] == "lora")
    losses = results["lora"]["adaptation"]
    assert lines[at][:2] == ["lora", f"{after:.2f}"] and lines[at + 1][1] == f"{after - before:+.2f}"
    assert lines[at][4] == f"{losses['losses'][0]:.3f} > {losses['losses'][-1]:.3f}"
    assert lines[at + 1][4] == f"zero {losses['zero_losses'][-1]:.3f}"
    assert lines[at][5:] == ["7.80", "22.20"]
    assert lines[0][0] == "baseline" and " ".join(line[0] for line in lines).endswith("copy last frame VAE ceiling")
    assert "full: failed: the loss or its gradient is not finite at step 7" in out
    assert "class: Biking" in out and "NOTE: made-up results" in out
    assert f"lora: {root / 'arms/lora/clips' / CLIP / 'video.mp4'}" in out
    assert max(map(len, (line for line in out.splitlines() if "│" in line))) <= 80


def test_baseline_adapted_and_truth_side_by_side_in_a_file_that_browsers_play(root, tmp_path, capsys):
    target = tmp_path / "side.mp4"
    status, out, _ = said(capsys, root, CLIP, "--arm", "lora", "--video", target)
    assert status == 0 and f"side by side: {target}" in out
    assert "delta" not in out
    with open_pictures(target, Limits()) as stream:
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    head = target.read_bytes()
    assert head.index(b"moov") < head.index(b"mdat")  # plays before all of it is loaded
    frames = read_window(target, frames=45, fps=24, height=72, width=3 * 32 + 4).float()
    columns = [round(frames[:, :, 44:, x + 4 : x + 28].mean().item()) for x in (0, 34, 68)]
    assert columns == pytest.approx([60, 120, 200], abs=3)
    assert not torch.equal(frames[0, :, :40], frames[30, :, :40])  # given, then continued


def test_mistakes_are_told_in_one_sentence(root, tmp_path, capsys):
    status, _, err = said(capsys, root, "v_Biking_g00_c01")
    assert status == 2
    assert err == (
        f"error: {root}: no clip 'v_Biking_g00_c01' (perhaps {CLIP}); it has 10, for example v_Archery_g00_c00\n"
    )
    assert "no arm 'lorra' (perhaps lora); it has baseline, " in said(capsys, root, CLIP, "--arm", "lorra")[2]
    other = "v_Diving_g00_c00"
    assert said(capsys, root, other, "--video", tmp_path / "x.mp4")[2] == (
        f"error: {root}: no videos of clip {other} were kept; run with keep=[video]\n"
    )
    assert "no result lies in it" in said(capsys, tmp_path, CLIP)[2]
