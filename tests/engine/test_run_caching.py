"""Runs with the feature cache: what they record, that a resume makes the same bits, and what they are not mixed with."""

import csv

import pytest
from vidtta.engine import cli

from .tiny_run import DELTA, one_sentence, tiny_lab

LORA = {"kind": "lora", "steps": 2, "rank": 2, "lr": 1e-2}
CACHED = {"steps": 2, "cache_every": 2, "cache_first": 1}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"delta": DELTA, "lora": LORA}
        yield lab


@pytest.fixture(scope="module")
def cached(lab):
    assert lab.run("cached", sampler=CACHED) == 0
    return lab.results("cached")


@pytest.fixture(scope="module")
def exact(lab):
    assert lab.run("exact") == 0
    return lab.results("exact")


def test_results_say_what_was_reused(lab, cached, exact):
    assert cached.keys() == exact.keys() and len(cached) == 6
    for key, result in cached.items():
        arm, clip = key.split("/")
        assert result["settings"]["protocol"]["sampler"]["cache_every"] == 2
        assert result["paths"]["feature_cache"] == "every 2 steps after 1 layers"
        # Two layers and three branches; at the second of two steps one layer is reused.
        assert lab.result("cached", arm, clip)["cost"]["layers"] == {"computed": 9, "reused": 3}
        assert result["generated"] != exact[key]["generated"]
        assert "cache_every" not in exact[key]["settings"]["protocol"]["sampler"]
        assert "feature_cache" not in exact[key]["paths"] and "layers" not in lab.result("exact", arm, clip)["cost"]
    with (lab.root / "cached" / "summary.csv").open() as handle:
        paths = [row["paths"] for row in csv.DictReader(handle) if row["paths"]]
    assert len(paths) == 6 and all("features cached every 2 steps after 1 layers" in path for path in paths)


def test_a_result_made_again_has_the_same_bits(lab, cached):
    for arm, clip in (("baseline", "ball"), ("lora", "wave")):
        (lab.root / "cached" / "arms" / arm / "clips" / clip / "result.json").unlink()
    assert lab.run("cached", sampler=CACHED) == 0
    assert lab.results("cached") == cached


def test_another_setting_in_one_run_is_refused(lab, cached, exact, capsys):
    assert lab.run("cached") == 2
    assert "(protocol.sampler.cache_every: was 2, now null); choose another output_dir" in one_sentence(capsys)
    assert lab.run("exact", sampler=CACHED) == 2
    assert "(protocol.sampler.cache_every: was null, now 2); choose another output_dir" in one_sentence(capsys)
    assert lab.run("cached", sampler=CACHED | {"cache_first": 0}) == 2
    assert "(protocol.sampler.cache_first: was 1, now 0); choose another output_dir" in one_sentence(capsys)


def test_comparing_with_another_setting_is_refused(lab, cached, exact, capsys):
    assert cli.main(["compare", str(lab.root / "exact"), str(lab.root / "cached")]) == 2
    assert "its protocol is not that of" in (sentence := one_sentence(capsys))
    assert "(sampler.cache_every: was null, now 2)" in sentence


def test_a_baseline_of_another_setting_is_refused(lab, cached, exact, capsys):
    """Without the baseline of its own, the arm of a cached run finds none to be compared with in an exact one."""
    for clip in ("ball", "wave"):
        theirs = (lab.root / "exact" / "arms" / "baseline" / "clips" / clip / "result.json").read_bytes()
        mine = lab.root / "cached" / "arms" / "baseline" / "clips" / clip / "result.json"
        kept = mine.read_bytes()
        mine.write_bytes(theirs)
        try:
            assert cli.main(["compare", str(lab.root / "cached")]) == 2
            assert "sampler.cache_" in one_sentence(capsys)
        finally:
            mine.write_bytes(kept)


def test_more_layers_than_the_network_has_are_refused_before_the_first_clip(lab, capsys):
    assert lab.run("all", sampler=CACHED | {"cache_first": 2}) == 2
    assert one_sentence(capsys) == (
        "error: sampler.cache_first should be below the network's 2 layers, was 2: none would be cached; lower it, or set "
        "sampler.cache_every=1"
    )
    assert not (lab.root / "all").exists()
