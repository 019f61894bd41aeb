"""Bounds on log p(x) and estimators of their gradients: pure functions of the log importance weights.

``log_w [k, batch]`` holds log p(x, z_k) - log q(z_k | x) for k samples z_k ~ q(z | x) of each of a batch of inputs.
Everything here is in nats, keeps one value per input, and is to be maximised.
"""

from functools import partial
from typing import NamedTuple

import tensorflow as tf


def elbo(log_w):
    """Evidence lower bound, estimated with k samples: the mean of log_w (Kingma and Welling 2014).

    log_w: [k, batch] -> [batch], nats.
    """
    return tf.reduce_mean(log_w, axis=0)


def iwae_bound(log_w):
    """Importance-weighted bound L_k, the log of the weights' mean (Burda et al. 2016, eq. 8); at k = 1 the ELBO.

    log_w: [k, batch] -> [batch], nats. Finite as long as one of the k weights is.
    """
    k = tf.cast(tf.shape(log_w)[0], log_w.dtype)
    return tf.reduce_logsumexp(log_w, axis=0) - tf.math.log(k)


def jackknife(log_w):
    """First-order jackknife of L_k (Nowozin 2018): a bias of order 1/k^2, and no bound any more. For evaluation.

    That order is reached where many samples are effective: with few, most of the bias of L_k is left.
    k L_k - (k - 1) times the mean of the k values of L_(k-1) that leave one sample out.
    log_w: [k, batch] -> [batch], nats; infinite where one sample alone is finite. Raises ValueError at k = 1.
    """
    k = log_w.shape[0]
    if k == 1:
        raise ValueError("the jackknife needs k = 2 samples or more: it leaves one out")
    log_w_normalized = tf.nn.log_softmax(log_w, axis=0)
    # log(1 - w), all but one sample's share; for the largest w, where 1 - w would cancel, from the others themselves.
    largest = tf.one_hot(tf.argmax(log_w), k, True, False, axis=0)
    nothing = tf.constant(-float("inf"), log_w.dtype)
    others = tf.reduce_logsumexp(tf.where(largest, nothing, log_w_normalized), axis=0)
    log_remainder = tf.where(largest, others, tf.math.log1p(-tf.exp(log_w_normalized)))
    shrinkage = tf.math.log1p(tf.constant(-1 / k, log_w.dtype))
    return iwae_bound(log_w) + (k - 1) * (shrinkage - tf.reduce_mean(log_remainder, axis=0))


def split_groups(log_w, groups):
    """The k samples in groups of equal size: [k, batch] -> [k / groups, groups, batch].

    Raises ValueError where `groups` does not divide k.
    """
    k = log_w.shape[0]
    if groups < 1 or k % groups:
        raise ValueError(f"groups = {groups}: must divide k = {k}")
    return tf.reshape(log_w, [k // groups, groups, -1])


def normalized_weights(log_w):
    """Importance weights that sum to 1 over k (w-tilde of Burda et al. 2016, eq. 14).

    A sample at -inf weighs nothing. Where all are, none is better than another: each weighs 1/k, and the bound of -inf
    tells that they are impossible. log_w: [k, ..] -> [k, ..].
    """
    impossible = tf.reduce_all(tf.equal(log_w, -float("inf")), axis=0)
    return tf.nn.softmax(tf.where(impossible, tf.zeros_like(log_w), log_w), axis=0)


def group_weights(log_w, groups):
    """Importance weights normalized within each of the groups of `split_groups`, and over all k.

    log_w: [k, batch] -> [k, batch].
    """
    return tf.reshape(normalized_weights(split_groups(log_w, groups)) / groups, tf.shape(log_w))


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
    cumulative = tf.cumsum(weights, axis=0)[:, None, :]
    # The second condition: rounding may leave the total below the last point, and what follows it weighs nothing.
    below = (cumulative <= points) & (cumulative < cumulative[-1])
    return tf.reduce_sum(tf.cast(below, tf.int32), axis=0)


def gather_samples(values, indices):
    """values [k, batch, ..], indices [s, batch] -> [s, batch, ..], the chosen samples of every input."""
    columns = tf.broadcast_to(tf.range(tf.shape(indices)[1]), tf.shape(indices))
    return tf.gather_nd(values, tf.stack([indices, columns], axis=-1))


class Objective(NamedTuple):
    """What an estimator makes of ``log_w``: a bound to report and the constant weights that form the gradient.

    With z cut from the encoder, the gradients that `gradients.gradients` gives are

        decoder: sum_k decoder * d log_w / d theta
        encoder: sum_k path * (d log_w / d z) (d z / d phi) + score * d log q(z | x) / d phi at fixed z

    bound: [batch], nats; decoder, path, score: [k, batch]. Without a score term (None) its backward pass is not made.
    """

    bound: tf.Tensor
    decoder: tf.Tensor
    path: tf.Tensor
    score: tf.Tensor | None = None


class TwoBounds(Objective):
    """An Objective whose decoder and encoder ascend different bounds, so that one backward pass cannot serve both.

    The path weight may be large where the decoder's has underflowed: no ratio of the two, nor a subsample drawn by the
    decoder's, is of use.
    """


def uniform_weights(log_w):
    """The weight 1/k for every sample: [k, batch] -> [k, batch]."""
    return tf.ones_like(log_w) / tf.cast(tf.shape(log_w)[0], log_w.dtype)


def vae(log_w):
    """ELBO with its reparameterised gradient (Kingma and Welling 2014): every sample weighs 1/k.

    d log_w = d log_w/dz dz - d log q at fixed z, averaged over k.
    """
    u = uniform_weights(log_w)
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
    return Objective(iwae_bound(log_w), decoder=w, path=w)


def dreg(log_w):
    """L_k, doubly reparameterised (Tucker et al. 2019): unbiased as `iwae`, with no score term.

    Reparameterising sum_k w d log q once more turns it into sum_k (w - w^2) d log_w/dz dz.
    """
    w = normalized_weights(log_w)
    return Objective(iwae_bound(log_w), decoder=w, path=w**2)


def rws(log_w):
    """Reweighted wake-sleep, its wake phases (Bornschein and Bengio 2015): the decoder ascends L_k as in `iwae`.

    The encoder ascends no bound but E log q(z | x) over the posterior, self-normalized: sum_k w d log q.
    """
    w = normalized_weights(log_w)
    return Objective(iwae_bound(log_w), decoder=w, path=tf.zeros_like(w), score=w)


def rws_dreg(log_w):
    """`rws`, doubly reparameterised (Tucker et al. 2019): the same mean, with no score term.

    Reparameterising sum_k w d log q turns it into sum_k (w - w^2) d log_w/dz dz.
    """
    w = normalized_weights(log_w)
    return Objective(iwae_bound(log_w), decoder=w, path=w - w**2)


def ciwae(log_w, *, beta):
    """beta ELBO + (1 - beta) L_k (Rainforth et al. 2018): `iwae` at beta = 0, `vae` at 1.

    Weights mix as the bounds do. Raises ValueError for a beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta}: must be in [0, 1]")
    c = beta * uniform_weights(log_w) + (1 - beta) * normalized_weights(log_w)
    # Without the ELBO a sample of weight 0, whose log_w is -inf, is none of the bound's business.
    bound = tf.math.multiply_no_nan(elbo(log_w), beta) + (1 - beta) * iwae_bound(log_w)
    return Objective(bound, decoder=c, path=c, score=-c)


def miwae(log_w, *, groups):
    """Mean of L_(k / groups) over groups (Rainforth et al. 2018): `iwae` with 1 group, `vae` with k.

    Each group's gradient is that of `iwae`, over the number of groups. Raises ValueError if groups do not divide k.
    """
    g = group_weights(log_w, groups)
    bound = tf.reduce_mean(iwae_bound(split_groups(log_w, groups)), axis=0)
    return Objective(bound, decoder=g, path=g, score=-g)


def miwae_dreg(log_w, *, groups):
    """`miwae`, doubly reparameterised in each group (Rainforth et al. 2018, Tucker et al. 2019).

    The square of a weight within its group, groups * g, over the number of groups, is groups * g^2.
    """
    bound, g, _, _ = miwae(log_w, groups=groups)
    return Objective(bound, decoder=g, path=groups * g**2)


def piwae(log_w, *, groups):
    """The decoder ascends L_k, the encoder the bound of `miwae` (Rainforth et al. 2018); L_k is reported.

    d L_k / d theta = sum_k w d log_w, d (mean of L_(k/groups)) / d phi = sum_k g d log_w: one gradient for each.
    """
    g = group_weights(log_w, groups)
    return TwoBounds(iwae_bound(log_w), decoder=normalized_weights(log_w), path=g, score=-g)


def vr(log_w, *, alpha):
    """Variational Renyi bound with its reparameterised gradient (Li and Turner 2016): every sample weighs v.

    L_k at alpha = 0, towards the ELBO as alpha goes to 1. Raises ValueError for an alpha outside [0, 1).
    d log sum_k exp((1 - alpha) log_w) / (1 - alpha) = sum_k v d log_w, v = softmax of (1 - alpha) log_w.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha = {alpha}: must be in [0, 1); `vae` is the limit at 1")
    tempered = (1 - alpha) * log_w
    v = normalized_weights(tempered)
    return Objective(iwae_bound(tempered) / (1 - alpha), decoder=v, path=v, score=-v)


def vr_dreg(log_w, *, alpha):
    """`vr`, doubly reparameterised (the VR-IWAE bound of Daudel et al. 2023): `dreg` at alpha = 0.

    d v = (1 - alpha) (v - v^2) d log_w, so that sum_k v d log q turns into (1 - alpha) sum_k (v - v^2) d log_w/dz dz.
    """
    bound, v, _, _ = vr(log_w, alpha=alpha)
    return Objective(bound, decoder=v, path=alpha * v + (1 - alpha) * v**2)


OBJECTIVES = {
    objective.__name__: objective
    for objective in (vae, iwae, stl, dreg, rws, rws_dreg, ciwae, miwae, miwae_dreg, piwae, vr, vr_dreg)
}

# The objective whose mean an estimator without a score term is meant to have (`stl` has not); the others are their own.
TARGETS = {"stl": "iwae", "dreg": "iwae", "rws_dreg": "rws", "miwae_dreg": "miwae", "vr_dreg": "vr"}


def build_objective(name, **parameters):
    """The objective of that name as a function of log_w alone: build_objective("ciwae", beta=0.5, groups=None).

    A parameter that is None is one that this objective does not take.
    """
    return partial(OBJECTIVES[name], **{key: value for key, value in parameters.items() if value is not None})
