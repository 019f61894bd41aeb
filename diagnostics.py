"""Of a trained net: how good the importance weights and bounds are, and every estimator's gradient."""

import numpy as np
import tensorflow as tf

from evaluation import IMAGES_AT_ONCE, SAMPLES_AT_ONCE, map_images
from gradients import gradients
from losses import TARGETS, effective_sample_size, iwae_bound, jackknife, normalized_weights
from models import fold_seed

WEIGHT_KS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)  # at which weights and bounds are diagnosed: the jackknife needs 2
WEIGHT_IMAGES = 1000  # of the images: the bounds' standard error over them, the same for every k, is some 0.7 nats
GRADIENT_KS = (2, 8, 32, 128)  # at which the gradients are: even, for objectives with two groups
GRADIENT_IMAGES = 20  # each by itself
REPLICATES = 200  # gradients drawn of each image


def weight_quality(model, x, ks, seed=0):
    """Effective sample size, largest normalized weight, L_k and its jackknife, of the first k samples.

    x: [n, features] as fed to the encoder; ks: numbers of samples, 2 or more. Returns means over images, [4, ks].
    """

    def measures(log_w):
        largest = tf.reduce_max(normalized_weights(log_w), axis=0)
        return tf.stack([effective_sample_size(log_w), largest, iwae_bound(log_w), jackknife(log_w)], axis=1)

    @tf.function(jit_compile=True)
    def block(images, seed):
        log_w = model.log_weights(images, max(ks), seed)
        return tf.stack([measures(log_w[:k]) for k in ks], axis=2)

    size = max(1, IMAGES_AT_ONCE * SAMPLES_AT_ONCE // max(ks))
    return map_images(block, x, seed, size, "importance weights").mean(axis=0, dtype=np.float64)


def squared_length(total, squares, replicates):
    """Squared length of a mean vector without the part that its noise has in it, hence unbiased; and the variance.

    total: [.., parameters], sum of the replicates; squares: [..], sum of their squared lengths. The variance is the sum
    over parameters. Two tensors [..].
    """
    plain = tf.reduce_sum((total / replicates) ** 2, axis=-1)
    variance = (squares - replicates * plain) / (replicates - 1)
    return plain - variance / replicates, variance


def gradient_moments(model, estimators, targets, x, k, replicates, seed=0):
    """Of each estimator's gradient on each image by itself: squared length of the mean, variance, squared bias.

    Replicates differ in the noise of z alone, which all estimators share. The bias is that against an estimator's own
    target (`losses.TARGETS`): the reparameterised gradient of the same bounds at the same k, so it tells what leaving
    out the score costs; other rows are their own targets, with bias 0.

    estimators: functions of log_w; targets: [estimators], an index for each; x: [n, features] as fed to the encoder.
    Returns [n, 3, estimators, 2]: encoder, then decoder.
    """
    sizes = [sum(variable.shape.num_elements() for variable in part) for part in (model.phi, model.theta)]

    def errors(parts):
        return [part - tf.gather(part, targets) for part in parts]

    def draw(image, seed):
        ascents = [gradients(model, estimator, image, k, seed)[1] for estimator in estimators]
        flat = [tf.concat([tf.reshape(gradient, [-1]) for gradient in ascent], axis=0) for ascent in ascents]
        return tf.split(tf.stack(flat), sizes, axis=1)

    @tf.function(jit_compile=True)
    def moments(image, seed):
        totals, squares = [tf.zeros([len(estimators), size]) for size in sizes], tf.zeros([4, len(estimators)])
        for i in tf.range(replicates):
            drawn = draw(image, fold_seed(seed, i))
            totals = [total + part for total, part in zip(totals, drawn, strict=True)]
            squares += tf.stack([tf.reduce_sum(part**2, axis=1) for part in drawn + errors(drawn)])
        sums = zip(totals + errors(totals), tf.unstack(squares), strict=True)
        lengths, variances = zip(*[squared_length(*each, replicates) for each in sums], strict=True)
        return tf.stack([tf.stack(each, axis=1) for each in (lengths[:2], variances[:2], lengths[2:])])[None]

    return map_images(moments, x, seed, 1, f"gradients at k = {k}")


def gradient_quality(moments, targets):
    """Signal-to-noise ratio, variance and relative squared bias of gradients, from `gradient_moments` of images.

    The ratio is that of the whole gradient: length of its mean over the root of its variance. (That of each parameter
    by itself, averaged as in Rainforth et al. 2018, has a floor of noise. McCandlish et al. 2018 call this ratio's
    inverse square the simple noise scale.) Ratio and variance are medians over images, few of which, poorly encoded,
    would else drown the others; low and high are the notches of a box plot (McGill et al. 1978): medians whose notches
    do not overlap differ, at 95 %. Squared bias is a ratio of sums over images, to the squared length of the target's
    mean.
    moments: [n, 3, estimators, 2, ..]. Returns {name: [estimators, 2, ..]}.
    """
    length, variance, bias = np.float64(moments).swapaxes(0, 1)
    first, median, third = np.quantile(length / variance, (0.25, 0.5, 0.75), axis=0)
    notch = 1.57 * (third - first) / np.sqrt(len(length))
    ratios = np.sqrt(np.maximum([median, median - notch, median + notch], 0))
    names = ("gradient_snr", "gradient_snr_low", "gradient_snr_high", "gradient_variance", "gradient_squared_bias")
    relative_bias = bias.sum(axis=0) / length.sum(axis=0)[targets]
    return dict(zip(names, (*ratios, np.median(variance, axis=0), relative_bias), strict=True))


def diagnostic_arrays(model, estimators, x, seed=0):
    """The arrays of `plotting.DIAGNOSTICS` that a model, images and estimators make.

    estimators: {name: function of log_w}, with the targets of all; x: [n, features], as fed to the encoder; the
    gradients are those on the first of them.
    """
    names, functions, images = list(estimators), list(estimators.values()), x[:GRADIENT_IMAGES]
    indices = np.array([names.index(TARGETS.get(name, name)) for name in names])
    weights = weight_quality(model, x[:WEIGHT_IMAGES], WEIGHT_KS, seed)
    moments = [gradient_moments(model, functions, indices, images, k, REPLICATES, seed) for k in GRADIENT_KS]
    arrays = {
        "weight_k": WEIGHT_KS,
        **dict(zip(("effective_sample_size", "largest_weight", "bound", "jackknife"), weights, strict=True)),
        "target": indices,
        "gradient_k": GRADIENT_KS,
        "replicates": REPLICATES,
        "gradient_images": len(images),
        **gradient_quality(np.stack(moments, axis=-1), indices),
    }
    return {name: np.asarray(array) for name, array in arrays.items()}
