"""The posterior of a single input: on a grid where the net has two latent units, by importance samples for any net."""

import functools

import numpy as np
import tensorflow as tf
from scipy.special import logsumexp
from scipy.stats import norm

from evaluation import ACTIVE_THRESHOLD, SAMPLES_AT_ONCE, bounds, map_images, principal_components, shown_images
from losses import effective_sample_size, gather_samples, group_weights, miwae, normalized_weights, resample
from models import load_weights, split_seed
from run_folder import reading_file

KS = (1, 10, 100)  # samples of the importance-weighted posteriors; at 1 it is q itself
POOL = 20_000  # importance samples of each input
AVERAGED = 2000  # at most so many draws of the other k - 1 samples make the mean that q_ew is
WIDE = 8.0  # half the side of the square that holds the whole posterior, in standard deviations of the prior
WIDE_SIDE = 267  # cells along its side
SIDE = 121  # cells along a side of the square that is shown
MASS = 0.999  # of the posterior, by highest density, that the square shown holds
CANDIDATES = 200  # images among which those of unusual and of usual KL(q || p) are looked for
CHOSEN = (1.0, 0.8, 0.5)  # shares of them whose KL is not above that of the image chosen: the unusual, the typical
LEVELS = (0.5, 0.95)  # shares of a density that its contours hold
BOUND_KS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
BOUND_IMAGES = 100  # on which L_k is followed up to the last of these
SAME = 5  # images whose posteriors every net shows on a grid
AGGREGATED = 3000  # images whose samples of q are kept of each snapshot
SINGLE = 3  # images whose posterior is shown for nets of any size


def importance_samples(model, x, count, seed):
    """Samples z_1 [count, batch, units] of q(z | x) and their log_w [count, batch], in nats; to be compiled.

    x: [batch, features]; count: a multiple of SAMPLES_AT_ONCE; seed: [2] integers.
    """
    q, batch = model.encode(x), tf.shape(x)[0]

    def chunk(seed):
        z, log_w = model.weighted_samples(x, q, SAMPLES_AT_ONCE, seed)
        return z[0], log_w

    seeds = split_seed(seed, count // SAMPLES_AT_ONCE)
    z, log_w = tf.map_fn(chunk, seeds, fn_output_signature=(tf.float32, tf.float32))
    return tf.reshape(z, [count, batch, model.latent_units[0]]), tf.reshape(log_w, [count, batch])


def pool_of(model, x, count, seed=0):
    """`importance_samples` of images [n, features] as arrays: z_1 [count, n, units], log_w [count, n]."""

    @tf.function(jit_compile=True)
    def block(image, seed):
        return [tf.einsum("ki...->ik...", part) for part in importance_samples(model, image, count, seed)]

    return [np.moveaxis(part, 0, 1) for part in map_images(block, x, seed, size=1)]


def resampled(z, log_w, k, seed=0):
    """Sampling-importance-resampling: one of each k samples, drawn by its weight; each is a sample of q_ew.

    z: [count, n, units], log_w: [count, n] -> [count // k, n, units].
    """
    groups, n = len(log_w) // k, log_w.shape[1]
    weights = normalized_weights(log_w[: groups * k].reshape(k, groups * n))
    chosen = resample(weights, 1, np.float32(np.random.default_rng(seed).random(groups * n)))
    return gather_samples(z[: groups * k].reshape(k, groups * n, -1), chosen).numpy().reshape(groups, n, -1)


def square(centre, half, side):
    """Centres of the cells of a square for each input: centre [n, 2], half its side [n] -> [side (up), side, n, 2]."""
    steps = (2 * np.arange(side) + 1) / side - 1
    offsets = np.stack(np.meshgrid(steps, steps), axis=-1)[:, :, None]
    return np.float32(centre + half[:, None] * offsets)


@functools.lru_cache(maxsize=8)
def densities_block(model):
    """A compiled function (x [1, features], grid [rows, columns, 1, 2]) -> log p(x, z) and log q(z | x)."""

    @tf.function(jit_compile=True, reduce_retracing=True)
    def block(x, grid):
        q = model.encode(x)

        def row(z):
            return model.log_joint(x, [z]), model.log_q_z_given_x(q, [z])

        return tf.map_fn(row, grid, fn_output_signature=(tf.float32, tf.float32))

    return block


def log_densities(model, x, grid):
    """log p(x, z) and log q(z | x) at grid [rows, columns, n, 2]: two arrays [rows, columns, n], float64."""
    images = [densities_block(model)(tf.constant(x[[i]]), tf.constant(grid[:, :, [i]])) for i in range(len(x))]
    return np.concatenate(np.float64(images), axis=-1)


@tf.function(jit_compile=True, reduce_retracing=True)
def log_sum_over_draws(log_joint, log_q, others):
    """The sum over draws of which `log_q_ew` is the mean; others [draws, n]: log sums of k - 1 weights."""

    def row(densities):
        log_w = densities[0] - densities[1]
        log_sum = log_w + tf.nn.softplus(others[:, None] - log_w)  # of the weights of z and of the k - 1 others
        return densities[0] + tf.reduce_logsumexp(-log_sum, axis=0)

    return tf.map_fn(row, (log_joint, log_q), fn_output_signature=tf.float32)


def log_q_ew(log_joint, log_q, log_w, k):
    """log q_ew(z | x) on a grid (Cremer et al. 2017): the density of one of k samples of q that is drawn by weight.

    q_ew(z) = E of p(x, z) / mean of the weights of z and of k - 1 samples of q. The expectation is an average over at
    most AVERAGED draws of those samples, from the pool log_w [count, n]. log_joint, log_q: [rows, columns, n].
    """
    draws = min(AVERAGED, len(log_w) // (k - 1)) if k > 1 else 1
    others = logsumexp(log_w[: draws * (k - 1)].reshape(draws, k - 1, -1), axis=1) if k > 1 else [[-np.inf]]
    arguments = [tf.constant(np.float32(part)) for part in (log_joint, log_q, others)]
    return np.float64(log_sum_over_draws(*arguments)) + np.log(k / draws)


def boxes_of_most(log_p, cells):
    """Corners [2, n, 2] of the boxes about the cells of highest density that have MASS of each, and a cell around them.

    log_p: [side, side, n]; cells: [side, side, n, 2].
    """
    flat = (log_p - logsumexp(log_p, axis=(0, 1))).reshape(-1, log_p.shape[-1])
    held = (flat >= contour_levels(flat, np.exp(flat), (MASS,)).T).reshape(*log_p.shape, 1)
    corners = [np.min(cells, (0, 1), where=held, initial=np.inf), np.max(cells, (0, 1), where=held, initial=-np.inf)]
    edge = cells[0, 1, :, :1] - cells[0, 0, :, :1]
    return np.stack(corners) + np.array([-1, 1])[:, None, None] * edge


def half_of(corners):
    """Half the longer side [n] of boxes [2, n, 2]."""
    return np.ptp(corners, axis=0).max(axis=-1) / 2


def shown_squares(model, x):
    """Centre [n, 2] and half the side [n] of the square shown of each posterior, and log p(x, outside of it) [n].

    It holds MASS of the posterior, and q within three standard deviations as far as that leaves the posterior a third
    of the square's side. Found on a wide grid, and again on one of the size that this one tells.
    """
    everywhere = square(np.zeros([len(x), 2]), np.full(len(x), WIDE), WIDE_SIDE)
    log_joint, _ = log_densities(model, x, everywhere)
    corners = boxes_of_most(log_joint, everywhere)
    nearer = square(corners.mean(axis=0), half_of(corners), SIDE)
    corners = boxes_of_most(log_densities(model, x, nearer)[0], nearer)
    q = model.encode(tf.constant(x))
    reach = q.mean() + 3 * q.stddev() * np.float32([-1, 1])[:, None, None]
    both = np.stack([np.minimum(corners[0], reach[0]), np.maximum(corners[1], reach[1])])
    half, wanted = half_of(corners), half_of(both)
    share = 2 * half / np.maximum(wanted - half, 2 * half)  # of the way from the posterior's box to both's
    corners += share[:, None] * (both - corners)
    centre, half = corners.mean(axis=0), half_of(corners)
    outside = np.any(np.abs(everywhere - centre) > half[:, None], axis=-1)
    log_outside = logsumexp(np.where(outside, log_joint, -np.inf), axis=(0, 1))
    return centre, half, log_outside + 2 * np.log(2 * WIDE / WIDE_SIDE)


def contour_levels(log_density, weights, levels=LEVELS):
    """Log densities [n, levels] above which such shares of a distribution lie.

    log_density, weights: [samples, n], of weighted samples or of all cells of a grid.
    """
    order = np.argsort(-log_density, axis=0)
    falling, held = (np.take_along_axis(values, order, axis=0) for values in (log_density, weights))
    last = [np.sum(np.cumsum(held, axis=0)[:-1] < level, axis=0) for level in levels]
    return np.take_along_axis(falling, np.stack(last), axis=0).T


def grid_samples(log_p, grid, cell, count, seed=0):
    """Samples [n, count, 2] of densities on a grid: a cell by its mass, and a place in it.

    log_p: [rows, columns, n]; grid: [rows, columns, n, 2]; cell: area [n].
    """
    rng, n = np.random.default_rng(seed), log_p.shape[-1]
    mass = np.exp(log_p - logsumexp(log_p, axis=(0, 1))).reshape(-1, n)
    chosen = [rng.choice(len(mass), count, p=mass[:, i]) for i in range(n)]
    places = np.stack([grid.reshape(-1, n, 2)[chosen[i], i] for i in range(n)])
    return places + np.sqrt(cell)[:, None, None] * rng.uniform(-0.5, 0.5, places.shape)


def grid_arrays(model, x, ks=KS, seed=0):
    """The posterior of each input x [n, features], q and q_ew at `ks`, on a grid: a net of two latent units.

    Densities are in the order p, q_ew at each of ks: log densities [n, 1 + ks, side, side], and samples [n, 1 + ks,
    samples, 2]. What is true of the whole of each, wherever it lies: KL(. || p) in nats [n, 1 + ks], the share that the
    grid holds [n, 1 + ks], and the log densities of the contours [n, 1 + ks, LEVELS]; of q and q_ew from POOL samples.
    Of q also the geometric mean of its two standard deviations [n].
    """
    centre, half, log_outside = shown_squares(model, x)
    grid, log_cell = square(centre, half, SIDE), 2 * np.log(2 * half / SIDE)
    log_joint, log_q = log_densities(model, x, grid)
    log_evidence = np.logaddexp(logsumexp(log_joint, axis=(0, 1)) + log_cell, log_outside)
    log_p = log_joint - log_evidence
    z, log_w = pool_of(model, x, POOL, seed)
    q = model.encode(tf.constant(x))
    log_q_at_z = norm.logpdf(z, q.mean(), q.stddev()).sum(axis=-1)
    log_joint_at_z, inside = log_w + log_q_at_z, np.all(np.abs(z - centre) < half[:, None], axis=-1)
    mass = np.exp(log_p + log_cell).reshape(-1, len(x))
    whole = [(np.zeros(len(x)), mass.sum(axis=0), contour_levels(log_p.reshape(mass.shape), mass))]
    densities, count = [log_p], POOL // max(*ks, 100)
    samples = [grid_samples(log_p, grid, np.exp(log_cell), count, seed)]
    for k in ks:
        densities.append(log_q_ew(log_joint, log_q, log_w, k))
        rows = (parts.reshape(len(z) // 100, 100, -1) for parts in (log_joint_at_z, log_q_at_z))
        log_q_ew_at_z = log_q_ew(*rows, log_w, k).reshape(log_w.shape)
        weights = np.float64(group_weights(log_w, len(log_w) // k))  # by which `resampled` draws; k divides POOL
        kl = log_evidence - np.sum(weights * (log_joint_at_z - log_q_ew_at_z), axis=0)
        whole.append((kl, np.sum(weights * inside, axis=0), contour_levels(log_q_ew_at_z, weights)))
        samples.append(resampled(z, log_w, k, seed)[:count].swapaxes(0, 1))
    kls, held, levels = zip(*whole, strict=True)
    return {
        "grid_k": ks,
        "grid_centre": centre,
        "grid_half": half,
        "grid_view": np.stack([centre - half[:, None], centre + half[:, None]], axis=1),
        "grid_log_density": np.float32(densities).transpose(3, 0, 1, 2),
        "grid_kl": np.stack(kls, axis=1),
        "grid_held": np.stack(held, axis=1),
        "grid_level": np.stack(levels, axis=1),
        "grid_samples": np.stack(samples, axis=1),
        "grid_log_p_x": log_evidence,
        "grid_q_std": np.exp(np.log(q.stddev()).mean(axis=-1)),
    }


def chosen_images(model, x, labels, seed=0):
    """Indices of the images whose posteriors are shown on a grid, and the ranks of the last of them.

    First the same SAME for every net, then those at CHOSEN shares of the first CANDIDATES, ranked from 0 on by
    L_5000 - ELBO, which is on average not above KL(q || p).
    """
    order = np.argsort(np.subtract(*bounds(model, x[:CANDIDATES], 5000, seed)))
    ranks = np.array([int(share * (len(order) - 1)) for share in CHOSEN])
    return np.array([*shown_images(x, labels)[-SAME:], *order[ranks]]), ranks


def bound_curve(model, x, seed=0):
    """L_k of each image [n] at each of BOUND_KS, from all of max(BOUND_KS) samples that k divides: [ks, n], nats."""

    @tf.function(jit_compile=True)
    def block(images, seed):
        log_w, most = importance_samples(model, images, max(BOUND_KS), seed)[1], max(BOUND_KS)
        return tf.stack([miwae(log_w[: most // k * k], groups=most // k).bound for k in BOUND_KS], axis=1)

    return map_images(block, x, seed, size=20).T


def sample_arrays(model, x, labels=None, seed=0):
    """Arrays of a net of any size: L_k against k, and of the first SINGLE shown images the weights and the posterior.

    The posterior is that of z_1, by sampling-importance-resampling, beside as many samples of q; of more than two
    units the active ones: in the others both are the prior, whose spread is all that PCA would show.
    """
    shown = shown_images(x, labels)[:SINGLE]
    z, log_w = pool_of(model, x[shown], POOL, seed)
    chosen = resampled(z, log_w, max(KS), seed)
    both = np.stack([chosen, z[: len(chosen)]])  # [2, s, n, units]
    active = np.var(model.encode(x[:CANDIDATES]).mean(), axis=0) > ACTIVE_THRESHOLD
    both = both[..., active] if model.latent_units[0] > 2 and active.any() else both
    rotate = model.latent_units[0] != 2
    flat = [principal_components(both[:, :, i].reshape(-1, both.shape[-1]), rotate) for i in range(len(shown))]
    curve = np.float64(bound_curve(model, x[:BOUND_IMAGES], seed))
    return {
        "single_k": max(KS),
        "single_index": shown,
        "single_x": x[shown],
        "single_effective": effective_sample_size(log_w),
        "single_log_w": log_w.T,
        "single_samples": np.stack([points.reshape(2, -1, 2) for points, _ in flat]),
        "single_explained": np.stack([shares for _, shares in flat]),
        "single_projection": "PCA" if rotate else "latent",
        "bound_k": BOUND_KS,
        "bound_images": curve.shape[1],
        "bound_mean": curve.mean(axis=1),
        "bound_standard_error": curve.std(axis=1, ddof=1) / np.sqrt(curve.shape[1]),
    }


def snapshot_arrays(model, weights, x, labels=None, seed=0):
    """What a net showed while it was trained, on the first axis of each array; posteriors where it has two units.

    weights: {epoch: path}, of which the model is left with the last; x: [n, features] as fed to the encoder; labels:
    [n] integers or None.
    """
    arrays, same = [], shown_images(x, labels)[-SAME:]
    for epoch, path in weights.items():
        with reading_file(path, "delete it, and the same command draws the others"):
            load_weights(model, path)
        at = {"epoch": epoch, "prior_samples": model.sample(100, (seed, 0))}
        if model.latent_units == (2,):
            z = model.encode(x[:AGGREGATED]).sample(seed=(seed, 1))
            at |= {"posterior_samples": z} | grid_arrays(model, x[same], (1,), seed)
        arrays.append(at)
    stacked = {name: np.stack([at[name] for at in arrays]) for name in arrays[0]}
    if "grid_view" in stacked:  # one view of each image for all epochs: what moves and what shrinks is to be seen
        low, high = stacked["grid_view"][:, :, 0].min(axis=0), stacked["grid_view"][:, :, 1].max(axis=0)
        half = (high - low).max(axis=-1, keepdims=True) / 2
        view = np.stack([(low + high) / 2 - half, (low + high) / 2 + half], axis=1)
        stacked["grid_view"] = np.broadcast_to(view, stacked["grid_view"].shape)
    return {f"snapshot_{name}": array for name, array in stacked.items()}


def posterior_arrays(model, x, labels=None, seed=0):
    """The arrays of the figures that show posteriors of single inputs, for a net of any size; grids for two units.

    x: [n, features] as fed to the encoder; labels: [n] integers or None.
    """
    arrays = sample_arrays(model, x, labels, seed)
    if model.latent_units == (2,):
        indices, ranks = chosen_images(model, x, labels, seed)
        arrays |= grid_arrays(model, x[indices], KS, seed)
        arrays |= {"grid_x": x[indices], "grid_index": indices, "grid_rank": ranks}
        arrays["grid_candidates"] = min(CANDIDATES, len(x))
        quantiles = norm.ppf((np.arange(21) + 0.5) / 21)
        manifold = np.stack(np.meshgrid(quantiles, quantiles[::-1]), axis=-1).reshape(-1, 2)
        arrays |= {"manifold": model.decode(np.float32(manifold)), "manifold_z": quantiles}
    return {name: np.asarray(array) for name, array in arrays.items()}
