"""Bounds on log p(x) and estimators of their gradients: pure functions of the log importance weights.

``log_w [k, batch]`` holds log p(x, z_k) - log q(z_k | x) for k samples z_k ~ q(z | x) of each of a batch of inputs.
Everything here is in nats, keeps one value per input, and is to be maximised.
"""

from typing import NamedTuple

import tensorflow as tf


def log_mean_exp(log_w):
    """Logarithm of the mean over k of the weights.

    log_w: [k, batch] -> [batch], nats. Finite as long as one of the k weights is.
    """
    k = tf.cast(tf.shape(log_w)[0], log_w.dtype)
    return tf.reduce_logsumexp(log_w, axis=0) - tf.math.log(k)


def elbo(log_w):
    """Evidence lower bound, estimated with k samples: the mean of log_w (Kingma and Welling 2014).

    log_w: [k, batch] -> [batch], nats.
    """
    return tf.reduce_mean(log_w, axis=0)


def iwae_bound(log_w):
    """Importance-weighted bound L_k (Burda et al. 2016, eq. 8); equal to the ELBO at k = 1.

    log_w: [k, batch] -> [batch], nats.
    """
    return log_mean_exp(log_w)


def normalized_weights(log_w):
    """Importance weights that sum to 1 over k (w-tilde of Burda et al. 2016, eq. 14).

    log_w: [k, batch] -> [k, batch].
    """
    return tf.nn.softmax(log_w, axis=0)


def effective_sample_size(log_w):
    """Kish's effective sample size 1 / sum of squared normalized weights, between 1 and k.

    log_w: [k, batch] -> [batch].
    """
    return 1 / tf.reduce_sum(normalized_weights(log_w) ** 2, axis=0)


def resample(weights, count, uniform):
    """Systematic resampling: `count` indices over k, drawn in proportion to the weights, for each input.

    weights: [k, batch], summing to 1 over k; uniform: [batch] in [0, 1) -> [count, batch] int32.
    """
    points = (tf.cast(tf.range(count), weights.dtype)[:, None] + uniform) / count
    below = tf.cumsum(weights, axis=0)[:, None, :] <= points[None, :, :]
    return tf.minimum(tf.reduce_sum(tf.cast(below, tf.int32), axis=0), tf.shape(weights)[0] - 1)


def gather_samples(values, indices):
    """values [k, batch, ..], indices [s, batch] -> [s, batch, ..], the chosen samples of every input."""
    columns = tf.broadcast_to(tf.range(tf.shape(indices)[1]), tf.shape(indices))
    return tf.gather_nd(values, tf.stack([indices, columns], axis=-1))


class Objective(NamedTuple):
    """What an estimator makes of ``log_w``: a bound to report and three constant weights that form the gradient.

    With z cut from the encoder, the gradients that `training.gradients` ascends are

        decoder: sum_k decoder * d log_w / d theta
        encoder: sum_k path * (d log_w / d z) (d z / d phi) + score * d log q(z | x) / d phi at fixed z

    bound: [batch], nats; decoder, path, score: [k, batch].
    """

    bound: tf.Tensor
    decoder: tf.Tensor
    path: tf.Tensor
    score: tf.Tensor


def vae(log_w):
    """ELBO with its reparameterised gradient (Kingma and Welling 2014): every sample weighs 1/k.

    d log_w = d log_w/dz dz - d log q at fixed z, averaged over k.
    """
    u = tf.ones_like(log_w) / tf.cast(tf.shape(log_w)[0], log_w.dtype)
    return Objective(elbo(log_w), decoder=u, path=u, score=-u)


def iwae(log_w):
    """L_k with its reparameterised gradient (Burda et al. 2016, eq. 14): every sample weighs w.

    d log sum_k exp(log_w) = sum_k w d log_w.
    """
    w = normalized_weights(log_w)
    return Objective(iwae_bound(log_w), decoder=w, path=w, score=-w)


def stl(log_w):
    """L_k, "sticking the landing" (Roeder et al. 2017): the score term of `iwae` left out.

    Its mean is zero at k = 1 only: for k > 1 the encoder's gradient is biased.
    """
    w = normalized_weights(log_w)
    return Objective(iwae_bound(log_w), decoder=w, path=w, score=tf.zeros_like(w))


def dreg(log_w):
    """L_k, doubly reparameterised (Tucker et al. 2019): unbiased as `iwae`, with no score term.

    Reparameterising sum_k w d log q once more turns it into sum_k (w - w^2) d log_w/dz dz.
    """
    w = normalized_weights(log_w)
    return Objective(iwae_bound(log_w), decoder=w, path=w**2, score=tf.zeros_like(w))


OBJECTIVES = {"vae": vae, "iwae": iwae, "stl": stl, "dreg": dreg}
