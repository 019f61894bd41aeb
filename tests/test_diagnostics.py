"""diagnostics.py: importance weights, and signal, noise and bias of gradients."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp, softmax

import diagnostics
from gradients import gradients
from losses import OBJECTIVES
from models import fold_seed
from plotting import DIAGNOSTICS


@pytest.mark.parametrize("layers", [1, 2])
def test_weight_quality(small_net, x_small, layers, uncompiled):
    model, ks = small_net(layers), (2, 3, 7)
    ess, largest, bound, jackknife = diagnostics.weight_quality(model, x_small, ks, seed=3)
    log_w = np.float64(tf.function(model.log_weights, jit_compile=True)(tf.constant(x_small), 7, tf.constant((3, 0))))
    weights = [softmax(log_w[:k], axis=0) for k in ks]
    np.testing.assert_allclose(ess, [np.mean(1 / np.sum(w**2, axis=0)) for w in weights], rtol=1e-4)
    np.testing.assert_allclose(largest, [np.mean(w.max(axis=0)) for w in weights], rtol=1e-4)

    def mean_bound(log_w):
        return np.mean(logsumexp(log_w, axis=0) - np.log(len(log_w)))

    np.testing.assert_allclose(bound, [mean_bound(log_w[:k]) for k in ks], rtol=1e-5)
    without = [np.mean([mean_bound(np.delete(log_w[:k], i, axis=0)) for i in range(k)]) for k in ks]
    np.testing.assert_allclose(
        jackknife, [k * b - (k - 1) * w for k, b, w in zip(ks, bound, without, strict=True)], rtol=1e-4
    )


def test_squared_length_is_unbiased():
    """Means of length 0 and 1, ten replicates whose noise has length 3; twelve standard errors of room.

    The squared length of a mean of n replicates, less its noise, scatters by sqrt(2 / parameters) * 3^2 / n about 0.
    """
    rng, parameters, n = np.random.default_rng(0), 20_000, 10
    mean = np.stack([np.zeros(parameters), np.full(parameters, parameters**-0.5)])
    draws = np.float32(mean + 3 * parameters**-0.5 * rng.normal(size=(n, 2, parameters)))
    length, variance = diagnostics.squared_length(draws.sum(axis=0), np.sum(draws**2, axis=(0, -1)), n)
    np.testing.assert_allclose(length, [0, 1], atol=0.11)
    np.testing.assert_allclose(variance, draws.astype(float).var(axis=0, ddof=1).sum(axis=-1), rtol=1e-4)
    assert np.sum(draws.mean(axis=0) ** 2, axis=-1)[0] > 0.8  # the control: the plain square is nothing but noise


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradient_moments_are_those_of_the_training_gradients(small_net, x_small, layers, uncompiled):
    """Against numpy, image by image and estimator by estimator, of the very gradients that training takes."""
    model, x, targets, n = small_net(layers), x_small[:2], np.array([0, 1, 1]), 4
    estimators = [OBJECTIVES[name] for name in ("iwae", "rws", "rws_dreg")]
    moments = diagnostics.gradient_moments(model, estimators, targets, x, 4, n, seed=7)
    assert moments.shape == (2, 3, 3, 2)
    encoder = sum(variable.shape.num_elements() for variable in model.phi)
    for image in range(2):
        seeds = [fold_seed(tf.constant([7, image]), i) for i in range(n)]

        def flat(estimator, seed, image=image):
            ascent = gradients(model, estimator, tf.constant(x[image : image + 1]), 4, seed)[1]
            return np.concatenate([gradient.numpy().ravel() for gradient in ascent])

        draws = np.float64([[flat(estimator, seed) for seed in seeds] for estimator in estimators])
        for part, coordinates in enumerate((slice(encoder), slice(encoder, None))):
            d = draws[..., coordinates]
            for found, vectors in zip(moments[image, [0, 2], :, part], (d, d - d[targets]), strict=True):
                noise = vectors.var(axis=1, ddof=1).sum(axis=-1) / n
                expected = np.sum(vectors.mean(axis=1) ** 2, axis=-1) - noise
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
            np.testing.assert_allclose(moments[image, 1, :, part], d.var(axis=1, ddof=1).sum(axis=-1), rtol=1e-3)


def test_gradient_quality_is_made_of_medians_with_notches_and_of_sums():
    """Signal to noise of two estimators on five images, and bias: of the first, its own target, 0."""
    length = np.array([[4.0, 1.0], [1.0, 1.0], [9.0, 1.0], [16.0, 1.0], [25.0, 1.0]])
    variance, bias = np.array([[1.0, 4.0]] * 5), np.array([[0.0, 1.0]] * 5)
    moments = np.repeat(np.stack([length, variance, bias], axis=1)[..., None], 2, axis=-1)
    quality = diagnostics.gradient_quality(moments, np.array([0, 0]))
    np.testing.assert_allclose(quality["gradient_snr"][:, 0], [3, 0.5])
    notch = 1.57 * (16 - 4) / np.sqrt(5)
    np.testing.assert_allclose(quality["gradient_snr_low"][:, 0], [np.sqrt(9 - notch), 0.5])
    np.testing.assert_allclose(quality["gradient_snr_high"][:, 0], [np.sqrt(9 + notch), 0.5])
    np.testing.assert_array_equal(quality["gradient_variance"][:, 0], [1, 4])
    np.testing.assert_allclose(quality["gradient_squared_bias"][:, 0], [0, 5 / 55])


@pytest.mark.slow
def test_bias_of_stl_alone_and_signal_to_noise_that_falls_for_iwae_alone(small_net, x_small):
    """Against k, of the encoder's gradients, as in Rainforth et al. 2018 and Tucker et al. 2019; q is made too wide."""
    model, targets, quality = small_net(), np.zeros(3, int), {}
    model.encoder[0].log_std.bias.assign_add(tf.ones(4))
    estimators = [OBJECTIVES[name] for name in ("iwae", "stl", "dreg")]
    for k in (8, 128):
        moments = diagnostics.gradient_moments(model, estimators, targets, x_small[:5], k, 2000)
        quality[k] = diagnostics.gradient_quality(moments, targets)
    iwae, stl, dreg = quality[8]["gradient_squared_bias"][:, 0]
    assert iwae == 0 and abs(dreg) < 0.02 < 0.05 < stl
    falls = quality[128]["gradient_snr"][:, 0] / quality[8]["gradient_snr"][:, 0]
    assert falls[0] < 0.5 and falls[2] > 0.8  # found: 0.36 and 1.11


@pytest.mark.slow
def test_diagnostic_arrays_feed_every_diagnostic_plot(small_net, x_small, monkeypatch, uncompiled):
    sizes = {"WEIGHT_KS": (2, 4), "WEIGHT_IMAGES": 7, "GRADIENT_KS": (2, 4), "GRADIENT_IMAGES": 3, "REPLICATES": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(diagnostics, name, value)
    estimators = {name: OBJECTIVES[name] for name in ("vae", "iwae", "rws", "rws_dreg")}
    arrays = diagnostics.diagnostic_arrays(small_net(), estimators, x_small)
    np.testing.assert_array_equal(arrays["target"], [0, 1, 2, 2])
    assert arrays["gradient_snr"].shape == (4, 2, 2) and arrays["gradient_images"] == 3
    arrays |= {"label": np.array(list(estimators)), "step_k": np.array(8), "step_milliseconds": np.ones(4)}
    for plot in DIAGNOSTICS.values():
        plot({"run": arrays})
