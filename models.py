"""The networks: an encoder q(z | x) and a decoder p(x, z) with any number of stochastic layers, shared by VAE and IWAE.

z = [z_1 .. z_L] with ``z[0]`` nearest the data; each is ``[k, batch, units]``, k samples for every input of a batch.
Densities are in nats, one value per sample and input: ``[k, batch]``.
"""

import json
from functools import partial
from pathlib import Path

import h5py
import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from run_folder import digest, whole_file

tfd = tfp.distributions

LIKELIHOODS = ("bernoulli", "gaussian")

# Counter-based generators (Salmon et al. 2011): Philox splits seeds, Threefry draws, since XLA vectorises it: less than
# a fifth of the time. TensorFlow has it in XLA alone, so that what draws is compiled, and Philox's where nothing is.
split_seed = partial(tf.random.split, alg="philox")
fold_seed = partial(tf.random.fold_in, alg="philox")


@tf.function(jit_compile=True)
def compiled_uniform(shape, seed, minval, dtype):
    """Uniforms in [minval, 1)."""
    alg = "philox" if tf.config.functions_run_eagerly() else "threefry"
    return tf.random.stateless_uniform(shape, seed, minval, 1, dtype, alg=alg)


@tf.function(jit_compile=True)
def compiled_normal(shape, seed, dtype):
    """Standard normals."""
    lowest = np.nextafter(-1, 0, dtype=dtype.as_numpy_dtype)  # at -1 the inverse is infinite
    return 2**0.5 * tf.math.erfinv(compiled_uniform(shape, seed, lowest, dtype))


def random_uniform(shape, seed, dtype=tf.float32):
    """Uniforms in [0, 1) of a shape, whose sizes may be tensors. seed: [2] 32-bit integers, stateless."""
    return drawn(compiled_uniform, shape, seed, 0.0, tf.as_dtype(dtype))


def random_normal(shape, seed, dtype=tf.float32):
    """Standard normals of a shape, by the inverse of their distribution function. seed: as of `random_uniform`."""
    return drawn(compiled_normal, shape, seed, tf.as_dtype(dtype))


def drawn(function, shape, seed, *arguments):
    """What a compiled function draws: one program for all shapes, each of which is known outside as well."""
    shape = tf.stack(shape)
    return tf.ensure_shape(function(shape, seed, *arguments), tf.get_static_value(shape, partial=True))


def dense(units, initializer_seed, activation=None, bias="zeros"):
    """Dense layer with the initial weights of Glorot and Bengio (2010), as Burda et al. 2016 use them."""
    kernel = keras.initializers.GlorotUniform(seed=initializer_seed)
    return keras.layers.Dense(units, activation, kernel_initializer=kernel, bias_initializer=bias)


class GaussianLayer(keras.layers.Layer):
    """Stochastic layer: tanh layers, then the mean and log standard deviation of a diagonal Gaussian."""

    def __init__(self, hidden_units, units, initializer_seed):
        super().__init__()
        self.hidden = [dense(n, initializer_seed, "tanh") for n in hidden_units]
        self.mean = dense(units, initializer_seed)
        self.log_std = dense(units, initializer_seed)

    def call(self, inputs):
        """inputs [..., n] -> mean and log_std, each [..., units]."""
        for layer in self.hidden:
            inputs = layer(inputs)
        return self.mean(inputs), self.log_std(inputs)

    def distribution(self, inputs):
        """inputs [..., n] -> Gaussian with events [units] and batch shape [...]."""
        mean, log_std = self(inputs)
        return tfd.Independent(tfd.Normal(mean, tf.exp(log_std)), 1)


class DataLayer(keras.layers.Layer):
    """p(x | z_1): tanh layers, then Bernoulli logits, or Gaussian means with one learned standard deviation for all."""

    def __init__(self, hidden_units, likelihood, x_train_mean, initializer_seed):
        super().__init__()
        self.likelihood = likelihood
        self.hidden = [dense(n, initializer_seed, "tanh") for n in hidden_units]
        if likelihood == "bernoulli":
            mean = np.clip(x_train_mean, 0.001, 0.999)
            self.head = dense(len(mean), initializer_seed, bias=np.log(mean) - np.log1p(-mean))
        else:
            self.head = dense(len(x_train_mean), initializer_seed, bias=x_train_mean)
            self.log_std = self.add_weight(shape=(), initializer="zeros", name="log_std")

    def call(self, z):
        """z [..., units] -> Bernoulli logits or Gaussian means [..., features]."""
        for layer in self.hidden:
            z = layer(z)
        return self.head(z)

    def log_prob(self, x, z):
        """x [batch, features], z [k, batch, units] -> log p(x | z) [k, batch]."""
        output = self(z)
        if self.likelihood == "bernoulli":
            # Good for logits of any size. By log1p, as in tf.nn.sigmoid_cross_entropy_with_logits, a step would take
            # 1.1 times as long, for a pixel's last bit.
            softplus = tf.maximum(output, 0.0) + tf.math.log(1.0 + tf.exp(tf.minimum(-output, output)))
            ones = tf.ones(output.shape[-1:], output.dtype)
            return tf.linalg.matvec(x * output - softplus, ones)  # their sum, which XLA takes longer for by reduce_sum
        return tf.reduce_sum(tfd.Normal(output, tf.exp(self.log_std)).log_prob(x), axis=-1)

    def expectation(self, z):
        """z [..., units] -> E[x | z] [..., features]."""
        return tf.sigmoid(self(z)) if self.likelihood == "bernoulli" else self(z)


class Autoencoder(keras.Model):
    """Encoder and decoder of Burda et al. 2016: a VAE or an IWAE, whichever objective trains it.

    latent_units: units of z_1 .. z_L. hidden_units: for each, the tanh layers between it and what lies below it, in the
    encoder's order; the decoder has them mirrored. x_train_mean [features]: sets the initial output bias.
    Raises ValueError for another likelihood than those of LIKELIHOODS or tuples of unequal length.
    """

    def __init__(self, x_train_mean, latent_units, hidden_units, likelihood="bernoulli", seed=0):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood {likelihood!r}: one of {', '.join(LIKELIHOODS)}")
        initializer_seed = keras.random.SeedGenerator(seed)  # advances: no two layers start alike
        layers = list(zip(hidden_units, latent_units, strict=True))
        self.latent_units = tuple(latent_units)
        self.encoder = [GaussianLayer(hidden, units, initializer_seed) for hidden, units in layers]
        self.decoder = [DataLayer(hidden_units[0][::-1], likelihood, np.asarray(x_train_mean), initializer_seed)]
        for hidden, below in zip(hidden_units[1:], latent_units[:-1], strict=True):
            self.decoder.append(GaussianLayer(hidden[::-1], below, initializer_seed))
        self.build((None, len(x_train_mean)))

    def build(self, input_shape):
        """Make every weight, by one pass through all layers."""
        self.log_weights(tf.zeros([1, input_shape[-1]], self.compute_dtype), k=1, seed=(0, 0))

    @property
    def theta(self):
        """Trainable variables of the decoder."""
        return [variable for layer in self.decoder for variable in layer.trainable_variables]

    @property
    def phi(self):
        """Trainable variables of the encoder."""
        return [variable for layer in self.encoder for variable in layer.trainable_variables]

    def encode(self, x):
        """x [batch, features] -> the distribution q(z_1 | x), batch shape [batch]; whatever k is, x is read once."""
        return self.encoder[0].distribution(x)

    def draw_noise(self, k, batch, seed):
        """Standard normal noise, a [k, batch, units] for each layer. seed: [2] integers, stateless."""
        seeds = tf.unstack(split_seed(seed, len(self.latent_units)))
        return [
            random_normal([k, batch, units], layer_seed, dtype=self.compute_dtype)
            for units, layer_seed in zip(self.latent_units, seeds, strict=True)
        ]

    def sample_posterior(self, q, noise):
        """q = encode(x), noise of draw_noise -> z, reparameterised samples of q(z | x)."""
        z = []
        for layer, layer_noise in zip(self.encoder, noise, strict=True):
            q = layer.distribution(z[-1]) if z else q
            z.append(q.mean() + q.stddev() * layer_noise)
        return z

    def conditionals(self, q, z):
        """q = encode(x), z -> the distributions [q(z_1 | x), q(z_2 | z_1), ..]."""
        return [q] + [layer.distribution(below) for layer, below in zip(self.encoder[1:], z[:-1], strict=True)]

    def log_q_z_given_x(self, q, z):
        """q = encode(x), z -> log q(z | x) [k, batch]."""
        return tf.add_n([layer.log_prob(z_l) for layer, z_l in zip(self.conditionals(q, z), z, strict=True)])

    def prior(self):
        """p(z_L), standard normal."""
        return tfd.Independent(tfd.Normal(tf.zeros(self.latent_units[-1], self.compute_dtype), 1), 1)

    def log_joint(self, x, z):
        """x [batch, features], z -> log p(x, z) [k, batch]."""
        terms = [self.decoder[0].log_prob(x, z[0]), self.prior().log_prob(z[-1])]
        for layer, below, above in zip(self.decoder[1:], z[:-1], z[1:], strict=True):
            terms.append(layer.distribution(above).log_prob(below))
        return tf.add_n(terms)

    def weighted_samples(self, x, q, k, seed):
        """k samples z of q = encode(x), and log_w = log p(x, z) - log q(z | x) [k, batch] (Burda et al. 2016).

        x: [batch, features]; seed: [2] integers, stateless.
        """
        z = self.sample_posterior(q, self.draw_noise(k, tf.shape(x)[0], seed))
        return z, self.log_joint(x, z) - self.log_q_z_given_x(q, z)

    def log_weights(self, x, k, seed):
        """The log importance weights [k, batch] of `weighted_samples`."""
        return self.weighted_samples(x, self.encode(x), k, seed)[1]

    def decode(self, z_1):
        """z_1 [..., units] -> E[x | z_1] [..., features]: pixel probabilities, or Gaussian means."""
        return self.decoder[0].expectation(z_1)

    def reconstruct(self, x):
        """x [batch, features] -> E[x | z_1 = the mean of q(z_1 | x)] [batch, features]."""
        return self.decode(self.encode(x).mean())

    def sample_prior(self, n, seed):
        """[z_1 .. z_L], each [n, units], n ancestral samples of the prior. seed: [2] integers, stateless."""
        *seeds, top_seed = tf.unstack(split_seed(seed, len(self.latent_units)))
        z = [self.prior().sample(n, seed=top_seed)]
        for layer, layer_seed in zip(self.decoder[:0:-1], seeds, strict=True):
            z.insert(0, layer.distribution(z[0]).sample(seed=layer_seed))
        return z

    def sample(self, n, seed):
        """E[x | z_1] [n, features] at n ancestral samples of the prior. seed: [2] integers, stateless."""
        return self.decode(self.sample_prior(n, seed)[0])


def snapshots(folder):
    """The weights that a run kept while it was trained (`snapshot_epochs`): {epoch: path}."""
    paths = (Path(folder) / "snapshots").glob("epoch*.weights.h5")
    epochs = {path.name.removeprefix("epoch").removesuffix(".weights.h5"): path for path in paths}
    return dict(sorted((int(epoch), path) for epoch, path in epochs.items() if epoch.isdecimal()))


def keep_units(model, kept):
    """A copy of a model with only some of its latent units: the others' part of encoder, decoder and prior is gone.

    What reads them has their mean under the prior in its bias instead: that of a dead unit is 0 in the top layer alone.
    kept: for each layer an array of booleans [units].
    """
    above = zip(model.decoder[1:], model.sample_prior(1000, (0, 0))[1:], strict=True)
    means = [layer.distribution(z).mean().numpy().mean(axis=0) for layer, z in above]
    means.append(np.zeros(model.latent_units[-1]))
    for mean, layer in zip(means, kept, strict=True):
        mean[layer] = 0  # these stay
    hidden_units = [[layer.units for layer in part.hidden] for part in model.encoder]
    units = [int(layer.sum()) for layer in kept]
    data = model.decoder[0]
    smaller = Autoencoder(np.zeros(data.head.units), units, hidden_units, data.likelihood)
    below, means_below = [slice(None), *kept[:-1]], [np.zeros(data.head.units), *means[:-1]]
    encoder = zip(smaller.encoder, model.encoder, below, kept, means_below, strict=True)
    decoder = zip(smaller.decoder, model.decoder, kept, below, means, strict=True)
    for ours, theirs, inputs, outputs, gone in (*encoder, *decoder):
        hidden = {id(variable) for layer in theirs.hidden for variable in layer.weights}
        for new, old in zip(ours.weights, theirs.weights, strict=True):
            value = old.numpy()
            if old is theirs.hidden[0].kernel:
                value = value[inputs]
            elif old is theirs.hidden[0].bias:
                value = value + gone @ theirs.hidden[0].kernel.numpy()
            elif id(old) not in hidden and value.ndim:  # of a head: kernel or bias
                value = value[..., outputs]
            new.assign(value)
    return smaller


def save_weights(model, path):
    """Write a model's weights, with a digest of them, whole or not at all."""
    with whole_file(path) as unfinished:
        model.save_weights(unfinished)
        with h5py.File(unfinished, "a") as file:
            file.attrs["digest"] = digest(*model.get_weights())


def load_weights(model, path):
    """Give a model the weights of a file. Raises ValueError where they are not those of its digest, if it has one."""
    model.load_weights(path)
    with h5py.File(path) as file:
        if file.attrs.get("digest", found := digest(*model.get_weights())) != found:
            raise ValueError("these are not the weights that were written")


def load_run(folder, epoch=None):
    """The trained model that `experiments.py` left in a run's folder; as it was after an epoch, if it was kept then.

    Reads parameters.json and model.weights.h5 or a snapshot. Raises FileNotFoundError where one of them is missing.
    """
    parameters = json.loads((Path(folder) / "parameters.json").read_text())
    kept = {None: Path(folder) / "model.weights.h5"} | snapshots(folder)
    if epoch not in kept:
        epochs = ", ".join(map(str, snapshots(folder))) or "none"
        raise FileNotFoundError(f"{folder}: epoch {epoch} was not kept. Kept: {epochs}; see snapshot_epochs")
    net = [parameters[name] for name in ("latent_units", "hidden_units", "likelihood")]
    model = Autoencoder(np.zeros(parameters["features"]), *net)
    load_weights(model, kept[epoch])
    return model
