"""What a report says and draws, before any browser: the answer, costs, kinds of clips, tables, files for a paper."""

import csv
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from vidtta.bench.synthetic_run import CATEGORIES, write_synthetic_run
from vidtta.engine import cli
from vidtta.engine.files import write_json
from vidtta.engine.metrics import compute_complexity
from vidtta.engine.report import figures, series, tables
from vidtta.engine.report.answer import answer
from vidtta.engine.report.figures import write_figures
from vidtta.engine.report.gather import gather
from vidtta.engine.report.kinds import by_category, clusters, correlations, kinds_of
from vidtta.engine.report.page import render
from vidtta.engine.report.payload import payload
from vidtta.engine.report.search import read_searches
from vidtta.engine.report.tables import Cell, Table, latex, to_csv, to_latex, to_markdown
from vidtta.engine.rundir import RunDirectory, read_json

CLIPS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "one", CLIPS)


@pytest.fixture(scope="module")
def evidence(root):
    return gather([root])


@pytest.fixture
def copied(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copied")


def arm(evidence, label):
    return next(one for one in evidence.arms if one.label == label)


def change(root, arm, edit):
    """Rewrite every result of an arm."""
    for path in sorted(root.glob(f"arms/{arm}/clips/*/result.json")):
        result = read_json(path)
        assert result is not None
        edit(result)
        write_json(path, result)


def worsen(by):
    def edit(result):
        result["scores"]["psnr"]["mean"] -= by

    return edit


# The answer


def test_the_answer_names_the_best_method_with_its_interval(evidence):
    found = answer(evidence)
    gain = arm(evidence, "lora").difference("psnr")
    assert gain is not None and gain.low is not None
    assert (found.verdict, found.arm) == ("helped", "lora")
    assert found.sentence == (
        f"Adapting helped: lora, the best of 4 methods, raises PSNR by {gain.mean:.2f} dB [{gain.low:+.2f}, {gain.high:+.2f}] over "
        f"the unadapted model on 40 clips, and is better on {100 * gain.win_rate:.0f} % of them."
    )
    remarks = " ".join(found.remarks)
    assert "corrected for 6 comparisons" in remarks
    assert "Placebo, adapted on another clip: " in remarks and "Placebo, a random change of equal norm: " in remarks
    assert "SSIM agrees: +" in remarks and "LPIPS agrees: -" in remarks


def test_what_goes_beyond_a_placebo_is_paired_with_it(evidence):
    own, other = (arm(evidence, name).gains("psnr") for name in ("lora", "lora-other_clip"))
    beyond = np.mean([own[clip] - other[clip] for clip in own])
    assert any(f"lora gains {beyond:+.2f} [" in remark for remark in answer(evidence).remarks)


def test_harm_and_doubt_are_said(copied):
    for name in ("full", "full_5", "lora", "delta"):
        change(copied, name, worsen(3.0))
    found = answer(gather([copied]))
    assert found.verdict == "hurt"
    assert re.match(r"Adapting hurt: even lora, the best of 4 methods, lowers PSNR by 2\.\d\d dB \[-", found.sentence)
    assert any("stays below holding the last known frame" in remark for remark in found.remarks)

    for name in ("full", "full_5", "lora", "delta"):
        change(copied, name, worsen(-3.0))
    noise = iter(np.random.default_rng(0).normal(0, 2, 10_000))
    for name in ("full", "full_5", "lora", "delta"):
        change(copied, name, lambda result: worsen(0.3 + next(noise))(result))
    found = answer(gather([copied]))
    assert found.verdict == "unclear" and found.sentence.startswith("No clear effect: ")
    assert any("would show in 80 % of such runs" in remark for remark in found.remarks)


def test_seeds_separate_the_samplers_noise_from_the_clips(root, tmp_path):
    second = write_synthetic_run(tmp_path / "two", CLIPS, seed=1)
    both = gather([root, second])
    assert both.seeds == [0, 1] and len(both.clips) == CLIPS
    (said,) = (remark for remark in answer(both).remarks if "from seed" in remark)
    between, sampling = map(float, re.findall(r"by (\d\.\d\d) dB", said))
    assert sampling == pytest.approx(0.15, abs=0.05) and between > sampling


# Costs and curves


def test_the_front_is_what_nothing_beats():
    points = {"a": (1.0, 1.0), "b": (2.0, 0.5), "c": (2.0, 3.0), "d": (3.0, 3.0), "e": (0.5, 0.0), "f": (2.0, 3.0)}
    assert series.pareto_front(points) == ["e", "a", "c", "f"]


def test_fronts_hold_the_baseline_and_no_placebo(evidence):
    assert series.front(evidence, "adapt", "psnr")[0] == "baseline"
    assert series.front(evidence, "adapt", "psnr")[-1] == "lora"
    assert not any("-" in label for cost in series.COSTS for label in series.front(evidence, cost, "lpips"))
    assert series.front(evidence, "memory", "lpips") == series.front(evidence, "memory", "psnr")  # less LPIPS is better


def test_steps_alone_make_a_family(evidence):
    families = {one.label: series.family_of(one) for one in evidence.arms}
    assert families["full"] == families["full_5"]
    assert len({families[name] for name in ("full", "lora", "delta", "lora-random")}) == 4


def test_curves_over_frames_are_means_over_pairs(evidence):
    lora = arm(evidence, "lora")
    value, gain = series.frame_curves(evidence, lora, "psnr")
    assert value is not None and gain is not None
    frames = [result["scores"]["psnr"]["frames"] for result in lora.results.values()]
    before = [result["scores"]["psnr"]["frames"] for result in evidence.baseline.results.values()]
    assert value.mean == pytest.approx(np.mean(frames, 0), rel=1e-6)
    assert gain.mean == pytest.approx(np.mean(frames, 0) - np.mean(before, 0), abs=1e-5)
    assert all(low < mean < high for low, mean, high in zip(gain.low, gain.mean, gain.high, strict=True))
    assert series.scored_frames(evidence) == (23, [34])


def test_curves_of_steps_may_end_early_and_may_be_pairs(copied):
    (first, *_) = sorted(copied.glob("arms/lora/clips/*/result.json"))
    result = read_json(first)
    assert result is not None
    result["adaptation"]["losses"] = result["adaptation"]["losses"][:5]
    write_json(first, result)

    def look(result):
        result["adaptation"]["held_out"] = [[0, 1.0], [10, 0.5]]

    change(copied, "lora", look)
    curves = series.step_curves(arm(gather([copied]), "lora"))
    assert len(curves["losses"].median) == 20
    assert all(map(np.isfinite, curves["losses"].median))
    assert (curves["held_out"].at, curves["held_out"].median) == ([0, 10], [1.0, 0.5])


def test_curves_of_diagnostics_are_means_over_levels_and_clips(copied):
    for path in copied.glob("arms/lora/clips/*"):
        levels = {"losses": [[1.0, 3.0], [0.5, None]], "kl": [[0.0, 0.0], [0.1, 0.3]]}
        apart = {"distances": [{"master": 9, "effective": 0.0}, {"master": 9, "effective": 2.0}]}
        forgetting = {"forgetting": {"x": {"before": {"losses": [1.0]}, "after": {"losses": [2.0, 4.0]}}}}
        write_json(path / "curves.json", {"steps": [0, 20], **levels, **apart, **forgetting})
    curves = series.step_curves(arm(gather([copied]), "lora"))
    found = {name: (curve.at, curve.median) for name, curve in curves.items()}
    assert found["fixed_losses"] == ([0], [2.0])  # a number that was not finite leaves its step out
    assert found["kl"] == ([0, 20], pytest.approx([0, 0.2]))
    assert found["distances"] == ([0, 20], [0, 2])
    assert found["forgetting"] == ([0, 20], [1, 3])


def test_a_search_becomes_a_grid_with_its_best_cell_and_those_that_moved_little(tmp_path):
    cells = [
        {"arm": f"a{k}", "steps": s, "lr": lr, "difference": k / 10, "low": 0.0, "high": 1.0, "few_moved": k == 0}
        for k, (s, lr) in enumerate([(5, 1e-6), (5, 1e-5), (10, 1e-6)])
    ]
    axes = {"steps": [5, 10], "lr": [1e-6, 1e-5]}
    write_json(tmp_path / "search.json", {"metric": "psnr", "axes": axes, "cells": cells, "best": "a2"})
    (grid,) = read_searches([tmp_path])
    assert (grid["x_name"], grid["y_name"], grid["x"]) == ("lr", "steps", ["1e-06", "1e-05"])
    assert grid["z"] == [[0.0, 0.1], [0.2, None]] and grid["chosen"] == [[0, 1]]
    assert grid["text"][0] == ["+0.00 •\n[+0.00, +1.00]", "+0.10\n[+0.00, +1.00]"] and grid["text"][1][1] == ""
    third = {"rank": [4, 8], **axes}
    write_json(
        tmp_path / "search.json",
        {"metric": "lpips", "axes": third, "cells": [{**c, "rank": 8} for c in cells], "best": "a2"},
    )
    empty, full = read_searches([tmp_path])
    assert empty["z"] == [[None, None], [None, None]] and full["z"] == grid["z"] and full["better"] == -1
    assert full["title"] == "LPIPS difference, at rank 8"


# Clips by kind


def test_complexity_of_flat_still_and_lively_videos():
    x = torch.linspace(-1, 1, 32).expand(3, 4, 24, 32)
    assert compute_complexity(torch.zeros(3, 4, 24, 32)) == {"spatial_information": 0, "temporal_information": 0}
    ramp = compute_complexity(x)  # the same slope everywhere: no spread of edges
    assert ramp["spatial_information"] == pytest.approx(0, abs=1e-6) and ramp["temporal_information"] == 0
    step = torch.where(x > 0, 1.0, -1.0)
    # Of 30 columns two have a gradient of 4 (weights 1, 2, 1 over a step of 1), the others none.
    assert compute_complexity(step)["spatial_information"] == pytest.approx(np.std([4, 4, *[0] * 28]))
    moving = torch.stack([step[:, 0].roll(k, dims=-1) for k in range(4)], dim=1)
    assert compute_complexity(moving)["temporal_information"] > 0
    with pytest.raises(ValueError, match=r"video is \[3, 1, 24, 32\]; complexity needs"):
        compute_complexity(x[:, :1])


def test_lively_clips_gain_less_and_categories_are_ordered(evidence):
    lora = arm(evidence, "lora")
    assert set(kinds_of(evidence)) == {"spatial_information", "temporal_information", "motion_db"}
    rho, _, n = correlations(evidence, lora)["temporal_information"]
    assert rho < 0 and n == CLIPS
    found = by_category(evidence, lora)
    assert {one.name for one in found} == set(CATEGORIES)
    assert [one.gain.mean for one in found] == sorted((one.gain.mean for one in found), reverse=True)
    assert sum(one.gain.n for one in found) == CLIPS


def test_clusters_part_the_clips_by_what_they_gain(evidence):
    found = clusters(evidence, arm(evidence, "lora"))
    assert [one.name for one in found] == ["gain least", "in between", "gain most"]
    assert sorted(clip for one in found for clip in one.clips) == list(evidence.clips)
    gains = [one.gain["psnr"] for one in found]
    assert gains == sorted(gains) and gains[0] < gains[2] - 0.3
    assert found == clusters(evidence, arm(evidence, "lora"))


# Tables

TRICKY = Table("t", "c", [("a_b", ""), ("Δ", "")], [[Cell("x|y\n\\z", "x|y\n\\z"), Cell(1.5, "+1.50 [+1.00, +2.00]")]])


def test_tables_in_three_forms():
    assert to_csv(TRICKY) == 'a_b,Δ\n"x|y\n\\z","+1.50 [+1.00, +2.00]"\n'
    assert to_markdown(TRICKY).splitlines()[2] == r"| x\|y \\z | +1.50 [+1.00, +2.00] |"
    assert "\\begin{tabular}{lr}\n\\toprule\na\\_b & $\\Delta$ \\\\\n" in to_latex(TRICKY)
    assert latex("50% & <a_b> {#1} $x$ ~^\\") == (
        r"50\% \& \textless{}a\_b\textgreater{} \{\#1\} \$x\$ \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert latex("[x]") == "{[x]}"  # after a line's \\ a bracket would be an option


def test_the_table_of_methods(evidence):
    made = tables.methods_table(evidence)
    heads = [title for title, _ in made.columns]
    rows = {row[0].text: dict(zip(heads, row, strict=True)) for row in made.rows}
    assert list(rows)[:3] == ["copy last frame", "VAE ceiling", "baseline"]
    assert rows["lora"]["Δ PSNR"].tone == rows["lora"]["Δ LPIPS"].tone == "better"
    assert rows["full"]["clips"].value == CLIPS - 2 and len(evidence.common) == CLIPS - 2
    assert rows["lora-random"]["method"].text == "placebo: a random change of equal norm"
    assert (rows["full"]["parameters"].text, rows["lora"]["peak GiB"].text) == ("1,207,959,680", "22.20")


def test_a_row_a_clip_with_its_metadata_and_improvement(evidence):
    lora = arm(evidence, "lora")
    rows = list(csv.DictReader(io.StringIO(tables.clips_csv(evidence, lora))))
    assert [row["clip"] for row in rows] == list(evidence.clips)
    gains = lora.gains("psnr")
    assert [float(row["lora_gain_psnr"]) for row in rows] == pytest.approx(list(gains.values()))
    assert {row["meta_class"] for row in rows} == set(CATEGORIES)
    assert {row["cluster"] for row in rows} == {"gain least", "in between", "gain most"}


# Files


def test_numbers_of_the_page_are_json_and_videos_relative(evidence, root):
    page = root / "deep" / "er" / "page.html"
    video = RunDirectory(root).clip("lora", next(iter(evidence.clips))) / "video.mp4"
    video.write_bytes(b"")
    found = payload(evidence, page, arm(evidence, "lora"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["clips"]["videos"]["lora"][0] == f"../../arms/lora/clips/{video.parent.name}/video.mp4"
    assert found["clips"]["videos"]["lora"][1] is None
    video.unlink()


def test_the_same_results_give_the_same_page_and_figures(evidence, tmp_path, monkeypatch):
    found, every = answer(evidence), figures._figures
    monkeypatch.setattr(figures, "_figures", lambda *given: itertools.islice(every(*given), 2))
    assert render(evidence, found, tmp_path / "p.html") == render(evidence, found, tmp_path / "p.html")
    captions = [write_figures(evidence, arm(evidence, "lora"), tmp_path / name) for name in ("a", "b")]
    assert captions[0] == captions[1] and len(captions[0]) == 2
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert path.read_bytes()[:5] in (b"<?xml", b"%PDF-")


def test_the_command_writes_the_page_and_the_papers_folder(root, tmp_path, capsys):
    out, folder = tmp_path / "report.html", tmp_path / "paper"
    assert cli.main(["report", str(root), "--out", str(out), "--figures", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Adapting helped: lora") and f"report: {out} (" in said
    source = (folder / "results.tex").read_text()
    for name in re.findall(r"\\(?:input|includegraphics\[[^]]*\])\{([^}]+)\}", source):
        assert (folder / name).exists(), name
    assert source.count("\\begin{figure}") >= 16 and source.count("\\begin{table*}") == 6
    assert 'href="paper/results.tex"' in out.read_text()


def test_what_cannot_be_reported_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no finished result lies in it" in capsys.readouterr().err
