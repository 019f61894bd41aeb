"""Bounds and weights of every objective against numpy and scipy in 64 bit, at the extremes, and by their identities."""

import inspect

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logsumexp, softmax

import command_line
from losses import (
    OBJECTIVES,
    TARGETS,
    build_objective,
    effective_sample_size,
    gather_samples,
    iwae_bound,
    jackknife,
    normalized_weights,
    resample,
)

BETA, GROUPS, ALPHA = 0.3, 2, 0.4
KEYWORDS = {"beta": BETA, "groups": GROUPS, "alpha": ALPHA}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def takes(name):
    """The names of an objective's own parameters."""
    return list(inspect.signature(OBJECTIVES[name]).parameters)[1:]


def objective(name, **keywords):
    """The objective as a function of log_w, with this file's parameters unless told otherwise."""
    return build_objective(name, **{key: (KEYWORDS | keywords)[key] for key in takes(name)})


def evaluate(name, log_w, jit_compile=False, **keywords):
    """bound [batch], decoder, path, score [k, batch] of an objective, as numpy arrays; 0 for no score term."""
    function = objective(name, **keywords)
    estimate = (tf.function(function, jit_compile=True) if jit_compile else function)(tf.constant(log_w))
    return [np.zeros_like(log_w) if part is None else part.numpy() for part in estimate]


def log_mean_exp(log_w):
    return logsumexp(log_w, axis=0) - np.log(len(log_w))


def reference(name, log_w):
    """The table of objectives once more, in numpy and 64 bit: bound, decoder, path, score."""
    k = len(log_w)
    u, w, v = np.full_like(log_w, 1 / k), softmax(log_w, axis=0), softmax((1 - ALPHA) * log_w, axis=0)
    c, g, grouped, zero = BETA * u + (1 - BETA) * w, np.zeros_like(w), [], np.zeros_like(w)
    for first in range(GROUPS):  # sample i belongs to group i modulo GROUPS
        group = log_w[first::GROUPS]
        g[first::GROUPS] = softmax(group, axis=0) / GROUPS
        grouped.append(log_mean_exp(group))
    elbo, l_k, miwae = log_w.mean(axis=0), log_mean_exp(log_w), np.mean(grouped, axis=0)
    vr = log_mean_exp((1 - ALPHA) * log_w) / (1 - ALPHA)
    return {
        "vae": (elbo, u, u, -u),
        "iwae": (l_k, w, w, -w),
        "stl": (l_k, w, w, zero),
        "dreg": (l_k, w, w**2, zero),
        "rws": (l_k, w, zero, w),
        "rws_dreg": (l_k, w, w * (1 - w), zero),
        "ciwae": (BETA * elbo + (1 - BETA) * l_k, c, c, -c),
        "miwae": (miwae, g, g, -g),
        "miwae_dreg": (miwae, g, GROUPS * g**2, zero),
        "piwae": (l_k, w, g, -g),
        "vr": (vr, v, v, -v),
        "vr_dreg": (vr, v, ALPHA * v + (1 - ALPHA) * v**2, zero),
    }[name]


def random_log_w(k=6, batch=4, scale=4.0, shift=-90.0):
    return shift + scale * np.random.default_rng(k).normal(size=(k, batch))


# ------------------------------------------------------------------------------------------ values, against scipy


@each_objective
@pytest.mark.parametrize("k", [2, 6, 50])
def test_bound_and_weights_are_those_of_the_table(name, k):
    log_w = random_log_w(k)
    for ours, theirs in zip(evaluate(name, log_w), reference(name, log_w), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-14)


@each_objective
def test_single_precision_is_kept_and_close(name):
    log_w = np.float32(random_log_w(10))
    for ours, theirs in zip(evaluate(name, log_w), reference(name, log_w.astype(float)), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


@each_objective
def test_eager_and_compiled_agree(name):
    log_w = random_log_w()
    for ours, theirs in zip(evaluate(name, log_w), evaluate(name, log_w, jit_compile=True), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@each_objective
def test_an_input_is_not_touched_by_the_others(name):
    """k is axis 0 and nothing is averaged over the batch before it is weighted (a bug of a peer)."""
    log_w = random_log_w(4, batch=3)  # k and batch differ: a wrong axis has a wrong shape, too
    for whole, alone in zip(evaluate(name, log_w), evaluate(name, log_w[:, 1:2]), strict=True):
        np.testing.assert_allclose(whole[..., 1:2], alone, rtol=1e-12)
        assert whole.shape[-1] == 3


def test_that_test_catches_weights_of_batch_averages(monkeypatch):
    def averaged(log_w):
        return OBJECTIVES["dreg"](tf.broadcast_to(tf.reduce_mean(log_w, axis=1, keepdims=True), tf.shape(log_w)))

    monkeypatch.setitem(OBJECTIVES, "averaged", averaged)
    with pytest.raises(AssertionError):
        test_an_input_is_not_touched_by_the_others("averaged")


def test_jackknife_is_the_leave_one_out_formula():
    for k in (2, 3, 20):
        log_w = np.concatenate([random_log_w(k), random_log_w(k, scale=40.0)], axis=1)
        left_out = [log_mean_exp(np.delete(log_w, i, axis=0)) for i in range(k)]
        expected = k * log_mean_exp(log_w) - (k - 1) * np.mean(left_out, axis=0)
        np.testing.assert_allclose(jackknife(tf.constant(log_w)), expected, rtol=1e-10)


def test_jackknife_keeps_its_digits_in_single_precision_at_k_5000():
    log_w = random_log_w(5000)
    np.testing.assert_allclose(jackknife(tf.constant(log_w, tf.float32)), jackknife(tf.constant(log_w)), atol=1e-4)


# ------------------------------------------------------------------------------------------ parameters


def test_the_command_line_knows_every_objective():
    assert command_line.OBJECTIVES == tuple(OBJECTIVES)


@each_objective
def test_every_objective_says_where_it_comes_from(name):
    lines = OBJECTIVES[name].__doc__.split("\n")
    assert "20" in OBJECTIVES[name].__doc__ and len(lines) >= 3, "a paper with its year, and a derivation"


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        *[("ciwae", "beta", value) for value in (-0.1, 1.1, float("nan"))],
        *[(name, "groups", value) for name in ("miwae", "miwae_dreg", "piwae") for value in (0, -2, 4, 7)],
        *[(name, "alpha", value) for name in ("vr", "vr_dreg") for value in (-0.1, 1.0, 2, float("nan"))],
    ],
)
def test_illegal_parameters_are_refused_by_name_and_value(name, parameter, value):
    with pytest.raises(ValueError, match=f"{parameter} = {value}"):
        evaluate(name, random_log_w(6), **{parameter: value})


def test_a_parameter_that_an_objective_lacks_or_needs_is_an_error():
    with pytest.raises(TypeError, match="beta"):
        build_objective("iwae", beta=0.5)(tf.zeros([2, 1]))
    with pytest.raises(TypeError, match="beta"):
        build_objective("ciwae", beta=None)(tf.zeros([2, 1]))
    assert build_objective("iwae", beta=None, groups=None)(tf.zeros([2, 1])).bound == 0


def test_jackknife_refuses_one_sample():
    with pytest.raises(ValueError, match="k = 2"):
        jackknife(tf.zeros([1, 3]))


# ------------------------------------------------------------------------------------------ ends meet


@pytest.mark.parametrize(
    ("name", "keywords", "end", "tolerance"),
    [
        ("ciwae", {"beta": 0}, "iwae", 0),
        ("ciwae", {"beta": 1}, "vae", 0),
        ("miwae", {"groups": 1}, "iwae", 0),
        ("miwae", {"groups": 6}, "vae", 0),
        ("miwae_dreg", {"groups": 1}, "dreg", 0),
        ("piwae", {"groups": 1}, "iwae", 0),
        ("vr", {"alpha": 0}, "iwae", 0),
        ("vr", {"alpha": 1 - 1e-6}, "vae", 1e-4),
        ("vr_dreg", {"alpha": 0}, "dreg", 0),
    ],
)
def test_ends_meet(name, keywords, end, tolerance):
    log_w = random_log_w(6)
    for ours, theirs in zip(evaluate(name, log_w, **keywords), evaluate(end, log_w), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=tolerance + 1e-14)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "rws" and "groups" not in takes(name)])
def test_with_one_sample_every_bound_is_the_elbo(name):
    log_w = random_log_w(1)
    bound, decoder, _, _ = evaluate(name, log_w)
    np.testing.assert_allclose(bound, log_w[0], rtol=1e-14)
    np.testing.assert_array_equal(decoder, 1)


# ------------------------------------------------------------------------------------------ extremes

EXTREMES = {
    "large": [1e4] * 3 + [9990.0],
    "small": [-1e4] * 3 + [-9990.0],
    "both": [1e4, -1e4, 0.0, 5.0],
    "equal": [-90.0] * 4,
    "dominant": [-90.0, -1e4, -1e4, -1e4],
}


@each_objective
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_log_weights_give_finite_bounds_and_weights(name, dtype, case):
    log_w = np.array(EXTREMES[case], dtype)[:, None]
    for part in evaluate(name, log_w):
        assert np.all(np.isfinite(part))
    assert np.isfinite(jackknife(tf.constant(log_w)).numpy())


IMPOSSIBLE_BOUNDS = {"vae": (1, 2), "ciwae": (1, 2), "miwae": (2,), "miwae_dreg": (2,)}


@each_objective
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("impossible", [1, 2], ids=["one sample", "one group"])
def test_impossible_samples_leave_every_weight_finite(name, dtype, impossible):
    """-inf is a sample of weight 0; a bound is -inf where it averages logarithms one of which is."""
    log_w = np.array([[-3.0], [-1.0], [-2.0], [-1.0]], dtype)
    log_w[1 : 2 * impossible : 2] = -np.inf  # samples 1 and 3 are the second group
    bound, *weights = evaluate(name, log_w)
    assert np.isfinite(weights).all()
    assert bound == -np.inf if impossible in IMPOSSIBLE_BOUNDS.get(name, ()) else np.isfinite(bound)
    np.testing.assert_allclose(weights[0].sum(), 1, rtol=1e-6)
    if name not in ("vae", "ciwae") and bound > -np.inf:
        assert weights[0][1] == 0
    assert np.isfinite(jackknife(tf.constant(log_w)).numpy())


@each_objective
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_nothing_but_impossible_samples_is_not_hidden(name, value):
    """The bound tells; the weights of -inf stay finite, so that no NaN of theirs names another culprit."""
    bound, *weights = evaluate(name, np.array([[value, -1.0]] * 4))
    assert not np.isfinite(bound[0]) and np.isfinite(bound[1])
    assert np.isfinite(weights).all() == (value == -np.inf or name == "vae")
    assert not np.isfinite(jackknife(tf.constant([[value]] * 4, tf.float32)).numpy())


@pytest.mark.parametrize(
    ("name", "keywords", "end"),
    [("ciwae", {"beta": 0}, "iwae"), ("miwae", {"groups": 1}, "iwae"), ("miwae", {"groups": 4}, "vae")]
    + [("piwae", {"groups": 1}, "iwae"), ("miwae_dreg", {"groups": 1}, "dreg"), ("vr", {"alpha": 0}, "iwae")],
)
def test_ends_meet_where_a_sample_is_impossible(name, keywords, end):
    log_w = np.array([[-3.0], [-np.inf], [-2.0], [-1.0]])
    for ours, theirs in zip(evaluate(name, log_w, **keywords), evaluate(end, log_w), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@each_objective
def test_a_single_nan_is_not_hidden(name):
    assert np.isnan(evaluate(name, np.array([[1.0], [np.nan], [2.0], [3.0]]))[0])


# ------------------------------------------------------------------------------------------ identities

log_weights = st.tuples(st.integers(1, 5), st.integers(1, 3)).flatmap(
    lambda shape: arrays(np.float64, (2 * shape[0], shape[1]), elements=st.floats(-200, 200, width=32))
)
property_test = settings(max_examples=20, deadline=None, derandomize=True, database=None)


@property_test
@given(log_weights)
def test_bounds_are_in_order(log_w):
    """ELBO <= every other bound <= L_k <= max log_w, and L_k loses at most log k of that maximum."""
    tolerance = 1e-10 * (1 + np.abs(log_w).max())
    elbo, l_k, top = evaluate("vae", log_w)[0], evaluate("iwae", log_w)[0], log_w.max(axis=0)
    assert np.all(l_k <= top + tolerance) and np.all(l_k >= top - np.log(len(log_w)) - tolerance)
    for name in OBJECTIVES:
        bound = evaluate(name, log_w)[0]
        assert np.all(elbo <= bound + tolerance) and np.all(bound <= l_k + tolerance)
    middle = [evaluate("vr", log_w, alpha=alpha)[0] for alpha in (0.0, 0.3, 0.6, 0.9)]
    assert np.all(np.diff(middle, axis=0) <= 10 * tolerance)


@property_test
@given(log_weights, st.floats(-1e3, 1e3))
def test_a_shift_of_all_log_weights_shifts_the_bound_and_no_weight(log_w, shift):
    for name in OBJECTIVES:
        (bound, *weights), (shifted, *unmoved) = evaluate(name, log_w), evaluate(name, log_w + shift)
        np.testing.assert_allclose(shifted, bound + shift, atol=1e-9)
        np.testing.assert_allclose(weights, unmoved, atol=1e-9)


@property_test
@given(log_weights, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(log_w, random):
    """Objectives with groups: the order within a group."""
    order = random.sample(range(len(log_w)), len(log_w))
    within = np.arange(len(log_w)).reshape(-1, GROUPS)
    for group in range(GROUPS):
        within[:, group] = random.sample(list(within[:, group]), len(within))
    for name in OBJECTIVES:
        permutation = within.ravel() if "groups" in takes(name) else order
        (bound, *weights), (same, *permuted) = evaluate(name, log_w), evaluate(name, log_w[permutation])
        np.testing.assert_allclose(same, bound, rtol=1e-12, atol=1e-10)
        np.testing.assert_allclose(np.array(weights)[:, permutation], permuted, atol=1e-10)


@property_test
@given(log_weights)
def test_weights_sum_to_what_the_table_says(log_w):
    """Decoder: 1, whence subsampling. Path and score of a reparameterised bound cancel."""
    ess, v_ess = (1 / effective_sample_size(tf.constant(each)).numpy() for each in (log_w, (1 - ALPHA) * log_w))
    group_ess = [1 / effective_sample_size(tf.constant(log_w[first::GROUPS])).numpy() for first in range(GROUPS)]
    sums = {"vae": (1, -1), "iwae": (1, -1), "ciwae": (1, -1), "miwae": (1, -1), "piwae": (1, -1), "vr": (1, -1)}
    sums |= {"stl": (1, 0), "dreg": (ess, 0), "rws": (0, 1), "rws_dreg": (1 - ess, 0)}
    sums |= {"miwae_dreg": (np.mean(group_ess, axis=0), 0), "vr_dreg": (ALPHA + (1 - ALPHA) * v_ess, 0)}
    assert set(sums) == set(OBJECTIVES)
    for name in OBJECTIVES:
        _, decoder, path, score = evaluate(name, log_w)
        assert decoder.min() >= 0
        np.testing.assert_allclose(decoder.sum(axis=0), 1, rtol=1e-12)
        path_sum, score_sum = sums[name]
        np.testing.assert_allclose(path.sum(axis=0), np.broadcast_to(path_sum, path.shape[1]), atol=1e-10)
        np.testing.assert_allclose(score.sum(axis=0), score_sum, atol=1e-10)


def test_rows_without_a_score_are_those_with_a_target_which_has_their_bound_and_decoder():
    log_w = random_log_w()
    assert set(TARGETS) == {name for name in OBJECTIVES if objective(name)(tf.constant(log_w)).score is None}
    for name, target in TARGETS.items():
        for ours, theirs in zip(evaluate(name, log_w)[:2], evaluate(target, log_w)[:2], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@property_test
@given(log_weights)
def test_stl_less_rws_is_iwae(log_w):
    for part in (2, 3):  # path, score
        difference = evaluate("stl", log_w)[part] - evaluate("rws", log_w)[part]
        np.testing.assert_allclose(difference, evaluate("iwae", log_w)[part], atol=1e-15)


# ------------------------------------------------------------------------------------------ samples


@property_test
@given(log_weights)
def test_effective_sample_size_is_between_1_and_k(log_w):
    ess = effective_sample_size(tf.constant(log_w)).numpy()
    assert np.all(ess >= 1 - 1e-12) and np.all(ess <= len(log_w) * (1 + 1e-12))
    w = softmax(log_w, axis=0)
    np.testing.assert_allclose(ess, 1 / np.sum(w**2, axis=0), rtol=1e-10)


def test_effective_sample_size_at_its_ends():
    log_w = tf.constant([[0.0, 0.0], [0.0, -1e4], [0.0, -1e4]])
    np.testing.assert_allclose(effective_sample_size(log_w), [3, 1], rtol=1e-6)


def counts_of(weights, count, uniform):
    """How often systematic resampling draws each sample: [k, batch]."""
    chosen = resample(tf.constant(weights), count, tf.constant(uniform)).numpy()
    assert chosen.shape == (count, weights.shape[1]) and chosen.dtype == np.int32
    return (chosen[:, None] == np.arange(len(weights))[:, None]).sum(axis=0)


@property_test
@given(log_weights, st.integers(1, 9), st.floats(0, 1, exclude_max=True, allow_subnormal=False))
def test_resampling_draws_each_sample_as_often_as_expected_to_within_one(log_w, count, uniform):
    weights = softmax(log_w, axis=0)
    counts = counts_of(weights, count, np.full(log_w.shape[1], uniform))
    assert np.all(np.abs(counts - count * weights) < 1 + 1e-9)
    np.testing.assert_array_equal(counts.sum(axis=0), count)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_resampling_is_unbiased(count):
    """Averaged over an even grid of uniforms the counts are count * weights, up to the grid's step."""
    weights, grid = softmax(random_log_w(5, batch=1, scale=1.0), axis=0), (np.arange(4000) + 0.5) / 4000
    mean = counts_of(np.repeat(weights, len(grid), axis=1), count, grid).mean(axis=1)
    np.testing.assert_allclose(mean, count * weights[:, 0], atol=1e-3)


def test_resampling_never_draws_what_weighs_nothing():
    weights = np.array([[0.0, 0.5], [1.0, 0.0], [0.0, 0.5]])
    for uniform in (0.0, 0.3, 1 - 2**-53):
        assert np.all(counts_of(weights, 4, np.full(2, uniform))[weights == 0] == 0)


def test_resampling_treats_every_input_by_itself():
    weights = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]])
    chosen = resample(tf.constant(weights), 2, tf.constant([0.5, 0.5, 0.5], tf.float64)).numpy()
    np.testing.assert_array_equal(chosen, [[1, 0, 0], [1, 0, 1]])


@pytest.mark.parametrize("features", [(), (3,), (3, 2)])
def test_gathered_samples_are_those_of_their_input(features):
    values = np.random.default_rng(0).normal(size=(5, 4, *features))
    indices = np.array([[0, 4, 2, 2], [1, 1, 4, 0]], np.int32)
    gathered = gather_samples(tf.constant(values), tf.constant(indices)).numpy()
    for s, image in np.ndindex(2, 4):
        np.testing.assert_array_equal(gathered[s, image], values[indices[s, image], image])


# ------------------------------------------------------------------------------------------ behaviour in the mean


def test_more_samples_tighten_the_bound_and_the_jackknife_removes_most_of_its_bias():
    """Log-normal weights with E w = 1: log p = 0; 40,000 replicates, each figure beside its standard error."""
    log_w = 0.8 * np.random.default_rng(1).normal(size=(16, 40_000)) - 0.32
    bounds = [iwae_bound(tf.constant(log_w[:k])).numpy() for k in (1, 2, 4, 8, 16)]
    gains = np.diff(bounds, axis=0)
    assert np.all(gains.mean(axis=1) > 5 * gains.std(axis=1) / 200)
    corrected = jackknife(tf.constant(log_w)).numpy()
    assert bounds[-1].mean() < -5 * bounds[-1].std() / 200
    assert abs(corrected.mean()) < 0.2 * abs(bounds[-1].mean())


def test_normalized_weights_depend_on_the_input():
    w = normalized_weights(tf.constant(random_log_w(5, batch=2))).numpy()
    assert np.abs(w[:, 0] - w[:, 1]).max() > 0.01
