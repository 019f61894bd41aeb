"""What a trained model is worth: test log-likelihood, active units, and the arrays that its figures show."""

import functools
import math
import time

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from distributed import on_replicas
from losses import gather_samples, normalized_weights, resample
from models import fold_seed, random_uniform, split_seed
from run_folder import due, whole_file

IMAGES_AT_ONCE = 100
SAMPLES_AT_ONCE = 50
FEATURES_AT_ONCE = 4096  # of larger images as many fewer at once
ACTIVE_THRESHOLD = 0.01  # Burda et al. 2016, section 5: a unit is active if Var_x(E[z | x]) is above it
K_RESAMPLING = 50  # samples of q that importance-weighted resampling draws one from
INTERPOLATED = 9  # images from one end of an interpolation to the other, both included
HALF_AVERAGE = 100  # samples in each of the two averages of `unit_variances`


def kept_blocks(path, size):
    """The finished blocks that a killed `map_images` left; [] where there are none of that size."""
    try:
        with np.load(path) as archive:
            blocks = archive["blocks"]
    except Exception:  # a damaged file is found out by zip's checksum, numpy or zipfile, by a dozen kinds of error
        return []
    return list(blocks) if blocks.shape[1:2] == (size,) else []


def keep_blocks(path, blocks):
    """Write what `kept_blocks` reads."""
    with whole_file(path) as partial:
        np.savez(partial, blocks=np.stack(blocks))


def map_images(function, x, seed, size=IMAGES_AT_ONCE, progress=None, kept=None):
    """Apply a compiled function of (images [size, features], seed [2]) to all of x, block by block.

    In a strategy's scope each replica takes every n-th block and all get every result: a seed belongs to its block.

    x: [n, features] floating; no image is dropped: the last block is filled up, and cut again.
    The function returns arrays with the images on their first axis, nested as it likes; so does this one, with n.
    kept: path of an npz file to keep finished blocks in and to go on from, if each is one array.
    Raises TypeError for images that are not floating: see `datasets_download.binarize`.
    """
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(
            f"images of type {x.dtype}: floats in [0, 1] wanted, made by datasets_download.binarize or grey"
        )
    size, saved = min(size, len(x), max(1, size * FEATURES_AT_ONCE // x.shape[1])), time.monotonic()
    count, at_once = math.ceil(len(x) / size), tf.distribute.get_strategy().num_replicas_in_sync
    blocks = kept_blocks(kept, size) if kept else []
    ahead = range(len(blocks), count, at_once)
    try:
        for block in tqdm(ahead, desc=progress, unit_scale=size * at_once, unit="image", disable=progress is None):
            firsts = size * np.arange(block, block + at_once)
            rows = np.minimum(firsts[:, None] + np.arange(size), len(x) - 1)
            made = on_replicas(function, np.float32(x[rows]), np.int32([(seed, first) for first in firsts]))
            blocks += made[: count - block]
            if kept and due(saved):
                keep_blocks(kept, blocks)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if kept and blocks:
            keep_blocks(kept, blocks)
        raise
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts)[: len(x)], *blocks)


@functools.lru_cache(maxsize=8)
def bounds_block(model, k):
    """A compiled function (images [batch, features], seed [2]) -> L_k and the ELBO of each [batch, 2]: see `bounds`."""
    chunk = min(k, SAMPLES_AT_ONCE)

    @tf.function(jit_compile=True)
    def block(images, seed):
        q = model.encode(images)
        log_sum = tf.fill([tf.shape(images)[0]], -math.inf)
        total = tf.zeros_like(log_sum)
        for first in tf.range(0, k, chunk):
            _, log_w = model.weighted_samples(images, q, chunk, fold_seed(seed, first))
            counted = first + tf.range(chunk)[:, None] < k  # the last chunk may reach beyond k
            log_sum = tf.reduce_logsumexp([log_sum, tf.reduce_logsumexp(tf.where(counted, log_w, -math.inf), 0)], 0)
            total += tf.reduce_sum(tf.where(counted, log_w, 0.0), 0)
        return tf.stack([log_sum - math.log(k), total / k], axis=1)

    return block


def bounds(model, x, k=5000, seed=0, progress=None, kept=None):
    """L_k and the ELBO of each image from the same k samples, in nats: two arrays [n].

    The log-mean-exp streams over chunks of samples (Burda et al. 2016 use L_5000 as log p(x)): memory does not grow
    with k. x: [n, features] as fed to the encoder; seed: an integer; progress: the title of a bar, or None for none;
    kept: see `map_images`.
    """
    return tuple(map_images(bounds_block(model, k), x, seed, progress=progress, kept=kept).T)


def log_likelihood(model, x, k=5000, seed=0):
    """L_k, the estimate of log p(x), of each image [n] in nats: see `bounds`, which gives the ELBO too."""
    return bounds(model, x, k, seed)[0]


def mean_bound(model, x, objective, k, seed=0):
    """A function () -> the objective's bound, averaged over the images x, of the model as it then stands, in nats.

    objective: a function log_w -> Objective; x: [n, features] as fed to the encoder. Compiled once.
    """

    @tf.function(jit_compile=True)
    def block(images, seed):
        return objective(model.log_weights(images, k, seed)).bound

    return lambda: float(np.mean(map_images(block, x, seed, size=max(1, IMAGES_AT_ONCE * SAMPLES_AT_ONCE // k))))


def unit_variances(model, x, seed=0):
    """Var_x(E[z | x]) of every latent unit, an array [units] for each layer (Burda et al. 2016, section 5).

    The inner expectation of an upper layer runs over samples of the layers below. A plain average would add its own
    noise to the variance: the covariance over x of two independent averages does not, so it is unbiased, and may be
    slightly negative where a unit is dead. x: [n, features] as fed to the encoder, n > 1.
    """

    @tf.function(jit_compile=True)
    def averages(images, seed):
        halves, q = [], model.encode(images)
        for half_seed in tf.unstack(split_seed(seed)):
            z = model.sample_posterior(q, model.draw_noise(HALF_AVERAGE, tf.shape(images)[0], half_seed))
            first, *upper = model.conditionals(q, z)
            halves.append([first.mean()] + [tf.reduce_mean(layer.mean(), axis=0) for layer in upper])
        return halves

    halves = map_images(averages, x, seed)
    centred = [[layer - layer.mean(axis=0) for layer in half] for half in halves]
    return [np.sum(a * b, axis=0) / (len(x) - 1) for a, b in zip(*centred, strict=True)]


def active_units(variances):
    """Number of active units in each layer, from `unit_variances`."""
    return [int(np.sum(layer > ACTIVE_THRESHOLD)) for layer in variances]


def unit_kl(model, x, seed=0):
    """Each unit's term of KL(q(z | x) || p(z)): mean of log q(z_i | ..) - log p(z_i | ..), nats, [units] per layer.

    Of a lower layer it is what the layer above does not predict: 0 or less, too, of a unit that the decoder reads.
    x: [n, features] as fed to the encoder.
    """

    @tf.function(jit_compile=True)
    def log_ratios(images, seed):
        q = model.encode(images)
        z = model.sample_posterior(q, model.draw_noise(HALF_AVERAGE, tf.shape(images)[0], seed))
        priors = [layer.distribution(above) for layer, above in zip(model.decoder[1:], z[1:], strict=True)]
        pairs = zip(z, model.conditionals(q, z), [*priors, model.prior()], strict=True)
        return [tf.reduce_mean(q.distribution.log_prob(z) - p.distribution.log_prob(z), axis=0) for z, q, p in pairs]

    return [layer.mean(axis=0) for layer in map_images(log_ratios, x, seed)]


def interpolations(model, x):
    """Decoder means on the way from each image to the next one, straight from E[z_1 | x] to E[z_1 | x'].

    x: [n, features] as fed to the encoder -> [n // 2, INTERPOLATED, features], for the pairs (0, 1), (2, 3), ..
    """
    z = model.encode(x[: len(x) // 2 * 2]).mean()
    return model.decode(tf.linspace(z[0::2], z[1::2], INTERPOLATED, axis=1)).numpy()


def principal_components(z, rotate):
    """z [n, units] in two dimensions [n, 2], and each one's share of the variance [2]. Not rotated: two alone."""
    if rotate:
        z = z - z.mean(axis=0)
        u, scale, _ = np.linalg.svd(np.pad(z, [(0, 0), (0, max(0, 2 - z.shape[1]))]), full_matrices=False)
        z = u * scale
    return z[:, :2], z[:, :2].var(axis=0) / z.var(axis=0).sum()


def reconstructions(model, x, seed=0):
    """What a decoder makes of each image by three choices of z.

    x: [n, features] as fed to the encoder. Returns three arrays [n, features]: decoder means at the mean of q(z_1 | x),
    at a sample of q, at one of K_RESAMPLING samples drawn by its importance weight.
    """

    @tf.function(jit_compile=True)
    def draws(images, seed):
        noise_seed, uniform_seed = tf.unstack(split_seed(seed))
        q = model.encode(images)
        z, log_w = model.weighted_samples(images, q, K_RESAMPLING, noise_seed)
        chosen = resample(normalized_weights(log_w), 1, random_uniform([tf.shape(images)[0]], uniform_seed))
        resampled = gather_samples(z[0], chosen)[0]
        return model.decode(q.mean()), model.decode(z[0][0]), model.decode(resampled)

    return map_images(draws, x, seed)


def top_samples(model, x, seed=0):
    """A sample of q(z_L | x) of each image, [n, units]. x: [n, features] as fed to the encoder."""

    @tf.function(jit_compile=True)
    def sample(images, seed):
        return model.sample_posterior(model.encode(images), model.draw_noise(1, tf.shape(images)[0], seed))[-1][0]

    return map_images(sample, x, seed)


def shown_images(x, labels):
    """Indices of the images that figures show: the first of each class, or the first where no two differ; at most 10.

    x: [n, features]; labels: [n] integers or None.
    """
    firsts = [] if labels is None else np.unique(labels, return_index=True)[1]
    return (firsts if len(firsts) > 1 else np.arange(len(x)))[:10]


def figure_arrays(model, x_mean, x, labels=None, seed=0):
    """Every array of a model that the figures show, by the names that `plotting.PLOTS` read.

    x_mean: [n, features] grey test images; x: the same as fed to the encoder; labels: [n] integers or None.
    """
    shown = shown_images(x, labels)
    by_mean, by_sample, by_resampling = reconstructions(model, x[shown], seed)
    rotate = model.latent_units[-1] != 2
    samples, explained = principal_components(top_samples(model, x, seed), rotate)
    arrays = {
        "x_mean": x_mean[shown],
        "x": x[shown],
        "reconstruction_mean": by_mean,
        "reconstruction_sample": by_sample,
        "reconstruction_resampled": by_resampling,
        "k_resampling": K_RESAMPLING,
        "interpolation": interpolations(model, x[shown]),
        "prior_samples": model.sample(100, (seed, 0)).numpy(),
        "posterior_samples": samples,
        "posterior_projection": "PCA" if rotate else "latent",
        "posterior_explained": explained,
        "labels": np.full(len(x), -1) if labels is None else labels,
        "active_threshold": ACTIVE_THRESHOLD,
        "encoder_weights": model.encoder[0].hidden[0].kernel.numpy(),
        "decoder_weights": model.decoder[0].head.kernel.numpy(),
    }
    for name, measure in (("unit_variance", unit_variances), ("unit_kl", unit_kl)):
        arrays |= {f"{name}_{layer}": units for layer, units in enumerate(measure(model, x, seed), start=1)}
    return {name: np.asarray(array) for name, array in arrays.items()}
