"""diagnostics.py: importance weights, and signal, noise and bias of gradients."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import softmax

import diagnostics
from losses import OBJECTIVES, TARGETS
from plotting import DIAGNOSTICS
from training import gradients


@pytest.mark.parametrize("layers", [1, 2])
def test_weight_quality(small_net, x_small, layers, uncompiled):
    model, ks = small_net(layers), (1, 3, 7)
    ess, largest = diagnostics.weight_quality(model, x_small, ks, seed=3)
    log_w = tf.function(model.log_weights, jit_compile=True)(tf.constant(x_small), 7, tf.constant((3, 0)))
    weights = [softmax(log_w[:k], axis=0) for k in ks]
    np.testing.assert_allclose(ess, [np.mean(1 / np.sum(w**2, axis=0)) for w in weights], rtol=1e-4)
    np.testing.assert_allclose(largest, [np.mean(w.max(axis=0)) for w in weights], rtol=1e-4)
    assert ess[0] == largest[0] == 1


def test_moments_are_those_of_all_replicates_and_of_both_halves():
    draws = np.random.default_rng(0).normal(5, 2, size=(10, 3, 4)).astype(np.float32)
    means, variance = diagnostics.moments(lambda i: draws[i], 10)
    np.testing.assert_allclose(means, [draws[0::2].mean(axis=0), draws[1::2].mean(axis=0)], rtol=1e-5)
    np.testing.assert_allclose(variance, draws.astype(float).var(axis=0, ddof=1), rtol=1e-9)


def test_signal_to_noise_is_averaged_over_the_parameters_that_move():
    mean, std = np.array([[1.0, -2.0, 0.0, 0.0], [0.0, 3.0, 1.0, 0.0]]), np.array([[1.0, 4.0, 1.0, 0.0]] * 2)
    snr = diagnostics.signal_to_noise(np.stack([mean - 0.1, mean + 0.1]), std**2)
    np.testing.assert_allclose(snr, [(1 + 0.5 + 0) / 3, (0 + 0.75 + 1) / 3])


def test_signal_to_noise_of_noise_alone_is_what_the_figure_draws():
    draws = np.random.default_rng(0).normal(size=(50, 20_000))
    means, variance = diagnostics.moments(lambda i: draws[i], 50)
    assert diagnostics.signal_to_noise(means, variance) == pytest.approx(np.sqrt(2 / (np.pi * 50)), rel=0.03)


def test_squared_bias_is_unbiased():
    """Two estimators of a target of length 1: one off by a tenth of it, one not, whose noise alone has length 0.3."""
    rng, parameters = np.random.default_rng(0), 3000
    target = rng.normal(size=parameters)
    target /= np.linalg.norm(target)
    noise = 0.3 / np.sqrt(parameters) * rng.normal(size=(2, 3, parameters))
    biased = target + 0.1 * np.roll(target, 1)
    bias = diagnostics.squared_bias(np.stack([target, target, biased]) + noise, np.array([0, 0, 0]))
    assert bias[0] == 0
    standard_error = 2 * 0.3**2 / np.sqrt(parameters)  # of the product of two differences, each of variance 2 * 0.3^2
    assert abs(bias[1]) < 5 * standard_error and abs(bias[2] - 0.01) < 0.01 / 2
    plain = np.sum(np.mean(noise[:, 1] - noise[:, 0], axis=0) ** 2)
    assert plain > 0.05  # the control: the squared length of one average is nothing but noise


@pytest.mark.parametrize("layers", [1, 2])
def test_gradient_quality_is_that_of_the_training_gradients(small_net, x_small, layers, uncompiled):
    """Against numpy, estimator by estimator, of the very gradients that training takes."""
    model, x, names, replicates = small_net(layers), tf.constant(x_small[:5]), ["iwae", "stl", "dreg"], 4
    estimators = [OBJECTIVES[name] for name in names]
    measures = diagnostics.gradient_quality(model, gradients, estimators, np.array([0, 0, 0]), x, 4, replicates, seed=7)
    assert measures.shape == (3, 3, 2)
    draws = []
    for estimator in estimators:
        one = tf.function(
            lambda seed, estimator=estimator: gradients(model, estimator, x, 4, seed)[1], jit_compile=True
        )
        flat = [np.concatenate([g.numpy().ravel() for g in one(tf.constant([7, i]))]) for i in range(replicates)]
        draws.append(np.float64(flat))
    n = sum(variable.shape.num_elements() for variable in model.phi)
    for part, coordinates in enumerate((slice(n), slice(n, None))):
        d = np.array(draws)[..., coordinates]
        moves = d.std(axis=1) > 0
        for i in range(3):
            mean, std = d[i].mean(axis=0)[moves[i]], d[i].std(axis=0, ddof=1)[moves[i]]
            assert measures[0, i, part] == pytest.approx(np.mean(np.abs(mean) / std), rel=1e-3)
        halves = np.stack([d[:, 0::2].mean(axis=1), d[:, 1::2].mean(axis=1)])
        off = halves - halves[:, :1]
        np.testing.assert_allclose(measures[1, :, part], d.var(axis=1, ddof=1).sum(axis=-1), rtol=1e-3)
        bias = (off[0] * off[1]).sum(axis=-1) / (halves[0, 0] * halves[1, 0]).sum()
        np.testing.assert_allclose(measures[2, :, part], bias, rtol=1e-3, atol=1e-4)


def test_gradient_quality_shows_the_bias_of_stl_alone(small_net, x_small):
    model, x = small_net(), tf.constant(x_small[:5])
    model.encoder[0].log_std.bias.assign_add(tf.ones(4))  # a poor q, whose score matters
    estimators = [OBJECTIVES[name] for name in ("iwae", "stl", "dreg")]
    _, _, (none, stl, dreg) = diagnostics.gradient_quality(model, gradients, estimators, np.zeros(3, int), x, 8, 400)
    assert none[0] == 0 and abs(dreg[0]) < 0.1 < stl[0]
    np.testing.assert_array_equal([stl[1], dreg[1]], 0)  # one decoder's gradient for all


def test_diagnostic_arrays_feed_every_diagnostic_plot(small_net, x_small, monkeypatch, uncompiled):
    for name, value in {"WEIGHT_KS": (1, 4), "GRADIENT_KS": (2, 4), "REPLICATES": 4, "WEIGHT_IMAGES": 7}.items():
        monkeypatch.setattr(diagnostics, name, value)
    estimators = {name: OBJECTIVES[name] for name in ("vae", "iwae", "rws", "rws_dreg")}
    arrays = diagnostics.diagnostic_arrays(small_net(), gradients, estimators, TARGETS, x_small, batch=5)
    np.testing.assert_array_equal(arrays["target"], [0, 1, 2, 2])
    assert arrays["gradient_snr"].shape == (4, 2, 2) and arrays["minibatch"] == 5
    arrays |= {"label": np.array(list(estimators)), "step_k": np.array(8), "step_milliseconds": np.ones(4)}
    for plot in DIAGNOSTICS.values():
        plot({"run": arrays})
