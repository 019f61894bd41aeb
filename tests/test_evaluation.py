"""evaluation.py: the streaming likelihood, active units, the arrays of the figures."""

import math
import re

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp
from scipy.stats import kstest

import evaluation
from comparison import comparison_table, paired_difference
from evaluation import bounds, figure_arrays, log_likelihood, mean_bound, unit_kl, unit_variances
from losses import OBJECTIVES, build_objective
from models import fold_seed, random_normal, tfd
from plotting import NEEDS, PLOTS, applicable
from posterior import posterior_arrays


def log_weights(model, x, k, seed):
    """log_w [k, n] as float64."""
    return model.log_weights(tf.constant(x), k, seed).numpy().astype(float)


@pytest.mark.parametrize("layers, k", [(1, 1), (1, 10), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_streaming_bounds_equal_one_log_mean_exp(small_net, x_small, monkeypatch, layers, k):
    """k that the chunks of 4 samples do not divide: no sample is dropped or counted twice."""
    monkeypatch.setattr(evaluation, "SAMPLES_AT_ONCE", 4)
    model = small_net(layers)
    l_k, elbo = bounds(model, x_small, k, seed=3)
    seeds = [fold_seed((3, 0), first) for first in range(0, k, 4)]
    log_w = np.concatenate([log_weights(model, x_small, min(k, 4), seed) for seed in seeds])[:k]
    assert l_k.shape == elbo.shape == (60,)
    np.testing.assert_allclose(l_k, logsumexp(log_w, axis=0) - np.log(k), rtol=1e-4)
    np.testing.assert_allclose(elbo, log_w.mean(axis=0), rtol=1e-4)


def test_map_images_drops_no_image():
    double = tf.function(lambda x, seed: (2 * x, [x[:, 0]]))
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    twice, [first] = evaluation.map_images(double, x, 0, size=3)
    np.testing.assert_array_equal(twice, 2 * x)
    np.testing.assert_array_equal(first, x[:, 0])


def test_grey_bytes_are_refused(small_net):
    with pytest.raises(TypeError, match="uint8.*binarize"):
        log_likelihood(small_net(), np.zeros((3, 12), np.uint8), k=2)


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bounds_rise_with_k(small_net, x_small, layers):
    """Pitfall: slicing the batch in place of the samples. L_1 <= L_64 <= L_1000, each step beyond 5 standard errors."""
    model, x_small = small_net(layers), np.repeat(x_small, 20, axis=0)
    model.encoder[0].log_std.bias.assign_add(tf.ones(4))  # a poor q: with a good one the bounds lie close together
    values = [log_likelihood(model, x_small, k, seed=1) for k in (1, 64, 1000)]
    for lower, higher in zip(values[:-1], values[1:], strict=True):
        difference, error = paired_difference(higher, lower)
        assert difference > 5 * error
    elbo = bounds(model, x_small, 64, seed=1)[1]
    assert np.all(elbo <= values[1])


def test_memory_of_the_likelihood_does_not_grow_with_k(small_net, x_small):
    """The largest array of the compiled program is of one chunk of samples, and so of fewer for a smaller k."""

    def largest(k):
        program = evaluation.bounds_block(small_net(), k).experimental_get_compiler_ir(x_small, tf.constant([0, 1]))
        return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", program()))

    assert largest(5) < largest(50) == largest(5000) == 50 * x_small.size


def test_likelihood_is_reproducible_and_its_noise_small(small_net, x_small):
    model = small_net()
    first = log_likelihood(model, x_small, 5000, seed=1)
    np.testing.assert_array_equal(first, log_likelihood(model, x_small, 5000, seed=1))
    other = log_likelihood(model, x_small, 5000, seed=2)
    assert not np.array_equal(first, other)
    assert abs(first.mean() - other.mean()) < 0.05


@pytest.mark.parametrize("objective", [OBJECTIVES["iwae"], build_objective("vr", alpha=0.5)])
def test_mean_bound_follows_the_model(small_net, x_small, objective):
    model, k = small_net(), 3
    bound = mean_bound(model, x_small, objective, k, seed=4)
    before = bound()
    expected = objective(log_weights(model, x_small, k, (4, 0))).bound
    assert before == pytest.approx(float(np.mean(expected)), rel=1e-5)
    model.decoder[0].head.bias.assign_add(tf.ones(12))
    assert bound() != before


class Wobble:
    """Stands in for a net of two layers: z_1 = 3 x + 0.5 noise, E[z_2 | z_1] = [z_1, 0.5 noise only, 0]."""

    def encode(self, x):
        return x[:, :1]

    def draw_noise(self, k, batch, seed):
        return random_normal([k, batch, 2], seed)

    def sample_posterior(self, q, noise):
        return [tf.concat([3 * q + 0.5 * noise[..., :1], 0.5 * noise[..., 1:]], axis=-1), None]

    def conditionals(self, q, z):
        def mean_is(value):
            return type("Mean", (), {"mean": staticmethod(lambda: value)})

        return [mean_is(3 * q), mean_is(tf.concat([z[0], tf.zeros_like(z[0][..., :1])], axis=-1))]


def test_active_units_do_not_count_the_noise_of_the_layers_below():
    """Pitfall: one sample of the lower layer gives the second unit, which no input moves, the variance 0.25."""
    n = 2000
    x = np.random.default_rng(0).normal(size=(n, 1)).astype(np.float32)
    first, second = unit_variances(Wobble(), x)
    assert first[0] == pytest.approx(9 * x.var(ddof=1), rel=1e-4)
    assert second[0] == pytest.approx(9 * x.var(ddof=1), rel=0.02)
    # Covariance of two independent averages of variance 0.25 / 100: 0 within 6 standard errors.
    assert abs(second[1]) < 6 * 0.0025 / np.sqrt(n)
    assert second[2] == 0
    assert evaluation.active_units([first, second]) == [1, 1]
    assert evaluation.active_units([np.array([0.0099, 0.0101]), np.array([0.0])]) == [1, 0]  # the paper's threshold
    one_sample = Wobble().sample_posterior(x, Wobble().draw_noise(1, n, (0, 0)))[0][0, :, 1]
    assert np.var(one_sample) > evaluation.ACTIVE_THRESHOLD  # the control: plain Monte Carlo calls it active


@pytest.mark.parametrize("layers", [1, 2])
def test_unit_kl_is_exact_of_one_layer_and_adds_up_to_the_whole_of_any(small_net, x_small, monkeypatch, layers):
    """By 120,000 samples, and as many others: each within 5 standard errors, wrong once in a million."""
    monkeypatch.setattr(evaluation, "HALF_AVERAGE", 2000)
    model, random = small_net(layers), np.random.default_rng(0)
    model.set_weights([w + 0.1 * random.normal(size=w.shape) for w in model.get_weights()])
    q = model.encode(tf.constant(x_small))
    z = model.sample_posterior(q, model.draw_noise(2000, 60, (0, 9)))
    log_p_z = model.log_joint(x_small, z) - model.decoder[0].log_prob(x_small, z[0])
    whole = np.mean(model.log_q_z_given_x(q, z) - log_p_z, axis=1)
    kls = unit_kl(model, x_small)
    assert [len(kl) for kl in kls] == [4, 3][:layers]
    assert abs(sum(kl.sum() for kl in kls) - whole.mean()) < 5 * (2 / 2000) ** 0.5 * whole.std()
    if layers == 1:
        p = tfd.Normal(0.0, 1.0)
        each = np.mean(q.distribution.log_prob(z[0]) - p.log_prob(z[0]), axis=1)
        exact = tfd.kl_divergence(q.distribution, p).numpy().mean(axis=0)
        assert np.all(abs(kls[0] - exact) < 5 * each.std(axis=0) / 2000**0.5) and exact.min() > 0.02


def test_paired_difference_is_that_of_the_pairs():
    a = np.random.default_rng(0).normal(size=1000) * 100
    difference, error = paired_difference(a + 1, a)
    assert difference == pytest.approx(1) and error < 1e-10


def results(values, k=500, **changes):
    r = {
        "k_evaluation": k,
        "split": "test",
        "units": "all",
        "evaluated": "digest",
        "dataset": "mnist",
        "log_likelihoods": np.array(values),
        "objective": "vae",
    }
    r |= {"k": 5, "nll": -np.mean(values), "nll_standard_error": 0.1, "elbo": -100.0, "active_units": [16, 5]}
    return r | {"train_seconds": 90.0} | changes


def test_comparison_table_shows_the_paired_difference():
    table, caption = comparison_table({"a": results([-90.0, -80.0]), "b": results([-89.0, -79.5])})
    assert "| b   |" in table and "16+5" in table and "-0.75 ± 0.25" in table
    assert "L_500" in caption and "2 test images" in caption
    assert len({len(line) for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 50},
        {"split": "train"},
        {"values": [-1.0]},
        {"dataset": "omniglot"},
        {"units": "active"},
        {"evaluated": "others"},
    ],
)
def test_runs_evaluated_differently_are_not_compared(changes):
    with pytest.raises(ValueError, match="different ways"):
        comparison_table({"a": results([-90.0, -80.0]), "b": results(**{"values": [-90.0, -80.0]} | changes)})


@pytest.mark.parametrize("units, rotate", [(1, True), (2, True), (2, False), (3, True), (5, True)])
def test_principal_components(units, rotate):
    z = np.random.default_rng(0).normal(size=(50, units)) * np.arange(1, units + 1) + 3.0
    points, shares = evaluation.principal_components(z, rotate)
    assert points.shape == (50, 2) and shares.shape == (2,)
    if not rotate:
        np.testing.assert_array_equal(points, z)
    else:
        np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-12)
        eigenvalues = np.sort(np.linalg.eigvalsh(np.atleast_2d(np.cov(z.T, ddof=0))))[::-1]
        np.testing.assert_allclose(shares[: min(units, 2)], eigenvalues[:2] / eigenvalues.sum(), rtol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_figure_arrays_feed_every_plot(small_net, x_small, layers, labelled, small_posteriors, uncompiled):
    labels = np.arange(60) % 3 if labelled else None
    arrays = figure_arrays(small_net(layers), x_small, x_small, labels)
    log = {"epoch": np.arange(1, 3), "bound_train": -np.ones(2), "bound_validation": -np.ones(2)}
    arrays |= posterior_arrays(small_net(layers), x_small, labels)
    arrays |= log | {
        "image_shape": np.array([3, 4]),
        "split": np.array("test"),
        "log_likelihoods": -np.arange(60.0),
        "k_evaluation": np.array(5),
        "extreme_x_mean": x_small[:4],
    }
    assert len(arrays["x"]) == (3 if labelled else 10)
    assert f"unit_variance_{layers}" in arrays and f"unit_variance_{layers + 1}" not in arrays
    plots = applicable(PLOTS, {"run": arrays})
    assert {*PLOTS} - {*NEEDS} <= {*plots}
    for plot in plots.values():
        plot({"run": arrays})


def test_resampled_reconstruction_prefers_heavy_samples(small_net, x_small):
    """Log p(x | z) of the resampled z is above that of a plain sample, beyond 5 standard errors over images."""
    model, x = small_net(), np.repeat(x_small, 20, axis=0)
    model.encoder[0].log_std.bias.assign_add(tf.ones(4))
    by_mean, by_sample, by_resampling = evaluation.reconstructions(model, x)
    np.testing.assert_allclose(by_mean, model.reconstruct(x), atol=1e-5)

    def log_p(mean):
        return np.log(np.where(x > 0.5, mean, 1 - mean)).sum(-1)

    difference, error = paired_difference(log_p(by_resampling), log_p(by_sample))
    assert difference > 5 * error


def test_large_images_are_mapped_fewer_at_once(monkeypatch):
    """Memory does not grow with their size; those of MNIST are unaffected."""
    monkeypatch.setattr(evaluation, "FEATURES_AT_ONCE", 10)
    for features, size in ((10, 6), (20, 3), (40, 1), (1000, 1)):
        blocks = evaluation.map_images(lambda images, seed: images[:1], np.ones((12, features), np.float32), 0, size=6)
        assert len(blocks) == 12 // size


def test_scattered_samples_are_of_the_top_layer(small_net, x_small):
    assert evaluation.top_samples(small_net(2), x_small).shape == (60, 3)  # units of z_2: z_1 has 4


@pytest.mark.parametrize("stretched", [1, pytest.param(1.2, marks=pytest.mark.xfail(strict=True))])
def test_scattered_samples_are_of_q(small_net, x_small, stretched):
    """Kolmogorov-Smirnov test of 8,000 standardised samples, error rate 1e-4; a fifth too wide, they must fail it."""
    model, x = small_net(), np.repeat(x_small[:50], 40, axis=0)
    q = model.encode(x).distribution
    standardised = (evaluation.top_samples(model, x) - q.loc.numpy()) / q.scale.numpy()
    assert kstest(stretched * standardised.ravel(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("n", [2, 6, 30])
def test_shown_images_are_there(n):
    """Without labels the first ten, or as many as there are; with labels that differ the first of each class."""
    x = np.zeros((n, 3))
    assert evaluation.shown_images(x, None).tolist() == list(range(min(n, 10)))
    assert evaluation.shown_images(x, np.arange(n) % 2).tolist() == [0, 1]
    assert evaluation.shown_images(x, np.zeros(n)).tolist() == list(range(min(n, 10)))
