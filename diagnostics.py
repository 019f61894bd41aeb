"""Of a trained net: how good the importance weights are, and every estimator's gradient."""

import math

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from evaluation import IMAGES_AT_ONCE, SAMPLES_AT_ONCE, map_images
from losses import effective_sample_size, normalized_weights

WEIGHT_KS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # at which the importance weights are diagnosed
WEIGHT_IMAGES = 1000  # of the images; ten times as many would move the means by less than a line's width
GRADIENT_KS = (2, 8, 32, 128)  # at which the gradients are: even, for objectives with two groups
REPLICATES = 200  # gradients drawn on one minibatch, an even number


def weight_quality(model, x, ks, seed=0):
    """Effective sample size, and largest normalized weight, of the first k samples: means over images, two [ks].

    x: [n, features] as fed to the encoder; ks: numbers of samples.
    """

    @tf.function(jit_compile=True)
    def block(images, seed):
        log_w = model.log_weights(images, max(ks), seed)
        largest = [tf.reduce_max(normalized_weights(log_w[:k]), axis=0) for k in ks]
        return tf.stack([effective_sample_size(log_w[:k]) for k in ks], axis=1), tf.stack(largest, axis=1)

    size = max(1, IMAGES_AT_ONCE * SAMPLES_AT_ONCE // max(ks))
    return [part.mean(axis=0, dtype=np.float64) for part in map_images(block, x, seed, size, "importance weights")]


def moments(draw, replicates):
    """Means of the even and of the odd replicates [2, ..], and their variance [..]: of draw(0), draw(1), .. [..]."""
    sums = squares = 0
    for i in tqdm(range(replicates // 2), desc="gradients", leave=False):
        pair = np.stack([draw(2 * i), draw(2 * i + 1)]).astype(np.float64)
        sums, squares = sums + pair, squares + np.sum(pair**2, axis=0)
    return sums / (replicates // 2), (squares - sums.sum(axis=0) ** 2 / replicates) / (replicates - 1)


def signal_to_noise(means, variance):
    """|mean| / standard deviation of each parameter's gradient, averaged over parameters (Rainforth et al. 2018).

    Parameters that no replicate moves (pixels that are black in all images) do not count. Where there is no signal
    at all the ratio is not 0 but sqrt(2 / (pi replicates)). means: [2, .., parameters]; variance: [.., parameters].
    """
    moves = variance > 0
    ratio = np.divide(np.abs(means.mean(axis=0)), np.sqrt(variance), out=np.zeros_like(variance), where=moves)
    return ratio.sum(axis=-1) / moves.sum(axis=-1)


def squared_bias(means, targets):
    """Squared distance of an estimator's mean gradient from its target's, relative to the target's squared length.

    The product of two independent halves, which is unbiased: where there is no bias it scatters about 0.
    means: [2, estimators, parameters]; targets: [estimators], the index of each one's target.
    """
    difference = means - means[:, targets]
    return np.prod(difference, axis=0).sum(axis=-1) / np.prod(means, axis=0).sum(axis=-1)[targets]


def gradient_quality(model, gradients, estimators, targets, x, k, replicates=REPLICATES, seed=0):
    """Of each estimator's gradient on one minibatch: signal-to-noise ratio, variance and squared bias.

    Replicates differ in the noise of z alone, which all estimators share. The variance is the sum over parameters.
    The bias is that against an estimator's own target (`losses.TARGETS`): the reparameterised gradient of the same
    bounds at the same k, so it tells what leaving out the score costs; other rows are their own targets, with bias 0.

    gradients: `training.gradients`; estimators: functions of log_w; targets: [estimators], an index for each; x:
    [batch, features] as fed to the encoder. Returns [3, estimators, 2]: encoder, then decoder.
    """

    @tf.function(jit_compile=True)
    def every_gradient(seed):
        ascents = [gradients(model, estimator, x, k, seed)[1] for estimator in estimators]
        return tf.stack([tf.concat([tf.reshape(part, [-1]) for part in ascent], axis=0) for ascent in ascents])

    means, variance = moments(lambda i: every_gradient(tf.constant([seed, i])).numpy(), replicates)
    encoder = sum(math.prod(variable.shape) for variable in model.phi)
    parts = [(means[..., part], variance[..., part]) for part in (slice(encoder), slice(encoder, None))]
    measures = [(signal_to_noise(m, v), v.sum(axis=-1), squared_bias(m, targets)) for m, v in parts]
    return np.stack(measures, axis=-1)


def diagnostic_arrays(model, gradients, estimators, targets, x, batch, seed=0):
    """The arrays of `plotting.DIAGNOSTICS` that a model, images and estimators make.

    estimators: {name: function of log_w}; targets: {name: name of its target}, for those that are not their own.
    The gradients are those on the first `batch` of the images x [n, features], as fed to the encoder.
    """
    names, minibatch = list(estimators), tf.constant(x[:batch])
    indices = np.array([names.index(targets.get(name, name)) for name in names])
    ess, largest = weight_quality(model, x[:WEIGHT_IMAGES], WEIGHT_KS, seed)
    arguments = (model, gradients, list(estimators.values()), indices, minibatch)
    measures = np.stack([gradient_quality(*arguments, k, REPLICATES, seed) for k in GRADIENT_KS], axis=-1)
    arrays = {
        "weight_k": WEIGHT_KS,
        "effective_sample_size": ess,
        "largest_weight": largest,
        "target": indices,
        "gradient_k": GRADIENT_KS,
        "replicates": REPLICATES,
        "minibatch": len(minibatch),
        **dict(zip(("gradient_snr", "gradient_variance", "gradient_squared_bias"), measures, strict=True)),
    }
    return {name: np.asarray(array) for name, array in arrays.items()}
