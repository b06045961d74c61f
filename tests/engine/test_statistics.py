"""Each statistic against an independent one: scipy, a plain loop, a closed form or a simulation of known truth."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from vidtta.bench.coverage import coverage, draw, percentile_interval
from vidtta.engine.statistics import holm, paired_difference, sign_flip_p_value, variance_components
from vidtta.engine.statistics.bootstrap import (
    bootstrap_t_interval,
    cluster,
    resampled_moments,
    standard_error,
    widened_interval,
)
from vidtta.engine.statistics.student import t_quantile


def differences(n=30, seed=0):
    return draw("skewed", (n,), np.random.default_rng(seed)) + 0.3


def compare(values, clusters=None, **settings):
    return paired_difference(values, np.zeros(len(values)), clusters, **settings)


# Student's t


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 1940])
def test_quantiles_of_t_are_scipys(degrees):
    for probability in (0.01, 0.3, 0.5, 0.8, 0.975, 0.9999):
        expected = stats.t.ppf(probability, degrees)
        assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)


# Bootstrap


def test_resampled_means_are_scipys_bootstrap():
    values = differences()
    found = percentile_interval(cluster(values), resampled_moments(cluster(values), 0, 50_000))
    expected = stats.bootstrap((values,), np.mean, n_resamples=50_000, method="percentile", rng=1)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.02 * np.ptp(found))


def test_bootstrap_t_is_a_plain_loop_over_clusters_of_unequal_size():
    values, names = differences(20), np.array(list("aaaabbbbbccdddeeefgh"))
    mean, groups = values.mean(), [values[names == name] for name in np.unique(names)]

    def error_of(drawn):
        m, n = np.concatenate(drawn).mean(), sum(map(len, drawn))
        residual = sum(float((g - m).sum()) ** 2 for g in drawn)
        return math.sqrt(residual * len(drawn) / (len(drawn) - 1)) / n

    generator, quotients = np.random.default_rng(1), []
    for _ in range(20_000):
        drawn = [groups[i] for i in generator.integers(len(groups), size=len(groups))]
        quotients.append((np.concatenate(drawn).mean() - mean) / error_of(drawn))
    low, high = np.quantile(quotients, [0.025, 0.975])
    expected = mean - high * error_of(groups), mean - low * error_of(groups)
    data = cluster(values, names)
    assert standard_error(data) == pytest.approx(error_of(groups))
    found = bootstrap_t_interval(data, resampled_moments(data, 0, 20_000), 0.95)
    assert found == pytest.approx(expected, abs=0.03 * (expected[1] - expected[0]))


def test_the_interval_contains_students_t_and_bootstrap_t():
    data = cluster(differences(12))
    resampled = resampled_moments(data, 0, 10_000)
    low, high = widened_interval(data, resampled, 0.9)
    t = stats.t.interval(0.9, 11, data.mean, stats.sem(data.sums))
    b = bootstrap_t_interval(data, resampled, 0.9)
    assert (low, high) == pytest.approx((min(t[0], b[0]), max(t[1], b[1])))
    assert b[0] > t[0] and b[1] > t[1]  # skewed: each is the wider one on one side


@pytest.mark.parametrize("n", [2, 3])
def test_where_bootstrap_t_has_no_end_students_t_stands_alone(n):
    values = differences(n)
    found = compare(values)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values)))


@pytest.mark.parametrize(("kind", "n", "size"), [("normal", 8, 1), ("skewed", 40, 1), ("heavy-tailed", 60, 5)])
def test_intervals_cover_what_the_table_says(kind, n, size):
    share = coverage(kind, n, size, trials=400, resamples=500)
    assert share["chosen"][0] > 0.91
    assert share["chosen"][0] > share["percentile"][0] + 0.02


def test_a_difference_of_the_smallest_detectable_size_is_found_four_times_in_five():
    generator, n, found = np.random.default_rng(0), 20, 0
    true = (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) / math.sqrt(n)
    for _ in range(2000):
        values = generator.standard_normal(n) + true
        found += float(stats.ttest_1samp(values, 0)[1]) < 0.05  # pyright: ignore[reportArgumentType]
    assert found / 2000 == pytest.approx(0.8, abs=0.03)
    assert compare(values).smallest_detectable == pytest.approx(true * values.std(ddof=1))


# A paired difference


def test_what_a_difference_says():
    treated, baseline = [3.0, 5.0, 2.0, 8.0], [1.0, 5.0, 4.0, 4.0]  # differences 2, 0, -2, 4
    found = paired_difference(treated, baseline)
    assert (found.n, found.clusters, found.mean, found.win_rate, found.confidence) == (4, 4, 1.0, 0.625, 0.95)
    assert found.effect_size == pytest.approx(1 / np.std([2, 0, -2, 4], ddof=1))
    assert found.standard_error == pytest.approx(stats.sem([2, 0, -2, 4]))
    assert found.low < 1 < found.high
    assert found.warning.startswith("only 4 independent clips")
    less_is_better = paired_difference(treated, baseline, better="lower")
    assert (less_is_better.win_rate, less_is_better.mean, less_is_better.low) == (0.375, 1.0, found.low)


def test_paired_beats_unpaired():
    generator = np.random.default_rng(0)
    baseline = generator.normal(25, 4, 40)  # clips differ much, and the method adds a little to each
    treated = baseline + generator.normal(0.3, 0.4, 40)
    assert float(stats.ttest_ind(treated, baseline)[1]) > 0.5  # pyright: ignore[reportArgumentType]
    found = paired_difference(treated, baseline)
    assert found.low > 0 and found.p_value < 0.001 and found.warning == ""


def test_the_same_seed_gives_the_same_numbers_and_the_order_of_names_does_not_matter():
    values = differences()
    assert compare(values, seed=3) == compare(values, seed=3)
    assert compare(values, seed=3).high != compare(values, seed=4).high
    names = [f"g{i % 7}" for i in range(30)]
    renamed = [f"h{i % 7}" for i in range(30)]
    assert compare(values, names) == compare(values, renamed)


def test_clips_of_a_group_that_agree_count_once():
    values = differences(12)
    alone = compare(values)
    copied = compare(np.repeat(values, 5), np.repeat(list("abcdefghijkl"), 5))
    assert (copied.n, copied.clusters) == (60, 12)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert copied.p_value == alone.p_value
    taken_for_independent = compare(np.repeat(values, 5))
    assert taken_for_independent.high - taken_for_independent.low < 0.6 * (copied.high - copied.low)
    assert copied.warning.startswith("only 12 independent groups")


def test_a_tiny_spread_about_a_large_mean_keeps_its_interval():
    values = differences(40)
    near, far = compare(values), compare(values * 1e-6 + 30)
    assert ((far.low - far.mean) / (near.low - near.mean)) == pytest.approx(1e-6, rel=1e-3)


def test_one_clip_has_no_interval():
    found = paired_difference([2.0], [1.0])
    assert (found.mean, found.low, found.high, found.effect_size, found.smallest_detectable) == (1, *[None] * 4)
    assert (found.p_value, found.win_rate) == (1.0, 1.0)
    assert found.warning == "only one independent clip, so there is no interval"
    assert compare([1.0, 2.0, 3.0], ["a", "a", "a"]).low is None


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3])
def test_equal_differences_have_an_interval_without_width_and_say_so(value):
    found = compare([value] * 7)
    assert found.low == found.high == found.mean == pytest.approx(value, abs=1e-15)
    assert found.effect_size is None
    assert found.warning == "all 7 clips show the same difference, so the interval has no width"
    assert found.win_rate == (0.5 if value == 0 else value > 0)


def test_ties_with_a_single_difference():
    found = compare([0.0] * 39 + [1.0])
    assert found.low <= 0 < found.high
    assert found.win_rate == pytest.approx(0.5 + 0.5 / 40)
    assert found.p_value == 1


@pytest.mark.parametrize(
    ("treated", "baseline", "clusters", "says"),
    [
        ([], [], None, "^0 treated and 0 baseline values; give as many of each$"),
        ([1.0], [1.0, 2.0], None, "^1 treated and 2 baseline values; give as many of each$"),
        ([1.0], [1.0], ["a", "b"], "^1 treated and 1 baseline values and 2 clusters; give as many of each$"),
        ([math.nan], [1.0], None, "must be finite"),
    ],
)
def test_values_that_are_no_pairs_are_refused(treated, baseline, clusters, says):
    with pytest.raises(ValueError, match=says):
        paired_difference(treated, baseline, clusters)


# Permutation and correction


@pytest.mark.parametrize("n", [5, 11])
def test_all_sign_flips_are_scipys_permutation_test(n):
    values = differences(n)
    expected = stats.permutation_test(
        (values, np.zeros(n)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True
    )
    assert sign_flip_p_value(cluster(values)) == pytest.approx(expected.pvalue)


def test_drawn_sign_flips_come_near_all_of_them_and_are_never_zero():
    values = differences(12, seed=2)
    exact, drawn = (sign_flip_p_value(cluster(values), 0, resamples) for resamples in (2**12, 2**12 - 1))
    assert exact != drawn
    assert drawn == pytest.approx(exact, abs=0.02)
    assert sign_flip_p_value(cluster(np.ones(50)), 0, 999) == 1 / 1000


def test_under_no_difference_p_values_are_uniform():
    generator = np.random.default_rng(0)
    p_values = [sign_flip_p_value(cluster(generator.standard_t(3, 10))) for _ in range(1000)]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.05)


def test_holms_own_steps():
    corrected = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06, "d": 0.02})
    assert list(corrected) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


# Variance


def test_variance_components_of_balanced_data_are_the_analysis_of_variance():
    generator = np.random.default_rng(0)
    table = generator.normal(0, 2, (9, 1)) + generator.normal(0, 1, (9, 4))
    found = variance_components({str(i): row for i, row in enumerate(table)})
    ratio = stats.f_oneway(*table).statistic
    assert found.sampling == pytest.approx(table.var(axis=1, ddof=1).mean())
    assert found.between_clips == pytest.approx((ratio - 1) * found.sampling / 4)
    assert (found.clips, found.values) == (9, 36)
    assert found.standard_error(9, 4) == pytest.approx(math.sqrt(table.mean(axis=1).var(ddof=1) / 9))
    assert found.clip_share == pytest.approx(found.between_clips / (found.between_clips + found.sampling))


def test_variance_components_are_unbiased_where_seeds_are_missing():
    generator, found = np.random.default_rng(0), []
    for _ in range(1500):
        clips = {
            str(i): generator.normal(0, 2) + generator.normal(0, 1, size)
            for i, size in enumerate([1, 2, 5, 3, 7, 2, 4, 1])
        }
        found.append(variance_components(clips))
    assert np.mean([f.sampling for f in found]) == pytest.approx(1, rel=0.05)
    assert np.mean([f.between_clips for f in found]) == pytest.approx(4, rel=0.1)


def test_no_variance_between_clips_is_zero_and_not_below():
    found = variance_components({"a": [0.0, 1.0], "b": [1.0, 0.0]})
    assert (found.between_clips, found.sampling, found.clip_share) == (0, 0.5, 0)
    assert variance_components({"a": [1.0, 1.0], "b": [1.0]}).clip_share is None


@pytest.mark.parametrize("values", [{"a": [1.0, 2.0]}, {"a": [1.0], "b": [2.0]}, {"a": [1.0, 2.0], "b": []}])
def test_variance_components_need_clips_and_seeds(values):
    with pytest.raises(ValueError, match="it takes two clips, and two values on one of them"):
        variance_components(values)


def test_statistics_need_numpy_alone():
    absent = ("torch", "pydantic", "av", "lpips", "scipy", "cv2", "rich")
    program = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport vidtta.engine.statistics"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
