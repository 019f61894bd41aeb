"""The same training step and likelihood in plain JAX: jitted `lax.scan`, differentiated automatically, optax Adam."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def dense(key, n_in, n_out):
    limit = np.sqrt(6 / (n_in + n_out))
    return {"w": jax.random.uniform(key, (n_in, n_out), minval=-limit, maxval=limit), "b": jnp.zeros(n_out)}


def make_layer(keys, n_in, hidden_units, **heads):
    """tanh layers, and a dense layer for each head, from its number of units."""
    sizes = [n_in, *hidden_units]
    hidden = [dense(next(keys), *pair) for pair in zip(sizes[:-1], sizes[1:], strict=True)]
    return {"hidden": hidden} | {name: dense(next(keys), sizes[-1], units) for name, units in heads.items()}


def make_parameters(features, latent_units, hidden_units):
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 100))
    encoder, decoder, below = [], [], features
    for hidden, units in zip(hidden_units, latent_units, strict=True):
        encoder.append(make_layer(keys, below, hidden, mean=units, log_std=units))
        heads = {"mean": below, "log_std": below} if decoder else {"logits": below}
        decoder.append(make_layer(keys, units, hidden[::-1], **heads))
        below = units
    return {"encoder": encoder, "decoder": decoder}


def apply(layer, inputs):
    for hidden in layer["hidden"]:
        inputs = jnp.tanh(inputs @ hidden["w"] + hidden["b"])
    return [inputs @ head["w"] + head["b"] for name, head in sorted(layer.items()) if name != "hidden"]


def log_normal(z, log_std, mean):
    return jnp.sum(-0.5 * jnp.log(2 * jnp.pi) - log_std - 0.5 * ((z - mean) * jnp.exp(-log_std)) ** 2, axis=-1)


def log_weights(parameters, x, key, k, q=None):
    """Log importance weights [k, batch]. q: what the first layer of the encoder gives for x, where it is at hand."""
    z, log_w = x, 0.0
    samples = []
    for layer in parameters["encoder"]:
        log_std, mean = q if q and not samples else apply(layer, z)
        key, own = jax.random.split(key)
        shape = mean.shape if samples else (k, *mean.shape)
        z = mean + jnp.exp(log_std) * jax.random.normal(own, shape)
        log_w -= log_normal(z, log_std, mean)
        samples.append(z)
    log_w += log_normal(z, 0.0, 0.0)
    for layer, below, above in zip(parameters["decoder"][1:], samples[:-1], samples[1:], strict=True):
        log_w += log_normal(below, *apply(layer, above))
    (logits,) = apply(parameters["decoder"][0], samples[0])
    return log_w + jnp.sum(x * logits - jax.nn.softplus(logits), axis=-1)


def loss(parameters, x, key, k):
    return -jnp.mean(jax.nn.logsumexp(log_weights(parameters, x, key, k), axis=0) - jnp.log(k))


def make_run(images, latent_units, hidden_units, k, batch):
    """A function of a number of steps that takes so many, and returns when they are done."""
    images = jnp.asarray(images)
    parameters = make_parameters(images.shape[1], latent_units, hidden_units)
    optimizer = optax.adam(1e-3, eps=1e-4)

    @functools.partial(jax.jit, static_argnames="steps")
    def stretch(parameters, state, key, order, steps):
        def step(carry, rows):
            parameters, state, key = carry
            key, binarization_key, noise_key = jax.random.split(key, 3)
            grey = images[rows].astype(jnp.float32) / 255
            x = (jax.random.uniform(binarization_key, grey.shape) < grey).astype(jnp.float32)
            value, gradients = jax.value_and_grad(loss)(parameters, x, noise_key, k)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(parameters, updates), state, key), value

        (parameters, state, _), values = jax.lax.scan(step, (parameters, state, key), order[:steps])
        return parameters, state, values.sum()

    order = np.random.default_rng(0).permutation(len(images))
    order = jnp.asarray(order[: len(images) // batch * batch].reshape(-1, batch))
    state, key = optimizer.init(parameters), jax.random.PRNGKey(1)
    return lambda steps: jax.block_until_ready(stretch(parameters, state, key, order, steps))


def make_likelihood(x, latent_units, hidden_units, k, images_at_once=100, samples_at_once=50):
    """A function (of a number of times, always 1) that gives L_k of every image, chunk by chunk."""
    parameters = make_parameters(x.shape[1], latent_units, hidden_units)

    @jax.jit
    def block(images, key):
        q = apply(parameters["encoder"][0], images)

        def chunk(log_sum, key):
            log_w = log_weights(parameters, images, key, samples_at_once, q)
            return jnp.logaddexp(log_sum, jax.nn.logsumexp(log_w, axis=0)), None

        keys = jax.random.split(key, k // samples_at_once)
        return jax.lax.scan(chunk, jnp.full(len(images), -jnp.inf), keys)[0] - jnp.log(k)

    blocks = x.reshape(-1, images_at_once, x.shape[1])
    return lambda _: [np.asarray(block(images, jax.random.PRNGKey(i))) for i, images in enumerate(blocks)]
