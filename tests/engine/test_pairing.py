"""Two arms' results as pairs, and what is refused."""

import math

import pytest
from vidtta.engine.errors import UserError
from vidtta.engine.statistics import pair_results, paired_difference


def result(clip, psnr, arm="full", seed=0, *, content="v", meta=None, size=480):
    return {
        "clip": clip,
        "arm": arm,
        "caption": f"{clip}.",
        "start": 0.0,
        "meta": meta or {},
        "keys": {"protocol": f"{size} {seed}", "clip": f"{content} {clip}"},
        "settings": {"protocol": {"seed": seed, "size": [size, 640]}},
        "seeds": {"recipe": seed, "sampling": 7 + seed},
        "scores": {"psnr": {"mean": psnr}, "lpips": {"mean": None if math.isnan(psnr) else 1 / psnr}},
    }


def base(clip, psnr, seed=0, **more):
    return result(clip, psnr, "baseline", seed, **more)


def test_pairs_by_clip_whatever_the_order():
    pairs = pair_results(
        [result("c", 23.0), result("a", 21.0), result("b", 22.0)], [base("a", 20.0), base("b", 20.0), base("c", 20.0)]
    )
    assert pairs.clips == ["a", "b", "c"]
    assert pairs.differences("psnr") == {"a": [1.0], "b": [2.0], "c": [3.0]}
    assert pairs.compare("psnr") == paired_difference([1.0, 2.0, 3.0], [0.0] * 3)
    assert (pairs.missing_in_treated, pairs.missing_in_baseline) == ((), ())
    lpips = pairs.compare("lpips")
    assert lpips is not None and lpips.mean < 0 and lpips.win_rate == 1  # less is better


def test_clips_that_one_arm_lacks_are_named():
    pairs = pair_results([result("a", 21.0), result("b", 21.0)], [base("b", 20.0), base("c", 20.0)])
    assert pairs.clips == ["b"]
    assert (pairs.missing_in_treated, pairs.missing_in_baseline) == ((("c", 0),), (("a", 0),))
    nothing = pair_results([result("a", 21.0)], [base("c", 20.0)])
    assert (nothing.clips, nothing.compare("psnr")) == ([], None)


def test_seeds_of_a_clip_are_averaged_first():
    treated = [result("a", 21.0, seed=0), result("a", 23.0, seed=1), result("b", 24.0, seed=1)]
    pairs = pair_results(treated, [base(clip, 20.0, seed) for clip in "ab" for seed in (0, 1)])
    assert pairs.differences("psnr") == {"a": [1.0, 3.0], "b": [4.0]}
    assert pairs.missing_in_treated == (("b", 0),)
    found = pairs.compare("psnr")
    assert found is not None and (found.n, found.mean) == (2, 3.0)


def test_groups_of_a_class_are_clusters_and_clips_without_one_stand_alone():
    metas = [{"class": c, "group": g} for c, g in (("Archery", "1"), ("Archery", "1"), ("Biking", "1"))] + [{}]
    results = [result(str(i), 21.0 + i, meta=meta) for i, meta in enumerate(metas)]
    found = pair_results(results, [base(str(i), 20.0) for i in range(4)]).compare("psnr")
    assert found is not None and (found.n, found.clusters) == (4, 3)
    assert found == paired_difference([1.0, 2.0, 3.0, 4.0], [0.0] * 4, ["Archery/1", "Archery/1", "Biking/1", "3"])


def test_a_score_that_a_result_lacks_gives_no_comparison():
    pairs = pair_results([result("a", math.nan)], [base("a", 20.0)])
    assert (pairs.compare("lpips"), pairs.compare("no such score")) == (None, None)


@pytest.mark.parametrize(
    ("treated", "says"),
    [
        (result("a", 21.0, size=240), r"protocol\.size: was \[480, 640\], now \[240, 640\]"),
        (result("a", 21.0, content="swapped"), 'video: was "v a", now "swapped a"'),
        (result("a", 21.0) | {"caption": "A dog."}, r'caption: was "a\.", now "A dog\."'),
        (result("a", 21.0) | {"start": 1.0}, r"start: was 0\.0, now 1\.0"),
        (result("a", 21.0) | {"seeds": {"recipe": 0, "sampling": 8}}, r"seeds\.sampling: was 7, now 8"),
    ],
)
def test_what_does_not_belong_together_is_refused(treated, says):
    with pytest.raises(UserError, match=rf"^clip a: arms baseline and full cannot be compared \({says}\); run both"):
        pair_results([treated], [base("a", 20.0)])


def test_other_seeds_and_two_results_of_one_clip_are_refused():
    with pytest.raises(UserError, match=r"the seeds are \[1\] in one arm and \[0\] in the other"):
        pair_results([result("a", 21.0, seed=1)], [base("a", 20.0)])
    with pytest.raises(UserError, match="clip a: arm full has two results with the seed 0; leave out one of the runs"):
        pair_results([result("a", 21.0), result("a", 22.0)], [base("a", 20.0)])
