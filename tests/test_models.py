"""models.py: the paper's nets, densities against scipy, sampling, weights that come back."""

import json

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import models
from experiments import PAPER, run_named
from models import Autoencoder, keep_units, load_run, random_normal, save_weights, snapshots

SEED = (1, 2)


def kernels(layers):
    return [tuple(v.shape) for layer in layers for v in layer.trainable_variables if len(v.shape) == 2]


PAPER_NETS = {
    1: {
        "encoder": [(784, 200), (200, 200), (200, 50), (200, 50)],
        "decoder": [(50, 200), (200, 200), (200, 784)],
    },
    2: {
        "encoder": [(784, 200), (200, 200), (200, 100), (200, 100), (100, 100), (100, 100), (100, 50), (100, 50)],
        "decoder": [(100, 200), (200, 200), (200, 784), (50, 100), (100, 100), (100, 100), (100, 100)],
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_named_runs_have_the_layers_of_the_paper(name):
    parameters = run_named(name)
    model = Autoencoder(np.full(784, 0.1), parameters.latent_units, parameters.hidden_units)
    expected = PAPER_NETS[len(parameters.latent_units)]
    assert kernels(model.encoder) == expected["encoder"]
    assert kernels(model.decoder) == expected["decoder"]
    assert {layer.activation.__name__ for block in model.encoder for layer in block.hidden} == {"tanh"}


def test_initial_weights_are_glorot_uniform_and_no_two_layers_alike():
    model = Autoencoder(np.full(784, 0.1), (50,), ((200, 200),), seed=3)
    mean, log_std = model.encoder[0].mean.kernel.numpy(), model.encoder[0].log_std.kernel.numpy()
    limit = np.sqrt(6 / 250)
    assert np.abs(mean).max() <= limit
    assert mean.std() == pytest.approx(limit / np.sqrt(3), rel=0.03)
    assert not np.allclose(mean, log_std)  # the authors' code gives both heads the same weights
    again = Autoencoder(np.full(784, 0.1), (50,), ((200, 200),), seed=3)
    other = Autoencoder(np.full(784, 0.1), (50,), ((200, 200),), seed=4)
    np.testing.assert_array_equal(again.encoder[0].mean.kernel, mean)
    assert not np.allclose(other.encoder[0].mean.kernel, mean)


def test_output_bias_is_the_logit_of_the_clipped_training_mean():
    model = Autoencoder(np.array([0.0, 0.25, 1.0]), (2,), ((4,),))
    np.testing.assert_allclose(tf.sigmoid(model.decoder[0].head.bias), [0.001, 0.25, 0.999], rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_log_weights_are_the_densities_that_scipy_gives(small_net, x_small, layers, likelihood):
    model, x, k = small_net(layers, likelihood), x_small[:5], 3
    if likelihood == "gaussian":
        model.decoder[0].log_std.assign(0.3)
    q = model.encode(x)
    z = model.sample_posterior(q, model.draw_noise(k, len(x), SEED))

    def log_normal(z_l, moments):
        mean, log_std = (moment.numpy().astype(float) for moment in moments)
        return scipy.stats.norm(mean, np.exp(log_std)).logpdf(z_l.numpy()).sum(-1)

    log_q = log_normal(z[0], model.encoder[0](x))
    log_p = scipy.stats.norm().logpdf(z[-1].numpy()).sum(-1)
    for layer in range(1, layers):
        log_q = log_q + log_normal(z[layer], model.encoder[layer](z[layer - 1]))
        log_p = log_p + log_normal(z[layer - 1], model.decoder[layer](z[layer]))
    mean = model.decode(z[0]).numpy().astype(float)
    data = (
        scipy.stats.bernoulli(mean).logpmf(x)
        if likelihood == "bernoulli"
        else scipy.stats.norm(mean, np.exp(0.3)).logpdf(x)
    )
    log_p = log_p + data.sum(-1)

    np.testing.assert_allclose(model.log_q_z_given_x(q, z), log_q, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.log_joint(x, z), log_p, rtol=1e-4, atol=1e-4)
    log_w = model.log_weights(x, k, SEED)
    assert log_w.shape == (k, len(x))
    np.testing.assert_allclose(log_w, log_p - log_q, rtol=1e-3, atol=1e-3)


def test_log_likelihood_is_finite_at_extreme_logits(small_net, x_small):
    model = small_net()
    model.decoder[0].head.bias.assign(tf.fill([12], 1e4))
    expected = -1e4 * (1 - x_small).sum(-1)
    log_p = model.decoder[0].log_prob(x_small, tf.zeros([1, len(x_small), 4]))[0]
    np.testing.assert_allclose(log_p, expected, rtol=1e-5)


def test_the_decoder_mirrors_the_encoder():
    model = Autoencoder(np.zeros(9), (3, 2), ((7, 6), (5, 4)))
    shapes = [[variable.shape for variable in part if len(variable.shape) == 2] for part in (model.phi, model.theta)]
    assert shapes[0] == [(9, 7), (7, 6), (6, 3), (6, 3), (3, 5), (5, 4), (4, 2), (4, 2)]
    assert shapes[1] == [(3, 6), (6, 7), (7, 9), (2, 4), (4, 5), (5, 3), (5, 3)]


@pytest.mark.parametrize("layers", [1, 2])
def test_samples_of_one_input_do_not_mix_with_another(small_net, x_small, layers):
    """Pitfall: k flattened into the batch. Images evaluated together weigh what they weigh alone."""
    model = small_net(layers)
    noise = model.draw_noise(4, 6, SEED)

    def log_w(x, noise):
        q = model.encode(x)
        z = model.sample_posterior(q, noise)
        return model.log_joint(x, z) - model.log_q_z_given_x(q, z)

    together = log_w(x_small[:6], noise)
    for i in range(6):
        alone = log_w(x_small[i : i + 1], [layer[:, i : i + 1] for layer in noise])
        np.testing.assert_allclose(together[:, i], alone[:, 0], rtol=1e-4, atol=1e-5)
    assert np.std(together, axis=0).min() > 0 and np.std(together, axis=1).min() > 0


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_layer_draws_its_own_noise_from_the_seed(small_net, layers):
    model = small_net(layers)
    noise = model.draw_noise(50, 200, SEED)
    assert [layer.shape[-1] for layer in noise] == [4, 3, 2][:layers]
    for a, b in zip(noise, model.draw_noise(50, 200, SEED), strict=True):
        np.testing.assert_array_equal(a, b)
    columns = np.concatenate([layer.numpy().reshape(10000, -1) for layer in noise], axis=1)
    # Of at most 36 correlations of 10,000 independent pairs, none is beyond 5 standard errors but in 1 of 40,000 seeds.
    assert np.abs(np.corrcoef(columns.T) - np.eye(columns.shape[1])).max() < 0.05


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_user_interface_shapes(small_net, x_small, layers, likelihood):
    model = small_net(layers, likelihood)
    assert model.encode(x_small).batch_shape == (60,)
    assert model.reconstruct(x_small).shape == (60, 12)
    np.testing.assert_array_equal(model.reconstruct(x_small), model.decode(model.encode(x_small).mean()))
    assert model.sample(7, SEED).shape == (7, 12)
    assert len(model.phi) + len(model.theta) == len(model.trainable_variables)
    np.testing.assert_array_equal(model.sample(7, SEED), model.sample(7, SEED))


def test_prior_samples_have_the_mean_that_the_model_implies(small_net):
    """Two layers: decoder means at ancestral samples agree with a plain loop, in mean within 5 standard errors."""
    model = small_net(2)
    ours = model.sample(20000, SEED).numpy()
    z_2 = np.random.default_rng(0).normal(size=(20000, 3)).astype(np.float32)
    mean, log_std = model.decoder[1](z_2)
    z_1 = mean + np.exp(log_std) * np.random.default_rng(1).normal(size=mean.shape)
    plain = model.decode(tf.cast(z_1, tf.float32)).numpy()
    error = np.sqrt((ours.var(0) + plain.var(0)) / 20000)
    assert np.all(np.abs(ours.mean(0) - plain.mean(0)) < 5 * error)


def test_illegal_nets_are_refused():
    with pytest.raises(ValueError, match="poisson.*bernoulli, gaussian"):
        Autoencoder(np.zeros(3), (2,), ((4,),), likelihood="poisson")
    with pytest.raises(ValueError):
        Autoencoder(np.zeros(3), (2, 2), ((4,),))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("layers", [1, 2])
def test_load_run_gives_the_model_back(small_net, x_small, tmp_path, layers, likelihood):
    model = small_net(layers, likelihood, seed=5)
    save_weights(model, tmp_path / "model.weights.h5")
    units = {"latent_units": [4, 3][:layers], "hidden_units": [[8, 8], [6]][:layers]}
    parameters = units | {"features": 12, "likelihood": likelihood}
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    np.testing.assert_array_equal(load_run(tmp_path).log_weights(x_small, 3, SEED), model.log_weights(x_small, 3, SEED))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_unit_that_does_nothing_can_be_taken_out(small_net, x_small, layers, likelihood):
    """Dead: q of it is the prior, whatever the input. Without it every log weight at the same samples is the same.

    In the top layer nothing reads it; in the others it is the constant 1.5, which what reads it depends on.
    """
    model, x = small_net(layers, likelihood), tf.constant(x_small[:5])
    kept = [np.arange(units) != 1 for units in model.latent_units]
    for part in (*model.encoder, *model.decoder[1:]):  # unit 1 of every layer: the same from both sides
        top = part is model.encoder[-1]
        for head, value in ((part.mean, 0.0 if top else 1.5), (part.log_std, 0.0 if top else -12.0)):
            column = tf.one_hot(1, head.units)
            head.kernel.assign(head.kernel * (1 - column))
            head.bias.assign(head.bias * (1 - column) + value * column)
    kernel = model.decoder[-1].hidden[0].kernel  # what reads the top layer
    kernel.assign(kernel * (1 - tf.one_hot(1, kernel.shape[0])[:, None]))
    smaller = keep_units(model, kept)
    noise = model.draw_noise(7, 5, (0, 1))

    def log_w(net, noise):
        q = net.encode(x)
        z = net.sample_posterior(q, noise)
        return net.log_joint(x, z) - net.log_q_z_given_x(q, z)

    less = [layer.numpy()[..., units] for layer, units in zip(noise, kept, strict=True)]
    np.testing.assert_allclose(log_w(smaller, less), log_w(model, noise), rtol=1e-4, atol=1e-5)
    assert smaller.latent_units == tuple(units - 1 for units in model.latent_units)
    other = keep_units(model, [np.arange(units) != 0 for units in model.latent_units])  # the control: a unit that acts
    less = [layer.numpy()[..., 1:] for layer in noise]
    assert np.abs(log_w(other, less) - log_w(model, noise)).max() > 0.01


def test_snapshots_are_in_the_order_of_their_epochs(tmp_path):
    (tmp_path / "snapshots").mkdir()
    for name in ("epoch10000", "epoch9999", "epoch0002", "epoch_old"):
        (tmp_path / "snapshots" / f"{name}.weights.h5").touch()
    assert list(snapshots(tmp_path)) == [2, 9999, 10000]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_is_standard_normal_and_the_same_whether_compiled_or_not(dtype):
    """A Kolmogorov-Smirnov test that errs once in 1e6 seeds; 200,000 numbers 3 % too large are found out."""
    seed = tf.constant(SEED)
    noise = random_normal([200, 1000], seed, dtype).numpy()
    compiled = tf.function(lambda seed: random_normal([200, 1000], seed, dtype), jit_compile=True)
    np.testing.assert_allclose(noise, compiled(seed), rtol=1e-6)
    assert noise.dtype == dtype and len(np.unique(noise)) > 190_000
    found = [scipy.stats.kstest(scale * noise.ravel(), "norm").pvalue for scale in (1, 1.03)]
    assert found[0] > 1e-6 > found[1]


def test_noise_is_finite_at_the_lowest_uniform(monkeypatch):
    monkeypatch.setattr(models, "compiled_uniform", lambda shape, seed, minval, dtype: tf.fill(shape, minval))
    assert -5.5 < models.compiled_normal.python_function([2, 3], SEED, tf.float32)[0, 0] < -5
