"""Every plot draws the arrays that it was given, for one run and for three, and changes nothing else."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from canvas import PALETTE, save_animation, save_figure
from plotting import ANIMATIONS, COMPARISONS, DIAGNOSTICS, NEEDS, PLOTS, applicable

ROOT = Path(__file__).parents[1]
GRIDS = (
    "grid_centre",
    "grid_half",
    "grid_view",
    "grid_log_density",
    "grid_level",
    "grid_kl",
    "grid_held",
    "grid_q_std",
)

EVERY_PLOT = PLOTS | COMPARISONS | DIAGNOSTICS
LABELS = ["iwae", "vae", "stl", "dreg", "rws", "rws_dreg", "miwae groups 2", "miwae_dreg groups 2"]
TARGETS = np.array([0, 1, 0, 0, 4, 4, 6, 6])


def diagnostics(rng):
    """What --diagnose measures, random; but stl, as in truth, has the decoder's gradient of iwae, rounding aside."""
    measures = rng.lognormal(size=(3, len(LABELS), 2, 4))
    measures[:, 2, 1] = measures[:, 0, 1] * (1 + 1e-6)
    return {
        "weight_k": np.array([2, 10, 1000]),
        "effective_sample_size": np.array([1.5, 3.0, rng.uniform(20, 40)]),
        "largest_weight": np.array([0.9, 0.6, 0.123]),
        "bound": np.array([-95.0, -92.0, rng.uniform(-91, -90)]),
        "jackknife": np.array([-94.0, -91.5, -90.0]),
        "label": np.array(LABELS),
        "target": TARGETS,
        "gradient_k": np.array([2, 8, 32, 128]),
        "gradient_snr": measures[0],
        "gradient_snr_low": measures[0] * 0.9,
        "gradient_snr_high": measures[0] * 1.2,
        "gradient_variance": measures[1],
        "gradient_squared_bias": measures[2] - 1,
        "replicates": np.array(200),
        "gradient_images": np.array(20),
        "step_k": np.array(8),
        "step_milliseconds": rng.uniform(1, 5, len(LABELS)),
    }


def posteriors(rng, images, features, tests):
    """Five images that all runs share and two of their own, on grids of 9 cells a side; three snapshots."""
    n, side = 7, 9
    arrays = {
        "grid_k": np.array([1, 10]),
        "grid_rank": np.array([199, 100]),
        "grid_index": rng.integers(0, 100, n),
        "grid_x": rng.random((n, features)),
        "grid_centre": rng.normal(size=(n, 2)),
        "grid_half": rng.uniform(0.1, 2, n),
        "grid_view": rng.normal(size=(n, 1, 2)) + [[[-3], [3]]],
        "grid_log_density": rng.normal(size=(n, 3, side, side)),
        "grid_level": np.sort(rng.normal(size=(n, 3, 2)))[..., ::-1],
        "grid_held": rng.uniform(0.5, 1, (n, 3)),
        "grid_q_std": rng.uniform(0.01, 1, n),
        "grid_candidates": np.array(200),
        "grid_kl": rng.lognormal(size=(n, 3)),
        "grid_samples": rng.normal(size=(n, 3, 20, 2)),
        "manifold": rng.random((25, features)),
        "manifold_z": np.linspace(-2, 2, 5),
        "single_k": np.array(100),
        "single_index": np.array([3, 2, 1]),
        "single_x": rng.random((3, features)),
        "single_effective": rng.uniform(1, 200, 3),
        "single_log_w": rng.normal(-90, 3, (3, 200)),
        "single_samples": rng.normal(size=(3, 2, 20, 2)),
        "single_explained": np.array([[0.3, 0.2]] * 3),
        "single_projection": np.array("PCA"),
        "bound_k": np.array([1, 10, 5000]),
        "bound_images": np.array(200),
        "bound_mean": np.sort(rng.normal(-100, 5, 3)),
        "bound_standard_error": rng.uniform(1, 2, 3),
        "interpolation": rng.random((images // 2, 9, features)),
        "extreme_x_mean": rng.random((16, features)),
    }
    snapshots = {
        "prior_samples": rng.random((3, 23, features)),
        "posterior_samples": rng.normal(size=(3, tests // 2, 2)),
    }
    snapshots |= {name: np.stack([arrays[name][:5]] * 3) for name in GRIDS} | {"epoch": np.array([1, 2, 4])}
    return arrays | {f"snapshot_{name}": array for name, array in snapshots.items()}


def make_arrays(seed, epochs=4, image_shape=(6, 5), layers=1, classes=10):
    """A run's arrays, small and random."""
    rng = np.random.default_rng(seed)
    features, hidden, images, tests = int(np.prod(image_shape)), 7, 10, 80
    arrays = {
        "epoch": np.arange(1, epochs + 1),
        "bound_train": -100 - 50 / np.arange(1.0, epochs + 1),
        "bound_validation": -101 - 50 / np.arange(1.0, epochs + 1) - seed,
        "image_shape": np.array(image_shape),
        "split": np.array("test"),
        "x_mean": np.random.default_rng(99).random((images, features)),
        "x": np.random.default_rng(98).integers(0, 2, (images, features)),
        "k_resampling": np.array(100),
        "prior_samples": rng.random((23, features)),
        "posterior_samples": rng.normal(size=(tests, 2)),
        "posterior_projection": np.array("PCA" if seed else "latent"),
        "posterior_explained": np.array([0.31, 0.12]),
        "labels": np.arange(tests) % classes if classes else np.full(tests, -1),
        "active_threshold": np.array(0.01),
        "encoder_weights": rng.normal(size=(features, hidden)),
        "decoder_weights": rng.normal(size=(hidden, features)),
        "log_likelihoods": rng.normal(-90, 20, size=tests),
        "k_evaluation": np.array(500),
    }
    for name in ("mean", "sample", "resampled"):
        arrays[f"reconstruction_{name}"] = rng.random((images, features))
    arrays |= diagnostics(rng) | posteriors(rng, images, features, tests)
    for layer in range(1, layers + 1):
        dead = [-1e-6, 0.0, 1e-9, 0.0099]
        arrays[f"unit_kl_{layer}"] = rng.uniform(-0.001, 2, 4 + 3 * layer)
        arrays[f"unit_variance_{layer}"] = np.concatenate([dead, rng.uniform(0.1, 2, 3 * layer)])
    return arrays


RUNS = {
    "one": {"iwae": make_arrays(0)},
    "three": {f"iwae_l{i}_k50__epochs3__seed{i}": make_arrays(i, layers=1 + i // 2) for i in range(3)},
}
each_plot = pytest.mark.parametrize("name", EVERY_PLOT)
each_number = pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)


def tiles(axes):
    """The images of an axes as [n, features], in reading order."""
    extents = [image.get_extent() for image in axes.images]
    order = sorted(range(len(extents)), key=lambda i: (extents[i][3], extents[i][0]))
    return np.array([np.asarray(axes.images[i].get_array()).ravel() for i in order])


def heights(axes):
    return np.array([bar.get_height() for bar in axes.patches])


def edges(axes):
    """The bins' edges of a histogram [bins + 1]."""
    left = [bar.get_x() for bar in axes.patches]
    return np.array([*left, left[-1] + axes.patches[-1].get_width()])


@each_number
@each_plot
def test_plot_returns_a_figure_with_title_and_every_run(name, runs):
    figure = EVERY_PLOT[name](runs)
    assert isinstance(figure, Figure)
    assert figure.get_suptitle()
    written = [text.get_text().replace("\n", "") for text in figure.findobj(matplotlib.text.Text)]
    for label in runs:
        assert any(label in text for text in written), label


@each_number
def test_training_curves_hold_the_bounds(runs):
    (axes,) = PLOTS["training_curves"](runs).axes
    lines = iter(axes.lines)
    for arrays in runs.values():
        for key in ("bound_train", "bound_validation"):
            line = next(lines)
            assert np.array_equal(line.get_xdata(), arrays["epoch"])
            assert np.array_equal(line.get_ydata(), arrays[key])
            assert (line.get_linestyle() == "--") == (key == "bound_validation")
    assert next(lines, None) is None
    assert "nats" in axes.get_ylabel()


def test_training_curves_are_not_squashed_by_the_first_epochs():
    arrays = make_arrays(0, epochs=1000)
    figure = PLOTS["training_curves"]({"iwae": arrays})
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert arrays["bound_train"].min() < axes.get_ylim()[0] < np.median(arrays["bound_train"])
    assert axes.get_ylim()[1] >= arrays["bound_train"].max()
    assert "below the axis" in figure.get_supxlabel()


def test_training_curves_of_few_epochs_show_them_all():
    arrays = make_arrays(0, epochs=2)
    (axes,) = PLOTS["training_curves"]({"iwae": arrays}).axes
    assert axes.get_xscale() == "linear"
    assert axes.get_ylim()[0] <= arrays["bound_validation"].min()


@each_number
def test_reconstructions_hold_the_images_row_by_row(runs):
    (axes,) = PLOTS["reconstructions"](runs).axes
    first = next(iter(runs.values()))
    expected = [first["x_mean"], first["x"]]
    for arrays in runs.values():
        expected += [arrays[f"reconstruction_{name}"] for name in ("mean", "sample", "resampled")]
    assert np.array_equal(tiles(axes), np.concatenate(expected))
    assert len(axes.get_yticklabels()) == len(expected)
    assert "k = 100" in axes.get_yticklabels()[-1].get_text()


def test_reconstructions_show_the_originals_again_where_a_run_has_others():
    runs = {"a": make_arrays(0), "b": make_arrays(1) | {"x": 1 - make_arrays(1)["x"]}}
    (axes,) = PLOTS["reconstructions"](runs).axes
    images = tiles(axes).reshape(10, 10, -1)
    assert np.array_equal(images[6], runs["b"]["x"])


@each_number
def test_prior_samples_hold_the_images(runs):
    figure = PLOTS["prior_samples"](runs)
    for axes, arrays in zip(figure.axes, runs.values(), strict=True):
        assert np.array_equal(tiles(axes), arrays["prior_samples"])
        assert axes.images[0].get_clim() == (0, 1)


@each_number
def test_posterior_scatter_holds_points_and_classes(runs):
    figure = PLOTS["posterior_scatter"](runs)
    for axes, arrays in zip(figure.axes, runs.values(), strict=True):
        (points,) = axes.collections
        assert np.array_equal(points.get_offsets(), arrays["posterior_samples"])
        expected = [to_rgba(PALETTE[label], points.get_alpha()) for label in arrays["labels"]]
        assert np.allclose(points.get_facecolors(), expected)
        assert sorted(text.get_text() for text in axes.texts) == list("0123456789")
        assert axes.get_aspect() == 1
        latent = str(arrays["posterior_projection"]) == "latent"
        assert axes.get_xlabel() == ("latent unit 1" if latent else "PCA 1 (31% of variance)")
        assert axes.get_ylabel() == ("latent unit 2" if latent else "PCA 2 (12% of variance)")
    assert sum(axes.get_legend() is not None for axes in figure.axes) == 1
    assert "Aggregate" in figure.get_suptitle() and "Not the posterior of any single image" in figure.get_supxlabel()


@pytest.mark.parametrize("classes", [0, 11])
def test_posterior_scatter_without_drawable_classes_has_one_colour(classes):
    figure = PLOTS["posterior_scatter"]({"iwae": make_arrays(0, classes=classes)})
    (axes,) = figure.axes
    assert len(np.unique(axes.collections[0].get_facecolors(), axis=0)) == 1
    assert axes.get_legend() is None and not axes.texts


def test_posterior_scatter_keeps_badges_apart():
    arrays = make_arrays(0)
    arrays["posterior_samples"] = 0.01 * arrays["posterior_samples"] + [5, 0]
    (axes,) = PLOTS["posterior_scatter"]({"iwae": arrays}).axes
    places = np.array([text.get_position() for text in axes.texts])
    gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(10)
    assert gaps.min() > 0.3


@each_number
def test_active_units_count_every_unit_on_its_side_of_the_threshold(runs):
    figure = PLOTS["active_units"](runs)
    panels = {axes.get_title(loc="left").replace("\n", " "): axes for axes in figure.axes}
    layers_of_any = 2 if len(runs) > 1 else 1
    expected = 0
    for run, arrays in runs.items():
        for layer in (1, 2):
            if f"unit_variance_{layer}" not in arrays:
                continue
            expected += 1
            variance = arrays[f"unit_variance_{layer}"]
            text = f"layer {layer}: " if layers_of_any > 1 else ""
            axes = panels[f"{run} {text}{3 * layer} of {len(variance)} active"]
            bins = edges(axes)
            clipped = np.log10(np.maximum(variance, 10 ** (bins[0] + 1e-9)))
            assert np.array_equal(heights(axes), np.histogram(clipped, bins)[0])
            assert heights(axes)[bins[:-1] < -2].sum() == 4
            assert axes.lines[0].get_xdata()[0] == -2
            assert axes.texts[0].get_text() == "threshold 0.01"
    assert len(panels) == expected


@each_number
def test_weights_hold_the_units_by_norm_on_a_symmetric_scale(runs):
    panels = [axes for axes in PLOTS["weights"](runs).axes if len(axes.images) > 1]
    assert len(panels) == 2 * len(runs)
    keys = [(run, key) for key in ("encoder_weights", "decoder_weights") for run in runs]
    for axes, (run, key) in zip(panels, keys, strict=True):
        units = runs[run][key].T if key == "encoder_weights" else runs[run][key]
        by_norm = sorted(units, key=np.linalg.norm, reverse=True)
        assert np.array_equal(tiles(axes), by_norm)
        low, high = axes.images[0].get_clim()
        assert -low == high > 0
        assert key[:7] in axes.get_title(loc="left")


def test_weights_show_at_most_a_hundred_units_and_say_so():
    arrays = make_arrays(0) | {"decoder_weights": np.random.default_rng(0).normal(size=(130, 30))}
    panels = PLOTS["weights"]({"iwae": arrays}).axes
    assert len(panels[1].images) == 100
    assert "100 of 130" in panels[1].get_title(loc="left")


@each_number
def test_log_likelihoods_share_bins_and_state_the_mean(runs):
    figure = PLOTS["log_likelihoods"](runs)
    for axes, below, arrays in zip(figure.axes[0::2], figure.axes[1::2], runs.values(), strict=True):
        assert np.array_equal(tiles(below), arrays["extreme_x_mean"])
        values = arrays["log_likelihoods"]
        assert np.array_equal(edges(axes)[:-1], edges(figure.axes[0])[:-1])
        assert heights(axes).sum() == len(values)
        assert np.sum(heights(axes) * (edges(axes)[:-1] + edges(axes)[1:]) / 2) / len(values) == pytest.approx(
            values.mean(), abs=np.diff(edges(axes)).max()
        )
        assert axes.lines[0].get_xdata()[0] == values.mean()
        stated = f"{values.mean():.2f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f} nats"
        assert stated.replace("-", "−") in axes.get_title(loc="left")
        assert "k = 500" in axes.get_title(loc="left")


@each_number
def test_bound_against_k_holds_means_and_states_the_last_error(runs):
    (axes,) = PLOTS["bound_against_k"](runs).axes
    for line, arrays in zip(axes.lines, runs.values(), strict=True):
        assert np.array_equal(line.get_ydata(), arrays["bound_mean"])
        assert f" ± {arrays['bound_standard_error'][-1]:.2f} at k = 5000" in line.get_label()
    assert axes.get_xscale() == "log"


@each_number
def test_log_weights_state_the_bounds_that_they_make(runs):
    panels = np.reshape(PLOTS["log_weights"](runs).axes, (len(runs), 3))
    for row, arrays in zip(panels, runs.values(), strict=True):
        for axes, log_w, index in zip(row, arrays["single_log_w"], arrays["single_index"], strict=True):
            lines = [line.get_xdata()[0] for line in axes.lines]
            assert np.allclose(lines, [log_w.mean(), np.log(np.mean(np.exp(log_w)))])
            assert heights(axes).sum() == np.sum(log_w >= np.quantile(log_w, 0.005))
            assert f"test image {index}" in axes.get_title(loc="left")


@each_number
def test_posterior_samples_hold_q_and_the_resampled(runs):
    panels = np.reshape(PLOTS["posterior_samples"](runs).axes, (len(runs), 3))
    for row, arrays in zip(panels, runs.values(), strict=True):
        for axes, (resampled, q) in zip(row, arrays["single_samples"], strict=True):
            assert np.array_equal(axes.collections[0].get_offsets(), q)
            assert np.array_equal(axes.collections[1].get_offsets(), resampled)
            assert axes.get_xlabel() == "PCA 1 (30%)"


@each_number
def test_unit_kl_is_ranked_and_summed(runs):
    panels = {axes.get_title(loc="left").replace("\n", " "): axes for axes in PLOTS["unit_kl"](runs).axes}
    for run, arrays in runs.items():
        units = arrays["unit_kl_1"]
        layer = "layer 1: " if len(runs) > 1 else ""
        assert np.array_equal(heights(panels[f"{run} {layer}{units.sum():.1f} nats"]), np.sort(units)[::-1])
    assert len(panels) == sum("unit_kl_2" in arrays for arrays in runs.values()) + len(runs)


@each_number
def test_interpolation_stands_between_its_images(runs):
    for axes, arrays in zip(PLOTS["interpolation"](runs).axes, runs.values(), strict=True):
        rows = tiles(axes).reshape(5, 11, -1)
        assert np.array_equal(rows[:, 1:-1], arrays["interpolation"])
        assert np.array_equal(rows[:, 0], arrays["x_mean"][0::2]) and np.array_equal(
            rows[:, -1], arrays["x_mean"][1::2]
        )


@each_number
def test_manifold_holds_the_images_with_z_at_the_axes(runs):
    for axes, arrays in zip(PLOTS["manifold"](runs).axes, runs.values(), strict=True):
        assert np.array_equal(tiles(axes), arrays["manifold"])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["−2.0", "−1.0", "0.0", "1.0", "2.0"]
        assert axes.get_yticklabels()[0].get_text() == "2.0"  # at the top


def test_posterior_of_one_input_shows_p_q_and_q_ew_on_one_scale_with_contours_of_stated_mass():
    arrays = RUNS["one"]["iwae"]
    panels = np.reshape(PLOTS["posterior_of_one_input"]({"iwae": arrays}).axes, (2, 4))
    for i, (image, *others) in zip((-2, -1), panels, strict=True):
        assert np.array_equal(image.images[0].get_array().ravel(), arrays["grid_x"][i])
        density = np.exp(arrays["grid_log_density"][i])
        assert len({axes.images[0].get_clim() for axes in others}) == 1
        assert len({(axes.get_xlim(), axes.get_ylim()) for axes in others}) == 1
        for j, axes in enumerate(others):
            assert np.array_equal(axes.images[0].get_array(), density[j])
            contour = [c for c in axes.collections if hasattr(c, "levels")][-1]
            assert np.allclose(contour.levels, np.exp(arrays["grid_level"][i, j][::-1]))
            assert np.array_equal(axes.collections[-1].get_offsets(), arrays["grid_samples"][i, j])
            title = axes.get_title(loc="left")
            assert (f"KL {arrays['grid_kl'][i, j]:.1f}" in title) == (j > 0)
            assert f"{arrays['grid_held'][i, j]:.0%} held" in title


def test_posterior_side_by_side_holds_the_images_that_runs_share():
    runs = RUNS["three"]
    panels = np.reshape(PLOTS["posterior_side_by_side"](runs).axes, (4, 5))
    for row, arrays in zip(panels[1:], runs.values(), strict=True):
        for i, axes in enumerate(row):
            assert np.array_equal(axes.images[0].get_array(), np.exp(arrays["grid_log_density"][i, 0]))
            title = f"KL {arrays['grid_kl'][i, 1]:.1f}, q ± {arrays['grid_q_std'][i]:.2g}"
            assert title in axes.get_title(loc="left")


def test_levels_beyond_the_square_are_not_drawn_and_a_kl_within_its_error_is_not_written_out():
    """No warning, no line; and what is left of the level that is on the grid."""
    arrays = dict(RUNS["one"]["iwae"])
    top = arrays["grid_log_density"].max()
    arrays |= {"grid_level": np.full((7, 3, 2), [0.0, top + 1]), "grid_kl": np.full((7, 3), 0.03)}
    figure = PLOTS["posterior_side_by_side"]({"iwae": arrays})
    for axes in figure.axes[5:]:
        assert all(len(c.levels) == 1 for c in axes.collections) and len(axes.collections) == 2
        assert "KL < 0.1" in axes.get_title(loc="left")


def test_runs_without_a_common_snapshot_have_no_figure_of_their_training():
    first, second = (dict(arrays) for arrays in list(RUNS["three"].values())[:2])
    assert "aggregate_over_training" in applicable(PLOTS, {"a": first, "b": second})
    second["snapshot_epoch"] = np.array([5, 6, 7])
    runs = {"a": first, "b": second}
    assert "aggregate_over_training" not in applicable(PLOTS, runs) and not applicable(ANIMATIONS, runs)


def test_aggregate_posterior_over_training_holds_the_epochs_that_all_runs_kept():
    runs = dict(RUNS["three"])
    label, arrays = next(iter(runs.items()))
    runs[label] = arrays | {"snapshot_epoch": np.array([1, 3, 4])}
    figure = PLOTS["aggregate_over_training"](runs)
    panels = np.reshape(figure.axes, (3, 2))
    for row, arrays in zip(panels, runs.values(), strict=True):
        for at, axes in zip((0, 2), row, strict=True):
            assert np.array_equal(axes.collections[0].get_offsets(), arrays["snapshot_posterior_samples"][at])
            assert f"epoch {arrays['snapshot_epoch'][at]}" in axes.get_title(loc="left")
            assert [patch.radius for patch in axes.patches] == pytest.approx([1.177, 2.448], abs=0.001)
    assert "Aggregate" in figure.get_suptitle() and "Not the posterior of any single image" in figure.get_supxlabel()


@pytest.mark.parametrize("name", ANIMATIONS)
def test_animation_has_a_frame_per_epoch(name, tmp_path):
    from PIL import Image

    frames = ANIMATIONS[name](RUNS["one"])
    save_animation(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == len(frames) == 3 and gif.width == 830
    for frame, epoch in zip(frames, (1, 2, 4), strict=True):
        assert any(f"iwae, epoch {epoch}" in text.get_text() for text in frame.findobj(matplotlib.text.Text))


def test_needs_name_plots():
    assert set(NEEDS) <= {*PLOTS, *ANIMATIONS}


@each_number
def test_nll_differences_are_paired_and_to_the_first_run(runs):
    (axes,) = COMPARISONS["nll_differences"](runs).axes
    values = [arrays["log_likelihoods"] for arrays in runs.values()]
    expected = [np.mean(values[0] - other) for other in values]
    errors = [np.std(values[0] - other, ddof=1) / len(other) ** 0.5 for other in values]
    (points, _, (bars,)) = axes.containers[0]
    assert np.allclose(points.get_xdata(), expected)
    assert np.allclose([np.ptp(segment[:, 0]) / 2 for segment in bars.get_segments()], errors)
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == f"NLL {-values[0].mean():.2f}"
    assert texts[1:] == [f"{d:+.2f} ± {e:.2f}".replace("-", "−") for d, e in zip(expected[1:], errors[1:], strict=True)]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(runs)


@each_number
def test_importance_weights_hold_every_measure_of_every_run(runs):
    *panels, last = DIAGNOSTICS["importance_weights"](runs).axes
    for i, arrays in enumerate(runs.values()):
        assert np.array_equal(last.lines[2 * i].get_ydata(), arrays["bound"])
        assert np.array_equal(last.lines[2 * i + 1].get_ydata(), arrays["jackknife"])
    for axes, name in zip(panels, ("effective_sample_size", "largest_weight"), strict=True):
        equal, drawn = axes.lines[0::2], axes.lines[1::2]
        for arrays, line in zip(runs.values(), drawn, strict=True):
            assert np.array_equal(line.get_ydata(), arrays[name])
        assert equal[0].get_ydata()[-1] == (1000 if name == "effective_sample_size" else 0.001)


@each_number
@pytest.mark.parametrize("name", ["gradient_snr", "gradient_variance"])
def test_gradient_measures_are_drawn_encoder_beside_decoder_and_equal_lines_once(name, runs):
    panels = np.reshape(DIAGNOSTICS[name](runs).axes, (-1, 2))
    for row, arrays in zip(panels, runs.values(), strict=True):
        for part, axes in enumerate(row):
            assert ("encoder", "decoder")[part] in axes.get_title(loc="left")
            lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
            shown = [i for i in range(len(LABELS)) if part == 0 or i != 2]
            for i, line in zip(shown, lines, strict=True):
                assert np.array_equal(line.get_ydata(), arrays[name][i, part])
                assert (line.get_linestyle() == "-") == (TARGETS[i] == i)
                assert line.get_color() == lines[shown.index(TARGETS[i])].get_color()
            texts = [text.get_text().replace("\n", " ") for text in axes.texts]
            assert ("iwae, stl" in texts) == (len(shown) < len(LABELS))
            if name == "gradient_snr":
                for i, bars in zip(shown, axes.collections, strict=True):
                    ends = np.array([segment[:, 1] for segment in bars.get_segments()]).T
                    np.testing.assert_allclose(
                        ends, [arrays["gradient_snr_low"][i, part], arrays["gradient_snr_high"][i, part]]
                    )


def test_bias_is_drawn_for_estimators_that_have_another_target():
    arrays = RUNS["one"]["iwae"]
    (axes,) = DIAGNOSTICS["gradient_bias"]({"iwae": arrays}).axes
    drawn = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 4]
    assert np.array_equal(drawn, arrays["gradient_squared_bias"][[2, 3, 5, 7], 0])
    assert axes.get_yscale() == "linear"  # below 0, too
    (axes,) = DIAGNOSTICS["gradient_bias"]({"iwae": arrays | {"target": np.arange(len(LABELS))}}).axes
    assert not [line for line in axes.lines if len(line.get_xdata()) == 4]  # where all are their own targets


@each_number
def test_step_cost_holds_the_milliseconds(runs):
    for axes, arrays in zip(DIAGNOSTICS["step_cost"](runs).axes, runs.values(), strict=True):
        assert np.allclose([bar.get_width() for bar in axes.patches], arrays["step_milliseconds"])
        assert "milliseconds" in axes.get_xlabel()


def test_a_ratio_of_0_keeps_its_name_on_a_logarithmic_axis():
    arrays = make_arrays(0)
    arrays["gradient_snr"][3, :, -1] = 0
    figure = DIAGNOSTICS["gradient_snr"]({"iwae": arrays})
    figure.draw_without_rendering()
    for axes in figure.axes:
        (text,) = [text for text in axes.texts if "dreg" in text.get_text().split(", ")]
        assert np.all(np.isfinite(text.xy)) and -0.5 < text.get_position()[1] <= 1


@pytest.mark.parametrize("name", ["training_curves", "bound_against_k", "importance_weights"])
def test_no_two_of_twelve_runs_have_lines_alike(name):
    (axes, *_) = EVERY_PLOT[name]({f"run{i}": make_arrays(i, epochs=50) for i in range(12)}).axes
    lines = [line for line in axes.lines if line.get_label().startswith("run")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 12


def test_likelihoods_that_hardly_differ_have_a_histogram():
    arrays = make_arrays(0) | {"log_likelihoods": np.float32([-90, -90.0001, -90.00005])}
    assert PLOTS["log_likelihoods"]({"iwae": arrays}).axes[0].patches


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_labels_of_lines_do_not_overlap(name):
    figure = DIAGNOSTICS[name](RUNS["one"])
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]  # without their leaders
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)


UNUSUAL = {
    "one epoch, no labels, rows of pixels": {"epochs": 1, "classes": 0, "image_shape": (1, 10)},
    "two layers, columns of pixels": {"layers": 2, "image_shape": (10, 1)},
}


@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
@each_plot
def test_unusual_runs_are_drawn(name, unusual, tmp_path):
    save_figure(EVERY_PLOT[name]({"iwae": make_arrays(0, **unusual)}), tmp_path / "figure.png")


@each_plot
def test_seven_runs_go_on_in_further_rows(name):
    runs = {f"run{i}": make_arrays(i) for i in range(7)}
    assert EVERY_PLOT[name](runs).get_size_inches()[0] == EVERY_PLOT[name](RUNS["one"]).get_size_inches()[0]


@each_plot
def test_loaded_npz_serves_as_arrays(name, tmp_path):
    np.savez(tmp_path / "run.npz", **make_arrays(0))
    with np.load(tmp_path / "run.npz", allow_pickle=False) as arrays:
        assert isinstance(EVERY_PLOT[name]({"iwae": arrays}), Figure)


LONGER = "__latent_units100-50__hidden_units200-200_100-100__schedulepaper__epochs40__optimizermuon__epsilon1e-08"


@each_plot
@pytest.mark.parametrize("count, longer", [("three", ""), ("one", LONGER)])
def test_no_text_of_long_runs_leaves_the_figure_or_overlaps_a_title_or_the_caption(name, count, longer):
    wide = {"encoder_weights": np.ones((30, 200)), "decoder_weights": np.ones((200, 30))}
    figure = EVERY_PLOT[name](
        {f"{run}{longer}__batch100__ema0.999": arrays | wide for run, arrays in RUNS[count].items()}
    )
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.x1
    renderer = figure._get_renderer()
    titles = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
    titles = [text.get_window_extent(renderer) for text in titles if text.get_text()]
    titles.append(figure._suptitle.get_window_extent(renderer))
    assert titles[-1].x1 <= figure.bbox.x1
    for i, one in enumerate(titles):
        assert not any(one.overlaps(other) for other in titles[i + 1 :])
    assert min(box.y0 for box in boxes) > figure._supxlabel.get_window_extent(renderer).y1 - 0.5


@pytest.fixture(scope="module")
def fresh_process():
    """What a process without a display reports after drawing and saving every plot."""
    code = """
import sys
import matplotlib
before, backend = dict(matplotlib.rcParams.copy()), matplotlib.rcParams._get_backend_or_none()
import canvas, plotting
print("tensorflow" in sys.modules, "matplotlib.pyplot" in sys.modules)
import tempfile, pathlib
sys.path.insert(0, "tests")
folder = pathlib.Path(tempfile.mkdtemp())
sys.modules["pytest"] = __import__("pytest")
from test_plotting import EVERY_PLOT, RUNS
for name, plot in EVERY_PLOT.items():
    canvas.save_figure(plot(RUNS["one"]), folder / f"{name}.png")
print("tensorflow" in sys.modules, "matplotlib.pyplot" in sys.modules)
print(dict(matplotlib.rcParams.copy()) == before, matplotlib.rcParams._get_backend_or_none() == backend)
"""
    environment = {"PATH": "/usr/bin", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_import_brings_neither_tensorflow_nor_pyplot(fresh_process):
    assert fresh_process[0] == "False False"


@pytest.mark.slow
def test_drawing_needs_no_display_opens_no_window_and_leaves_global_state(fresh_process):
    assert fresh_process[1:] == ["False False", "True True"]


@each_plot
def test_save_figure_writes_the_same_png_twice_and_nothing_else(name, tmp_path):
    figure = EVERY_PLOT[name](RUNS["one"])
    save_figure(figure, tmp_path / "a.png")
    save_figure(EVERY_PLOT[name](RUNS["one"]), tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and content == (tmp_path / "b.png").read_bytes()
    assert 1200 <= int.from_bytes(content[16:20], "big") <= 1600
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == content
