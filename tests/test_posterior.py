"""posterior.py: densities on a grid against importance samples, q_ew against its definition and against resampling."""

import itertools

import numpy as np
import pytest
from scipy.special import logsumexp

import posterior
from models import Autoencoder, save_weights
from plotting import PLOTS, applicable

N = 3  # images


@pytest.fixture(scope="module")
def net(x_small):
    """Two latent units, q of a place and size that are not the posterior's."""
    model = Autoencoder(x_small.mean(axis=0), (2,), ((8, 8),), seed=3)
    model.encoder[0].log_std.bias.assign([0.6, 0.3])
    for layer in model.decoder[0].hidden:
        layer.kernel.assign(3 * layer.kernel)
    model.decoder[0].head.kernel.assign(3 * model.decoder[0].head.kernel)
    return model


@pytest.fixture(scope="module")
def pool(net, x_small):
    return posterior.pool_of(net, x_small[:N], posterior.POOL, seed=1)


@pytest.fixture(scope="module")
def arrays(net, x_small):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(posterior, "SIDE", 61)
        monkeypatch.setattr(posterior, "WIDE_SIDE", 101)
        return posterior.grid_arrays(net, x_small[:N], (1, 10, 100), seed=1)


def cells(arrays):
    """Centres of the cells [side, side, n, 2], and the log mass [n, densities, side, side] of each."""
    log_density, half = np.float64(arrays["grid_log_density"]), arrays["grid_half"]
    side = log_density.shape[-1]
    cell = 2 * np.log(2 * half / side)
    return posterior.square(arrays["grid_centre"], half, side), log_density + cell[:, None, None, None]


def test_square_is_a_grid_of_cell_centres_up_and_to_the_right():
    grid = posterior.square(np.array([[1.0, 2.0]]), np.array([2.0]), 4)[:, :, 0]
    np.testing.assert_allclose(grid[0, :, 0], [-0.5, 0.5, 1.5, 2.5])
    np.testing.assert_allclose(grid[:, 0, 1], [0.5, 1.5, 2.5, 3.5])


def test_grid_posterior_integrates_to_one_and_has_the_moments_of_importance_sampling(arrays, pool):
    """Mass, log p(x), mean and second moments: within 5 standard errors of 20,000 self-normalised samples."""
    grid, log_mass = cells(arrays)
    z, log_w = np.float64(pool[0]), np.float64(pool[1])
    for i in range(N):
        p = np.exp(log_mass[i, 0])
        assert arrays["grid_held"][i, 0] == pytest.approx(p.sum(), abs=1e-5) and 0.98 < p.sum() < 1 + 1e-6
        weight = np.exp(log_w[:, i] - logsumexp(log_w[:, i]))
        error = np.std(np.exp(log_w[:, i] - log_w[:, i].max())) / np.exp(logsumexp(log_w[:, i] - log_w[:, i].max()))
        relative = error * np.sqrt(len(log_w))  # of the mean weight
        estimate = logsumexp(log_w[:, i]) - np.log(len(log_w))
        assert abs(estimate - arrays["grid_log_p_x"][i]) < 5 * relative
        for power in (1, 2):
            on_grid = np.einsum("rc,rcd->d", p / p.sum(), grid[:, :, i] ** power)
            sampled = weight @ z[:, i] ** power
            standard_error = np.sqrt(weight**2 @ (z[:, i] ** power - sampled) ** 2)
            assert np.all(np.abs(on_grid - sampled) < 5 * standard_error + 0.02)  # what the square leaves out


def test_q_ew_is_q_at_one_sample_integrates_to_one_and_comes_nearer_with_k(arrays, net, x_small, pool):
    """Its mass on the grid is the share of its samples there, within the error of the 2000 or 202 draws of its average.

    KL(q || p) = log p(x) - ELBO; where the grid holds all of a density its sum over the grid is the KL as well.
    """
    grid, log_mass = cells(arrays)
    log_q = posterior.log_densities(net, x_small[:N], grid)[1]
    np.testing.assert_allclose(arrays["grid_log_density"][:, 1], np.moveaxis(log_q, -1, 0), rtol=1e-4, atol=1e-4)
    held, kl = arrays["grid_held"], arrays["grid_kl"]
    np.testing.assert_allclose(np.exp(logsumexp(log_mass, axis=(2, 3))), held, atol=0.05)
    np.testing.assert_allclose(held[:, 2:], 1, atol=0.01)  # of k = 10 and 100: q_ew lies where the posterior does
    assert np.all(kl[:, 0] == 0) and np.all(np.diff(kl[:, 1:], axis=1) < 0) and np.all(kl[:, 1] > 0.1)
    assert np.all(kl[:, 3] < kl[:, 1] / 10)
    other = posterior.pool_of(net, x_small[:N], posterior.POOL, seed=2)[1]  # of the pool itself this is an identity
    error = other.std(axis=0) * np.sqrt(2 / len(other))
    assert np.all(np.abs(arrays["grid_log_p_x"] - other.mean(axis=0) - kl[:, 1]) < 5 * error)
    log_p = log_mass[:, :1] - logsumexp(log_mass[:, :1], axis=(2, 3), keepdims=True)
    log_q_ew = log_mass - logsumexp(log_mass, axis=(2, 3), keepdims=True)
    on_grid = np.sum(np.exp(log_q_ew) * (log_q_ew - log_p), axis=(2, 3))
    np.testing.assert_allclose(kl[:, 2:], on_grid[:, 2:], atol=0.13)  # of 16 seeds the standard deviation is 0.026


def test_measures_are_of_the_whole_density_wherever_the_square_lies(arrays, net, x_small, pool, monkeypatch):
    """In a smaller square only the share that it holds is another. The control: on that grid alone q has another KL."""
    centre, half, log_p_x = arrays["grid_centre"], 0.2 * arrays["grid_half"], arrays["grid_log_p_x"]
    log_joint, log_q = posterior.log_densities(net, x_small[:N], posterior.square(centre, half, 61))
    log_inside = logsumexp(log_joint, axis=(0, 1)) + 2 * np.log(2 * half / 61)
    log_outside = log_p_x + np.log1p(-np.exp(log_inside - log_p_x))
    monkeypatch.setattr(posterior, "SIDE", 61)
    monkeypatch.setattr(posterior, "shown_squares", lambda *_: (centre, half, log_outside))
    part = posterior.grid_arrays(net, x_small[:N], (1, 10, 100), seed=1)
    np.testing.assert_allclose(part["grid_kl"], arrays["grid_kl"], atol=1e-3)
    np.testing.assert_allclose(part["grid_level"][:, 1:], arrays["grid_level"][:, 1:], atol=1e-3)
    inside = np.all(np.abs(pool[0] - centre) < half[:, None], axis=-1)
    np.testing.assert_allclose(part["grid_held"][:, 1], inside.mean(axis=0))
    np.testing.assert_allclose(part["grid_held"][:, 0], np.exp(log_inside - log_p_x))
    log_q, log_p = (part - logsumexp(part, axis=(0, 1)) for part in (log_q, log_joint))
    on_grid = np.sum(np.exp(log_q) * (log_q - log_p), axis=(0, 1))
    assert part["grid_held"][:, 1].max() < 0.5 and np.all(np.abs(on_grid - arrays["grid_kl"][:, 1]) > 0.1)


def test_contour_levels_of_a_gaussian():
    """Above (1 - m) of its highest density lies m of it: of samples, whatever their weights, and of a grid."""
    rng, rings = np.random.default_rng(0), np.log(1 - np.array(posterior.LEVELS))
    z = 2 * rng.normal(size=(200_000, 2))
    weights, log_density = np.exp(-(z**2).sum(axis=-1) * 3 / 8), -(z**2).sum(axis=-1) / 2  # of a standard normal
    found = posterior.contour_levels(log_density[:, None], weights[:, None] / weights.sum())
    np.testing.assert_allclose(found[0], rings, atol=0.05)
    x, y = np.meshgrid(np.linspace(-5, 5, 201), np.linspace(-5, 5, 201))
    log_density = (-(x**2 + y**2) / 2).reshape(-1, 1)
    found = posterior.contour_levels(log_density, np.exp(log_density) / np.exp(log_density).sum())
    np.testing.assert_allclose(found[0], rings, atol=0.01)


def test_resampling_draws_from_q_ew(arrays, pool):
    """The share of samples below four places on each axis, for k = 10, within 5 standard errors and q_ew's own error.

    Samples of q itself have other shares.
    """
    grid, log_mass = cells(arrays)

    def farthest(samples):
        apart = []
        for i, axis in itertools.product(range(N), (0, 1)):
            q_ew, cell = np.exp(log_mass[i, 2]), grid[:, :, i, axis]
            for place in np.quantile(cell, [0.3, 0.4, 0.5, 0.6]):
                expected = q_ew[cell < place].sum() / q_ew.sum()
                apart.append(abs(np.mean(samples[:, i, axis] < place) - expected))
        return max(apart)

    samples = posterior.resampled(*pool, 10, seed=2)
    assert samples.shape == (2000, N, 2)
    assert farthest(samples) < 5 * np.sqrt(0.25 / 2000) + 0.02 < farthest(posterior.resampled(*pool, 1, seed=2)[:2000])


def test_samples_of_the_grid_have_its_moments(arrays):
    grid, log_mass = cells(arrays)
    p = np.moveaxis(log_mass[:, 0], 0, -1)
    cell = (2 * arrays["grid_half"] / p.shape[0]) ** 2
    samples = posterior.grid_samples(p, grid, cell, 5000, seed=0)
    for i in range(N):
        mass = np.exp(p[..., i] - logsumexp(p[..., i]))
        mean = np.einsum("rc,rcd->d", mass, grid[:, :, i])
        assert np.all(np.abs(samples[i].mean(axis=0) - mean) < 5 * samples[i].std(axis=0) / np.sqrt(5000))


def test_bound_curve_rises_to_the_streaming_bound(net, x_small, monkeypatch, uncompiled):
    monkeypatch.setattr(posterior, "BOUND_KS", (1, 10, 100, 1000))
    curve = posterior.bound_curve(net, x_small[:20], seed=1)
    assert curve.shape == (4, 20) and np.all(np.diff(curve.mean(axis=1)) > 0)
    assert curve[-1].mean() == pytest.approx(posterior.bounds(net, x_small[:20], 1000, seed=5)[0].mean(), abs=0.05)


@pytest.mark.parametrize("n, ranks", [(2, [1, 0, 0]), (5, [4, 3, 2]), (20, [19, 15, 9])])
def test_images_chosen_by_kl_have_the_rank_that_is_told(net, x_small, small_posteriors, monkeypatch, n, ranks):
    gap = np.random.default_rng(n).random(n)
    monkeypatch.setattr(posterior, "bounds", lambda model, x, k, seed: (gap, np.zeros(n)))
    indices, told = posterior.chosen_images(net, x_small[:n], np.arange(n) % 10)
    assert told.tolist() == ranks and [(gap < gap[i]).sum() for i in indices[-3:]] == ranks


@pytest.mark.slow
def test_any_net_has_samples_and_grids_are_for_two_units_alone(net, small_net, x_small, small_posteriors, uncompiled):
    labels = np.arange(60) % 10
    grids = posterior.posterior_arrays(net, x_small, labels)
    samples = posterior.posterior_arrays(small_net(2), x_small, labels)
    assert set(grids) > set(samples) and all(
        name.startswith(("grid", "manifold")) for name in set(grids) - set(samples)
    )
    assert list(grids["grid_index"][: posterior.SAME]) == [5, 6, 7, 8, 9] and len(grids["grid_index"]) == 8
    assert samples["single_samples"].shape == (3, 2, 2, 2) and grids["manifold"].shape == (441, 12)
    assert str(samples["single_projection"]) == "PCA" and str(grids["single_projection"]) == "latent"


def test_two_active_units_of_several_are_projected_too(small_net, x_small, small_posteriors, uncompiled):
    net = small_net()
    net.encoder[0].mean.kernel.assign(net.encoder[0].mean.kernel * [9.0, 9.0, 0.0, 0.0])
    shown = posterior.sample_arrays(net, x_small, np.arange(60) % 10)
    assert str(shown["single_projection"]) == "PCA" and shown["single_samples"].shape[-1] == 2
    np.testing.assert_allclose(shown["single_samples"].mean(axis=(1, 2)), 0, atol=1e-6)


def test_snapshots_are_drawn_from_and_leave_the_model_as_the_last(net, x_small, small_posteriors, tmp_path):
    before, weights = [variable.numpy() for variable in net.variables], {}
    for epoch, shift in ((1, 1.0), (3, 0.0)):
        net.decoder[0].head.bias.assign_add(np.full(12, shift))
        weights[epoch] = tmp_path / f"{epoch}.weights.h5"
        save_weights(net, weights[epoch])
        net.decoder[0].head.bias.assign_sub(np.full(12, shift))
    shown = posterior.snapshot_arrays(net, weights, x_small, np.arange(60) % 10)
    assert list(shown["snapshot_epoch"]) == [1, 3]
    assert shown["snapshot_prior_samples"].shape == (2, 100, 12)
    assert np.all(shown["snapshot_prior_samples"][0] > shown["snapshot_prior_samples"][1])
    assert shown["snapshot_grid_log_density"].shape == (2, 5, 2, 11, 11)
    for variable, value in zip(net.variables, before, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, atol=1e-6)


def test_a_plot_is_drawn_of_runs_that_all_have_its_arrays():
    every, some = {"grid_k": 0}, {}
    assert "manifold" in applicable(PLOTS, {"a": every, "b": every})
    left = applicable(PLOTS, {"a": every, "b": some})
    assert "manifold" not in left and "unit_kl" in left and "aggregate_over_training" not in left
