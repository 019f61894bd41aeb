"""`gradients.gradients` against automatic differentiation, and in the mean against a model with exact answers.

The z-tests ask whether two estimators, fed the same noise, have the same mean gradient. In all of them together fewer
than COORDINATES figures are looked at, so that correct code fails with a probability of about FALSE_ALARM, by the
normal approximation; seeds are fixed. The negative controls ask for so large a z that another seed would let the wrong
estimator pass with less than 0.001.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import multivariate_normal, norm

from gradients import gradients
from losses import (
    OBJECTIVES,
    TARGETS,
    Objective,
    build_objective,
    dreg,
    iwae,
    normalized_weights,
    resample,
    split_groups,
)
from models import Autoencoder, random_normal, split_seed

FALSE_ALARM, COORDINATES = 1e-4, 1000
Z_LIMIT = norm.isf(FALSE_ALARM / 2 / COORDINATES)  # 5.3
Z_CAUGHT = Z_LIMIT + norm.isf(0.001) + 4  # passes the limit with probability 0.999 though z itself was 4 too lucky
REPLICATES = 20_000
NEXT_ORDER = 0.15  # with a million replicates the order 1/k^2 takes up to 0.12 from k = 4 to 16
KEYWORDS = {"ciwae": {"beta": 0.3}, "miwae": {"groups": 2}, "miwae_dreg": {"groups": 2}, "piwae": {"groups": 2}}
KEYWORDS |= {"vr": {"alpha": 0.4}, "vr_dreg": {"alpha": 0.4}}

each_depth = pytest.mark.parametrize("layers", [1, 2, 3])


def objective(name):
    """The objective as a function of log_w, with this file's parameters."""
    return build_objective(name, **KEYWORDS.get(name, {}))


# ------------------------------------------------------------------------------------------ linear-Gaussian model


class LinearGaussian:
    """Linear-Gaussian encoder and decoder in 64 bit, with the methods of models.Autoencoder that `gradients` calls.

    Every image of a batch has its own copy of the parameters: one call gives a gradient for each of many replicates.
    encoder, decoder: for each layer (weight [out, in], bias [out], log_std [out]); decoder[0] makes x.
    """

    def __init__(self, encoder, decoder, replicates):
        def copies(layer):
            return [tf.Variable(np.broadcast_to(value, (replicates, *value.shape))) for value in layer]

        self.encoder, self.decoder = [copies(layer) for layer in encoder], [copies(layer) for layer in decoder]
        self.units = [len(bias) for _, bias, _ in encoder]

    @property
    def phi(self):
        return [variable for layer in self.encoder for variable in layer]

    @property
    def theta(self):
        return [variable for layer in self.decoder for variable in layer]

    def encode(self, x):
        return affine(self.encoder[0], x)

    def draw_noise(self, k, batch, seed):
        seeds = tf.unstack(split_seed(seed, len(self.units)))
        return [
            random_normal([k, batch, units], layer_seed, dtype=tf.float64)
            for units, layer_seed in zip(self.units, seeds, strict=True)
        ]

    def sample_posterior(self, q, noise):
        z = []
        for layer, layer_noise in zip(self.encoder, noise, strict=True):
            mean, log_std = affine(layer, z[-1]) if z else q
            z.append(mean + tf.exp(log_std) * layer_noise)
        return z

    def log_q_z_given_x(self, q, z):
        conditionals = [q] + [affine(layer, below) for layer, below in zip(self.encoder[1:], z[:-1], strict=True)]
        return tf.add_n([log_normal(z_l, *each) for z_l, each in zip(z, conditionals, strict=True)])

    def log_joint(self, x, z):
        conditionals = [affine(layer, above) for layer, above in zip(self.decoder, z, strict=True)]
        zero = tf.zeros_like(z[-1])
        terms = zip([x, *z], [*conditionals, (zero, zero)], strict=True)
        return tf.add_n([log_normal(value, *each) for value, each in terms])


def affine(layer, inputs):
    """Mean and log standard deviation, given inputs [.., replicates, in]."""
    weight, bias, log_std = layer
    return tf.reduce_sum(weight * inputs[..., None, :], axis=-1) + bias, log_std


def log_normal(value, mean, log_std):
    """Log density of a diagonal Gaussian, summed over the last axis."""
    standardized = (value - mean) * tf.exp(-log_std)
    return -tf.reduce_sum(0.5 * standardized**2 + log_std + 0.5 * np.log(2 * np.pi), axis=-1)


def make_decoder(layers, independent=False):
    """Decoder of 2 units a layer and 4 features. independent: no feature and no unit has two parents, so that the
    posterior factorises as the encoder does."""
    rng, decoder = np.random.default_rng(layers), []
    for below in [4, 2, 2][:layers]:
        mask = np.kron(np.eye(2), np.ones((below // 2, 1))) if independent else 1
        decoder.append((mask * rng.normal(size=(below, 2)), 0.5 * rng.normal(size=below), 0.2 * rng.normal(size=below)))
    return decoder


def joint_moments(decoder):
    """Mean and covariance of (x, z_1 .. z_L)."""
    mean, covariance = np.zeros(2), np.eye(2)
    for weight, bias, log_std in decoder[::-1]:
        below, known = len(bias), len(mean)
        lift = np.vstack([np.hstack([weight, np.zeros((below, known - 2))]), np.eye(known)])
        mean = lift @ mean + np.pad(bias, (0, known))
        covariance = lift @ covariance @ lift.T + np.diag(np.pad(np.exp(2 * log_std), (0, known)))
    return mean, covariance


def condition(mean, covariance, n, value):
    """Moments of the other variables, given the first n."""
    gain = covariance[n:, :n] @ np.linalg.inv(covariance[:n, :n])
    return mean[n:] + gain @ (value - mean[:n]), covariance[n:, n:] - gain @ covariance[:n, n:]


def log_evidence(decoder, x):
    """Exact log p(x)."""
    mean, covariance = joint_moments(decoder)
    return multivariate_normal.logpdf(x, mean[:4], covariance[:4, :4])


def best_encoder(decoder):
    """Encoder with the mean and the variances of p(z_1 | x), p(z_2 | z_1) ..; [off-diagonal covariances left out]."""
    mean, covariance = joint_moments(decoder)
    encoder, left_out, start = [], [], 0
    for layer in range(len(decoder)):
        middle = 4 + 2 * layer
        own, values = covariance[start : middle + 2, start : middle + 2], mean[start : middle + 2]
        n = middle - start
        gain = own[n:, :n] @ np.linalg.inv(own[:n, :n])
        rest = own[n:, n:] - gain @ own[:n, n:]
        encoder.append((gain, values[n:] - gain @ values[:n], 0.5 * np.log(np.diag(rest))))
        left_out.append(rest[0, 1])
        start = middle
    return encoder, left_out


def rough_encoder(decoder, size=0.2):
    """The best encoder, perturbed, and wider, so that the weights have moments."""
    rng = np.random.default_rng(7)
    rough = [[value + size * rng.normal(size=value.shape) for value in layer] for layer in best_encoder(decoder)[0]]
    return [(weight, bias, log_std + 0.2) for weight, bias, log_std in rough]


def near_posterior(layers):
    """Encoder and decoder whose weights vary little, where 1/k is soon the leading order."""
    decoder = make_decoder(layers, independent=True)
    return rough_encoder(decoder, size=0.1), decoder


def log_q_under_posterior(encoder, decoder, x):
    """Exact E log q(z | x) over z ~ p(z | x): KL(p || q) is a constant less this."""
    mean, covariance = condition(*joint_moments(decoder), 4, x)
    mean, covariance = np.concatenate([x, mean]), np.pad(covariance, (4, 0))
    total, start = 0.0, 0
    for layer, (weight, bias, log_std) in enumerate(encoder):
        middle = 4 + 2 * layer
        residual = np.zeros((2, len(mean)))
        residual[:, start:middle], residual[:, middle : middle + 2] = -weight, np.eye(2)
        square = (residual @ mean - bias) ** 2 + np.diag(residual @ covariance @ residual.T)
        total -= np.sum(0.5 * square * np.exp(-2 * log_std) + log_std + 0.5 * np.log(2 * np.pi))
        start = middle
    return total


def slope(function, parameters, step=1e-5):
    """Gradient of a function of layers of parameters, by central differences, flat."""
    layers = [[value.copy() for value in layer] for layer in parameters]
    slopes = []
    for value in [value for layer in layers for value in layer]:
        for i in np.ndindex(value.shape):
            centre = value[i]
            ends = [function(layers) for value[i] in (centre + step, centre - step)]
            value[i] = centre
            slopes.append((ends[0] - ends[1]) / (2 * step))
    return np.array(slopes)


X = np.array([0.9, -0.4, 1.3, 0.2])  # the image of every replicate


def replicate(model, estimator, k, seed, backward_samples=None):
    """Bounds [replicates], and gradients of phi and of theta [replicates, coordinates], of as many calls on X."""
    replicates = model.phi[0].shape[0]
    x = tf.constant(np.broadcast_to(X, (replicates, 4)))
    bound, ascent = gradients(model, estimator, x, k, tf.constant([seed, 0]), backward_samples)
    # `gradients` is of the mean over the batch: times its size, each copy of the parameters has its own image's.
    flat = [replicates * gradient.numpy().reshape(replicates, -1) for gradient in ascent]
    encoder = len(model.phi)
    return bound.numpy(), np.concatenate(flat[:encoder], axis=1), np.concatenate(flat[encoder:], axis=1)


@functools.cache
def rough_model(layers, replicates=REPLICATES):
    """A linear-Gaussian model with a decoder of no special structure and a rough encoder."""
    decoder = make_decoder(layers)
    return LinearGaussian(rough_encoder(decoder), decoder, replicates)


@functools.cache
def rough_gradients(name, layers, k=4):
    """Bound, encoder gradient and decoder gradient of every replicate, for an entry of OBJECTIVES."""
    return replicate(rough_model(layers), objective(name), k, seed=layers)


LOOKED_AT = {}  # scores that tests ask to be below Z_LIMIT: {what: their number}


def assert_unbiased(what, z):
    """No score is beyond Z_LIMIT; the chance that a right estimator fails this is printed."""
    LOOKED_AT[what] = len(z)
    false_alarm = 2 * len(z) * norm.sf(Z_LIMIT)
    print(f"{what}: largest |z| {z.max():.2f} of {len(z)}; if right, it fails with p = {false_alarm:.0e}")
    assert z.max() < Z_LIMIT


def assert_caught(what, z):
    """Some score is so far beyond Z_LIMIT that another seed would be, too, with the probability that is printed."""
    power = norm.sf(Z_LIMIT - (z.max() - 4))
    print(f"{what}: largest |z| {z.max():.1f}; it fails with p > {power:.4f}, though |z| were 4 too large by luck")
    assert z.max() > Z_CAUGHT and power > 0.999


def fall_z(first, second):
    """How far a mean is from falling to a quarter, beyond the share that the next order may take, in standard errors.

    first, second: [replicates] of what falls as 1/k, at a k and at its fourfold.
    """
    distance = abs(first.mean() - 4 * second.mean()) - NEXT_ORDER * abs(first.mean())
    standard_error = np.hypot(first.std(), 4 * second.std()) / np.sqrt(len(first))
    return np.maximum([distance / standard_error], 0)


def z_scores(values, expected=0.0):
    """values [replicates, coordinates] -> distance of their mean from the expected one, in standard errors."""
    standard_error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.abs(values.mean(axis=0) - expected) / standard_error


# ------------------------------------------------------------------------------------------ nets in 64 bit

# The bounds once more, to be differentiated: log_w [k, batch] -> [batch].
BOUNDS = {
    "vae": lambda log_w: tf.reduce_mean(log_w, axis=0),
    "iwae": lambda log_w: tf.reduce_logsumexp(log_w, axis=0) - np.log(len(log_w)),
    "ciwae": lambda log_w: 0.3 * BOUNDS["vae"](log_w) + 0.7 * BOUNDS["iwae"](log_w),
    "miwae": lambda log_w: (BOUNDS["iwae"](log_w[0::2]) + BOUNDS["iwae"](log_w[1::2])) / 2,
    "vr": lambda log_w: BOUNDS["iwae"](0.6 * log_w) / 0.6,
}
SEED = (3, 5)


@pytest.fixture
def double():
    """Nets are made in 64 bit."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture
def net(small_net):
    """A function of the number of layers: a net away from its initial weights, where all gradients are alive."""

    def build(layers=1, likelihood="bernoulli"):
        model, rng = small_net(layers, likelihood), np.random.default_rng(layers)
        for variable in model.phi + model.theta:
            variable.assign_add(0.3 * rng.normal(size=variable.shape))
        return model

    return build


def images(x_small, model, n=5):
    return tf.constant(x_small[:n], model.compute_dtype)


def automatic(model, bound, x, k, seed=SEED):
    """Gradient of a bound, differentiated through the samples, with the noise that `gradients` draws from that seed."""
    noise = model.draw_noise(k, len(x), tf.unstack(split_seed(seed))[0])
    with tf.GradientTape() as tape:
        q = model.encode(x)
        z = model.sample_posterior(q, noise)
        mean = tf.reduce_mean(bound(model.log_joint(x, z) - model.log_q_z_given_x(q, z)))
    return tape.gradient(mean, model.phi + model.theta)


def flat(ascent):
    return np.concatenate([gradient.numpy().ravel() for gradient in ascent])


def distance(ours, theirs):
    """Length of the difference of two lists of gradients, relative to the second's."""
    return np.linalg.norm(flat(ours) - flat(theirs)) / np.linalg.norm(flat(theirs))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("name", BOUNDS)
@each_depth
def test_gradient_is_that_of_the_bound(name, layers, likelihood, net, x_small, double):
    model = net(layers, likelihood)
    x = images(x_small, model)
    bound, ascent = gradients(model, objective(name), x, 4, SEED)
    assert bound.dtype == tf.float64 and bound.shape == 5
    assert distance(ascent, automatic(model, BOUNDS[name], x, 4)) < 1e-12


@pytest.mark.parametrize("name", ["vae", "iwae"])
@each_depth
def test_single_precision_agrees_to_1e_5(name, layers, net, x_small):
    model = net(layers)
    x = images(x_small, model)
    ascent = gradients(model, objective(name), x, 10, SEED)[1]
    assert ascent[0].dtype == tf.float32
    assert distance(ascent, automatic(model, BOUNDS[name], x, 10)) < 1e-5


@each_depth
def test_stl_less_rws_is_iwae_in_every_draw(layers, net, x_small, double):
    model = net(layers)
    x = images(x_small, model)
    stl, rws, both = (gradients(model, objective(name), x, 4, SEED)[1] for name in ("stl", "rws", "iwae"))
    encoder = len(model.phi)
    assert distance([a - b for a, b in zip(stl[:encoder], rws, strict=False)], both[:encoder]) < 1e-12
    assert distance(stl[encoder:], both[encoder:]) < 1e-12 and distance(rws[encoder:], both[encoder:]) < 1e-12


@each_depth
def test_with_one_sample_iwae_is_vae(layers, net, x_small, double):
    model = net(layers)
    x = images(x_small, model)
    (bound, ascent), (elbo, other) = (gradients(model, OBJECTIVES[name], x, 1, SEED) for name in ("iwae", "vae"))
    np.testing.assert_allclose(bound, elbo, rtol=1e-13)
    assert distance(ascent, other) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("backward_samples", [None, 2])
def test_eager_and_compiled_agree_for_every_objective(net, x_small, double, monkeypatch, backward_samples):
    """With the random numbers given: XLA draws others from a seed than eager TensorFlow does."""
    model = net(2)
    x, noise = images(x_small, model), model.draw_noise(4, 5, SEED)
    monkeypatch.setattr(Autoencoder, "draw_noise", lambda *_: noise)
    monkeypatch.setattr("gradients.random_uniform", lambda *_, dtype: tf.cast([0.1, 0.3, 0.5, 0.7, 0.9], dtype))
    names = [name for name in OBJECTIVES if name != "piwae" or backward_samples is None]

    def every_gradient(x):
        return {name: gradients(model, objective(name), x, 4, SEED, backward_samples) for name in names}

    compiled = tf.function(every_gradient, jit_compile=True)(x)
    for name, (bound, ascent) in every_gradient(x).items():
        np.testing.assert_allclose(compiled[name][0], bound, rtol=1e-12)
        assert distance(compiled[name][1], ascent) < 1e-11, name


@pytest.mark.parametrize("layers", [1, 2])
def test_an_image_is_not_touched_by_the_others(layers, net, x_small, double):
    assert bound_of_first_image_moves(net(layers), x_small) == 0


def bound_of_first_image_moves(model, x_small):
    """How far it goes when the other images are inverted."""
    x = images(x_small, model)
    others = tf.concat([x[:1], 1 - x[1:]], axis=0)
    first, second = (gradients(model, iwae, batch, 4, SEED)[0] for batch in (x, others))
    return abs(first[0] - second[0]).numpy()


def test_the_encoder_reads_each_image_once_whatever_k_is(net, x_small, monkeypatch):
    """`gradients` has two forward passes, which are one when compiled; each sends `batch` rows through, never k."""
    model, rows = net(2), []
    first = model.encoder[0].hidden[0]
    read = first.call
    monkeypatch.setattr(first, "call", lambda inputs: rows.append(inputs.shape) or read(inputs))
    x = images(x_small, model)
    for k in (1, 50):
        model.log_weights(x, k, SEED)
        assert rows == [(5, 12)]
        rows.clear()
        for name in ("iwae", "dreg"):
            for backward_samples in {None, min(k, 2)}:
                gradients(model, objective(name), x, k, SEED, backward_samples)
                assert rows == [(5, 12)] * 2
                rows.clear()


# ------------------------------------------------------------------------------------------ exact answers


def test_the_reference_itself_is_right():
    """Log p(x) = log p(x, z) - log p(z | x) at any z; the posterior of an independent decoder factorises."""
    for layers in (1, 2, 3):
        decoder = make_decoder(layers, independent=True)
        encoder, left_out = best_encoder(decoder)
        np.testing.assert_allclose(left_out, 0, atol=1e-12)
        model = LinearGaussian(encoder, decoder, replicates=100)
        x = tf.constant(np.broadcast_to(X, (100, 4)))
        q = model.encode(x)
        z = model.sample_posterior(q, model.draw_noise(3, 100, SEED))
        log_w = model.log_joint(x, z) - model.log_q_z_given_x(q, z)
        np.testing.assert_allclose(log_w, log_evidence(decoder, X), rtol=1e-12)


@pytest.mark.parametrize("name", ["vae", "iwae", "dreg", "vr"])
@each_depth
def test_with_the_posterior_as_encoder_everything_is_exact(name, layers):
    """Any bound is log p(x) in every draw; in the mean the decoder's gradient is that of log p(x) at any k (Fisher)."""
    decoder = make_decoder(layers, independent=True)
    model = LinearGaussian(best_encoder(decoder)[0], decoder, REPLICATES // 2)
    bound, _, theta = replicate(model, objective(name), 2, seed=11)
    np.testing.assert_allclose(bound, log_evidence(decoder, X), rtol=1e-12)
    z = z_scores(theta, slope(lambda layers: log_evidence(layers, X), decoder))
    assert_unbiased(f"decoder of {name} - d log p(x), {layers} layers", z)


@each_depth
def test_with_the_posterior_as_encoder_gradients_without_a_score_vanish(layers):
    decoder = make_decoder(layers, independent=True)
    model = LinearGaussian(best_encoder(decoder)[0], decoder, replicates=50)
    for name in ("stl", "dreg", "rws_dreg", "miwae_dreg", "vr_dreg"):
        assert np.abs(replicate(model, objective(name), 4, seed=1)[1]).max() < 1e-12
    for name in ("iwae", "rws"):  # the control: the score alone does not vanish
        assert np.abs(replicate(model, objective(name), 4, seed=1)[1]).max() > 0.1


@each_depth
def test_bounds_rise_to_log_p(layers):
    """Each fourfold k raises the bound by many standard errors, never over log p, and the gap falls as 1/k does.

    As far as replicates and the next order tell: powers from k^-0.6 to k^-2 pass, no fall at all does not.
    """
    encoder, decoder = near_posterior(layers)
    model = LinearGaussian(encoder, decoder, REPLICATES)
    bounds = np.array([replicate(model, iwae, k, seed=k)[0] for k in (1, 4, 16)])
    gap = log_evidence(decoder, X) - bounds.mean(axis=1)
    standard_error = bounds.std(axis=1) / np.sqrt(REPLICATES)
    print(f"log p - L_k, {layers} layers, k = 1, 4, 16: {gap} +- {standard_error}")
    assert np.all(-np.diff(gap) > Z_LIMIT * np.hypot(standard_error[1:], standard_error[:-1]))
    assert np.all(gap > -Z_LIMIT * standard_error)
    gaps = log_evidence(decoder, X) - bounds
    assert_unbiased(f"gap falls as 1/k, {layers} layers", fall_z(gaps[1], gaps[2]))
    in_fours = log_evidence(decoder, X) - replicate(model, functools.partial(in_groups_of_four, "iwae"), 16, seed=16)[0]
    assert_caught(f"gap of groups of 4, {layers} layers", fall_z(gaps[1], in_fours))


# ------------------------------------------------------------------------------------------ means of estimators


@pytest.mark.parametrize(("name", "plain"), [pair for pair in TARGETS.items() if pair[0] != "stl"])
@each_depth
def test_doubly_reparameterised_gradient_has_the_mean_of_the_plain_one(name, plain, layers):
    (_, phi, theta), (_, plain_phi, plain_theta) = rough_gradients(name, layers), rough_gradients(plain, layers)
    z = z_scores(phi - plain_phi)
    assert_unbiased(f"{name} - {plain}, {layers} layers", z)
    np.testing.assert_allclose(theta, plain_theta, rtol=1e-10, atol=1e-10)


@each_depth
def test_that_test_catches_sticking_the_landing(layers):
    """The negative control: `stl` at k = 4 is biased, and seen to be, with a power above 0.999."""
    z = z_scores(rough_gradients("stl", layers)[1] - rough_gradients("iwae", layers)[1])
    assert_caught(f"stl - iwae, {layers} layers", z)


def test_sticking_the_landing_is_unbiased_with_one_sample():
    z = z_scores(rough_gradients("stl", 2, k=1)[1] - rough_gradients("vae", 2, k=1)[1])
    assert_unbiased("stl - vae at k = 1", z)


@each_depth
def test_bias_of_reweighted_wake_sleep_falls_as_1_over_k(layers):
    """Against the exact gradient of -KL(p || q); the negative control has weights that know 4 samples alone.

    Powers from k^-0.75 to k^-1.5 pass; k^-0.6, k^-2 and no fall at all do not.
    """
    errors = [error_of_wake_sleep(objective("rws"), layers, k) for k in (4, 16)]
    assert_unbiased(f"bias of rws falls as 1/k, {layers} layers", fall_z(*errors))
    in_fours = error_of_wake_sleep(functools.partial(in_groups_of_four, "rws"), layers, 16)
    assert_caught(f"bias of rws in groups of 4, {layers} layers", fall_z(errors[0], in_fours))


def in_groups_of_four(name, log_w):
    """The mean of an objective's estimates by four samples each."""
    groups = len(log_w) // 4
    bound, *weights = objective(name)(split_groups(log_w, groups))
    return Objective(tf.reduce_mean(bound, axis=0), *[tf.reshape(weight / groups, log_w.shape) for weight in weights])


@functools.cache
def wake_sleep(layers):
    """A model, the exact gradient of E log q(z | x) over the posterior, and the bias's direction at k = 4."""
    encoder, decoder = near_posterior(layers)
    model = LinearGaussian(encoder, decoder, REPLICATES)
    exact = slope(lambda layers: log_q_under_posterior(layers, decoder, X), encoder)
    bias = replicate(model, objective("rws_dreg"), 4, seed=5)[1].mean(axis=0) - exact
    return model, exact, bias / np.linalg.norm(bias)


def error_of_wake_sleep(estimator, layers, k):
    """Error of every replicate's encoder gradient along the direction of the bias, which other replicates tell."""
    model, exact, direction = wake_sleep(layers)
    return (replicate(model, estimator, k, seed=20 + k)[1] - exact) @ direction


# ------------------------------------------------------------------------------------------ subsampled backward pass


@pytest.mark.parametrize("name", ["vae", "iwae", "dreg"])
@pytest.mark.parametrize("layers", [1, 2])
def test_subsampled_backward_pass_is_unbiased(name, layers):
    z = subsampling_z(name, layers)
    assert_unbiased(f"{name}, 2 of 8 samples backward, {layers} layers", z)


def subsampling_z(name, layers):
    """Scores of the difference, between 2 of 8 samples and all of them, of both gradients."""
    estimator, model = objective(name), rough_model(layers)
    some, every = (replicate(model, estimator, 8, seed=31, backward_samples=s) for s in (2, None))
    np.testing.assert_array_equal(some[0], every[0])
    return z_scores(np.concatenate([a - b for a, b in zip(some[1:], every[1:], strict=True)], axis=1))


@pytest.mark.parametrize("backward_samples", [4, 7])
def test_of_as_many_backward_samples_as_there_are_all_are_taken(net, x_small, double, backward_samples):
    """A stage of the schedule may have fewer: a draw of them would be noise for nothing."""
    model = net()
    x = images(x_small, model)
    some, every = (gradients(model, objective("iwae"), x, 4, SEED, s)[1] for s in (backward_samples, None))
    assert distance(some, every) == 0


@pytest.mark.parametrize("name", ["iwae", "dreg"])
def test_that_test_catches_samples_drawn_evenly(name, monkeypatch):
    def evenly(weights, count, uniform):
        return resample(tf.ones_like(weights) / 8, count, uniform)

    monkeypatch.setattr("gradients.resample", evenly)
    assert_caught(f"{name}, samples drawn evenly", subsampling_z(name, 1))


# ------------------------------------------------------------------------------------------ two bounds at once


@each_depth
def test_piwae_gives_each_half_the_gradient_of_its_bound(layers, net, x_small, double):
    model = net(layers)
    x = images(x_small, model)
    ascent = gradients(model, objective("piwae"), x, 4, SEED)[1]
    encoder = len(model.phi)
    assert distance(ascent[:encoder], automatic(model, BOUNDS["miwae"], x, 4)[:encoder]) < 1e-12
    assert distance(ascent[encoder:], automatic(model, BOUNDS["iwae"], x, 4)[encoder:]) < 1e-12


def test_piwae_hears_a_group_whose_weights_have_underflowed():
    """Log weights that are thousands of nats apart: the better sample has all of the decoder's weight."""
    weight, bias, _ = make_decoder(1)[0]
    decoder = [(weight, bias, np.full(4, -4.0))]
    model = LinearGaussian(rough_encoder(make_decoder(1)), decoder, 20)
    _, phi, theta = replicate(model, objective("piwae"), 4, seed=2)
    np.testing.assert_allclose(phi, replicate(model, objective("miwae"), 4, seed=2)[1], rtol=1e-9)
    np.testing.assert_allclose(theta, replicate(model, objective("iwae"), 4, seed=2)[2], rtol=1e-9)


def test_piwae_refuses_a_subsampled_backward_pass(net, x_small):
    model = net()
    with pytest.raises(ValueError, match="backward_samples"):
        gradients(model, objective("piwae"), images(x_small, model), 4, SEED, backward_samples=2)


# ------------------------------------------------------------------------------------------ bugs known from peers


def squared_everywhere(log_w):
    """`dreg` with its squared weights on the decoder, too."""
    return dreg(log_w)._replace(decoder=normalized_weights(log_w) ** 2)


def averaged_first(log_w):
    """`iwae` of the batch's average."""
    return iwae(tf.broadcast_to(tf.reduce_mean(log_w, axis=1, keepdims=True), tf.shape(log_w)))


class AveragedLikelihood(Autoencoder):
    """An Autoencoder whose log p(x | z) is averaged over samples and images before it is weighted."""

    def log_joint(self, x, z):
        log_likelihood = self.decoder[0].log_prob(x, z[0])
        return super().log_joint(x, z) - log_likelihood + tf.reduce_mean(log_likelihood)


@each_depth
def test_squared_weights_on_the_decoder_are_caught(layers):
    wrong = replicate(rough_model(layers), squared_everywhere, 4, seed=layers)[2]
    z = z_scores(wrong - rough_gradients("iwae", layers)[2])
    assert_caught(f"squared decoder weights, {layers} layers", z)


def test_weights_of_batch_averages_are_caught(net, x_small, double):
    model = net(2)
    x = images(x_small, model)
    assert distance(gradients(model, averaged_first, x, 4, SEED)[1], automatic(model, BOUNDS["iwae"], x, 4)) > 0.1
    with_one_sample = gradients(model, averaged_first, x, 1, SEED)[1]
    assert distance(with_one_sample, automatic(model, BOUNDS["vae"], x, 1)) < 1e-12  # why k > 1 must be tested


def test_an_averaged_likelihood_is_caught(x_small, double):
    model = AveragedLikelihood(x_small.mean(axis=0), (4,), ((8, 8),))
    assert bound_of_first_image_moves(model, x_small) > 0.1


def test_an_objective_is_a_bound_and_three_weights():
    assert Objective._fields == ("bound", "decoder", "path", "score")


def test_scores_looked_at_are_as_few_as_the_false_alarm_allows():
    """Over all tests of this file, which stands last: any right estimator fails with less than FALSE_ALARM."""
    assert sum(LOOKED_AT.values()) <= COORDINATES
    assert 2 * COORDINATES * norm.sf(Z_LIMIT) == pytest.approx(FALSE_ALARM)
