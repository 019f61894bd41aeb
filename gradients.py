"""The gradient of any objective at any depth, by one mechanism: z is cut from the encoder and re-attached."""

import tensorflow as tf

from distributed import whole
from losses import TwoBounds, gather_samples, resample
from models import random_uniform, split_seed


def gradients(model, objective, x, k, seed, backward_samples=None, own=whole):
    """Bound and gradients to ascend, of the mean over the batch, for any objective and any number of layers.

    Three steps: log_w of all k samples, without gradients; the objective's weights, which are constants; the backward
    pass, with z cut from the encoder and re-attached with a weight of its own. (XLA merges the forward passes of the
    first and the third step.) With `backward_samples` = s < k only s samples are differentiated, and go forward once
    more: see `subsample`.

    objective: a function log_w -> Objective; x: [batch, features]; seed: [2] integers; own: see `over_replicas`.
    Returns bound [batch] in nats, gradients for model.phi + model.theta; of a replica its own part of the bound, and
    its share of the gradients. Raises ValueError for `backward_samples` with an objective of two bounds.
    """
    batch = tf.shape(x)[0]
    noise_seed, resampling_seed = tf.unstack(split_seed(seed))
    noise, x = [own(layer, 1) for layer in model.draw_noise(k, batch, noise_seed)], own(x, 0)
    q = model.encode(x)
    z = model.sample_posterior(q, noise)
    estimate = objective(model.log_joint(x, z) - model.log_q_z_given_x(q, z))
    bound, *weights = (part for part in estimate if part is not None)
    two_bounds = isinstance(estimate, TwoBounds)
    if two_bounds and backward_samples is not None:
        raise ValueError(f"backward_samples = {backward_samples}: must be None for an objective of two bounds")
    if backward_samples is not None and backward_samples < k:  # a stage of the schedule may have a smaller k
        uniform = random_uniform([batch], resampling_seed, dtype=noise[0].dtype)
        weights, noise = subsample(weights, noise, backward_samples, own(uniform, 0))
    decoder, path, *score = (tf.stop_gradient(weight) / tf.cast(batch, bound.dtype) for weight in weights)

    with tf.GradientTape() as encoder_tape:
        q = model.encode(x)
        z = model.sample_posterior(q, noise)
        with tf.GradientTape(persistent=two_bounds) as decoder_tape:
            z_cut = [tf.stop_gradient(layer) for layer in z]
            decoder_tape.watch(z_cut)
            log_q = model.log_q_z_given_x(q, z_cut)
            log_w = model.log_joint(x, z_cut) - log_q
            for_decoder, for_path = tf.reduce_sum(decoder * log_w), tf.reduce_sum(path * log_w)
        d_theta, d_z = decoder_tape.gradient(for_decoder, (model.theta, z_cut))
        if two_bounds:
            d_z = decoder_tape.gradient(for_path, z_cut)
        else:  # d_z carries the decoder's weight; where that has underflowed to 0 the path's is 0 as well
            d_z = [tf.math.divide_no_nan(path, decoder)[..., None] * layer for layer in d_z]
        reattached = [tf.reduce_sum(tf.stop_gradient(d) * layer) for d, layer in zip(d_z, z, strict=True)]
        surrogate = tf.add_n(reattached + [tf.reduce_sum(weight * log_q) for weight in score])
    return bound, [*encoder_tape.gradient(surrogate, model.phi), *d_theta]


def subsample(weights, noise, count, uniform):
    """`count` of k samples, drawn in proportion to the decoder's weights: the weights and the noise of each.

    Unbiased, since every weight is then a ratio to the decoder's. weights: [k, batch] each, the decoder's first; noise:
    [k, batch, units]; uniform: [batch] in [0, 1).
    """
    chosen = resample(weights[0], count, uniform)
    decoder, *others = (gather_samples(weight, chosen) for weight in weights)
    weights = [tf.ones_like(decoder)] + [tf.math.divide_no_nan(weight, decoder) for weight in others]
    return [weight / count for weight in weights], [gather_samples(layer, chosen) for layer in noise]
