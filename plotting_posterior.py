"""Figures of posteriors: as they are where a net has two latent units, by samples in any net. See `plotting`."""

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from scipy.special import logsumexp

import canvas
from canvas import IMAGE_STYLE, PALETTE, SMALL, TEXT, WIDTH

RINGS = (0.5, 0.95)  # shares of the prior
TRUE, OTHER = PALETTE[0], PALETTE[4]  # the lines of the true posterior, and of what stands for it


def posterior_of_one_input(runs):
    """True posteriors p(z | x) beside q(z | x) and importance-weighted posteriors, a row per image.

    Of one run the images at the ranks grid_rank of KL(q || p), of several runs the first of these each.
    Reads split, image_shape [2], grid_x [n, features], grid_index [n], grid_rank [s], grid_candidates, grid_k [c],
    what `_density` does, grid_held and grid_kl [n, 1 + c], grid_samples [n, 1 + c, m, 2].
    """
    first = next(iter(runs.values()))
    shares = len(first["grid_rank"])
    shown = range(-shares, 0) if len(runs) == 1 else [-shares]
    rows = [(run, arrays, i) for run, arrays in runs.items() for i in shown]
    names = ["true posterior", "q(z | x) = q_ew, k = 1", *(f"q_ew, k = {k}" for k in first["grid_k"][1:])]
    caption = (
        "q_ew: what sampling-importance-resampling from k samples of q draws from. Lines: the smallest areas that hold "
        "50 % and 95 % of a density, as far as the square reaches; dashed: the true posterior's. Shade: the density, "
        "on one scale in a row. Dots: samples. KL(· ‖ p) in nats, of a whole density; the square holds the share named."
    )
    title = "The posterior of a single image, and what k samples of q make of it"
    figure = canvas.new_figure(title, caption, 1 + 2.25 * len(rows))
    widths = [0.6] + [1] * len(names)
    panels = figure.subplots(len(rows), 1 + len(names), squeeze=False, width_ratios=widths)
    for (image, *others), (run, arrays, i) in zip(panels, rows, strict=True):
        _thumbnail(image, arrays["grid_x"][i], canvas.image_shape_of(runs))
        rank, candidates = arrays["grid_rank"][i], arrays["grid_candidates"]
        others_kl = f"KL larger than in\n{rank / candidates:.0%} of" if rank < candidates - 1 else "the largest KL\nof"
        which = f"{canvas.split_of(runs)} image {arrays['grid_index'][i]}"
        image.set_title(f"{which}\n{others_kl} {candidates} images", loc="left", fontsize=SMALL)
        for j, axes in enumerate(others):
            _density(axes, arrays, i, j)
            axes.scatter(*arrays["grid_samples"][i, j].T, s=1.5, color="black", alpha=0.5, linewidths=0)
            axes.tick_params(labelleft=j == 0)
        kls = ["", *(f"{_kl(nats)}, " for nats in arrays["grid_kl"][i, 1:])]
        measures = zip(names, kls, arrays["grid_held"][i], strict=True)
        titles = [f"{name}\n{kl}{held:.0%} held" for name, kl, held in measures]
        canvas.name_row(others, run if i == shown[0] else "", titles)
    return figure


def posterior_side_by_side(runs):
    """True posteriors of the same images under several nets, and each net's q, a row per run.

    Reads split, image_shape [2], grid_x [n, features], grid_index [n], grid_rank [s], what `_density` does, grid_kl
    [n, 2 or more], grid_q_std [n]; n - s images are the same.
    """
    first = next(iter(runs.values()))
    count = len(first["grid_index"]) - len(first["grid_rank"])
    caption = (
        "Blue: the true posterior p(z | x) of the image above. Red: the encoder's q(z | x). Lines: the smallest areas "
        "that hold 50 % and 95 % of each, as far as the square reaches. Every panel has a square of its own. "
        "KL(q ‖ p) in nats; q ±: the geometric mean of its two standard deviations."
    )
    figure = canvas.new_figure(f"Posteriors of the same {canvas.split_of(runs)} images", caption, 1.8 + 1.9 * len(runs))
    panels = figure.subplots(1 + len(runs), count, squeeze=False, height_ratios=[0.55] + [1] * len(runs))
    for axes, image in zip(panels[0], first["grid_x"], strict=False):
        _thumbnail(axes, image, canvas.image_shape_of(runs))
    for row, (run, arrays) in zip(panels[1:], runs.items(), strict=True):
        titles = [
            f"{_kl(kl[1])}, q ± {std:.2g}" for kl, std in zip(arrays["grid_kl"], arrays["grid_q_std"], strict=True)
        ]
        canvas.name_row(row, run, titles[:count])
        for i, axes in enumerate(row):
            _density(axes, arrays, i, 0)
            _contours(axes, arrays, i, 1, colors=OTHER, linewidths=1.4)
    return figure


def aggregate_over_training(runs):
    """One sample of q(z | x) per image, by class, after epochs of the training: the aggregate posterior, a row per run.

    Reads split, snapshot_epoch [e], snapshot_posterior_samples [e, s, 2], labels [n]: the first s are shown.
    """
    epochs, classes = common_epochs(runs), canvas.classes_of(runs)
    epochs = epochs[:-2][:1] + epochs[-2:]  # the first and the last two
    samples = {run: arrays["snapshot_posterior_samples"] for run, arrays in runs.items()}
    count = len(next(iter(samples.values()))[0])
    caption = (
        f"One sample of q(z | x) for each of {count:,} {canvas.split_of(runs)} images. Not the posterior of any single "
        "image. Rings: the areas that hold 50 % and 95 % of the prior. One coordinate in a thousand may lie outside."
    )
    figure = canvas.new_figure("Aggregate posterior as the net was trained", caption, 1.1 + 2.8 * len(runs))
    panels = figure.subplots(len(runs), len(epochs), squeeze=False, sharex=True, sharey=True)
    reach = max(np.quantile(np.abs(points), 0.999) for points in samples.values())
    for row, (run, arrays) in zip(panels, runs.items(), strict=True):
        canvas.name_row(row, run, [f"epoch {epoch}" for epoch in epochs])
        for axes, epoch in zip(row, epochs, strict=True):
            points = samples[run][list(arrays["snapshot_epoch"]).index(epoch)]
            canvas.scatter_classes(axes, points, arrays["labels"][:count], classes, reach)
            for level in RINGS:
                radius = np.sqrt(-2 * np.log1p(-level))
                axes.add_patch(Circle((0, 0), radius, fill=False, edgecolor="black", linewidth=1))
            canvas.label_axes(axes, "latent unit 1", "latent unit 2" if axes is row[0] else "")
    canvas.class_legend(figure, classes, loc="outside right center")
    return figure


def manifold(runs):
    """Decoder means over the plane of the two latent units, at quantiles of the prior in equal steps, a grid per run.

    Reads image_shape [2], manifold_z [s] (the quantiles), manifold [s * s, features]: rows from the top, z_2 falling.
    """
    caption = "Decoder means. Along each axis z goes through quantiles of the prior in equal steps, so that each image "
    caption += "stands for an equal share of it."
    height = (WIDTH - 0.8) / canvas.columns_of(len(runs)) + 0.3
    figure, panels = canvas.panels_of(runs, "What the latent plane decodes to", caption, height)
    for (axes,), (run, arrays) in zip(panels, runs.items(), strict=True):
        z, shape = arrays["manifold_z"], canvas.image_shape_of(runs)
        canvas.draw_tiles(axes, arrays["manifold"], shape, len(z), **IMAGE_STYLE)
        at = np.unique(np.linspace(0, len(z) - 1, 5).round().astype(int))
        axes.set_xticks(at + 0.5, [canvas.number(z[i], 1) for i in at], fontsize=SMALL)
        axes.set_yticks(
            (at + 0.5) * canvas.cell_height(shape), [canvas.number(z[::-1][i], 1) for i in at], fontsize=SMALL
        )
        axes.set_xlabel("latent unit 1", fontsize=TEXT)
        axes.set_ylabel("latent unit 2", fontsize=TEXT)
        canvas.name_panel(axes, run, len(runs))
    return figure


def bound_against_k(runs):
    """The bound L_k (nats) against the number of samples k, a mean over images, and its standard error.

    Reads split, bound_k [c], bound_mean [c], bound_standard_error [c], bound_images (how many).
    """
    first = next(iter(runs.values()))
    caption = (
        f"Means over {first['bound_images']} {canvas.split_of(runs)} images, which the runs share; ±: one standard "
        "error over images. L_1 is the ELBO; L_k rises towards log p(x)."
    )
    figure = canvas.new_figure("The bound L_k against the number of samples", caption, 4)
    axes = figure.subplots()
    for i, (run, arrays) in enumerate(runs.items()):
        k, mean, error = (arrays[f"bound_{name}"] for name in ("k", "mean", "standard_error"))
        last = f"{canvas.number(mean[-1])} ± {error[-1]:.2f} at k = {k[-1]}"
        label = canvas.legend_label(run, f"{canvas.number(mean[0])} at k = 1, {last}")
        axes.plot(k, mean, label=label, **canvas.line_style(i))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    canvas.label_axes(axes, "samples k", "L_k (nats)")
    axes.grid(color="0.92")
    canvas.legend_above(axes)
    return figure


def log_weights(runs):
    """Histogram of the log importance weights (nats) of single images: their mean, and the log of the weights' mean.

    Reads split, image_shape [2], single_index [n], single_x [n, features], single_log_w [n, m],
    single_effective [n].
    """
    caption = (
        "In nats. Solid line: the mean of log w, the ELBO. Dashed: log of the mean of w, the estimate of log p(x). "
        "The further they lie apart, the fewer of the samples, at the right, make up that sum."
    )
    figure, panels = _image_panels(runs, "Log importance weights of single images", caption, 2.1)
    for row, arrays in zip(panels, runs.values(), strict=True):
        for axes, log_w in zip(row, np.float64(arrays["single_log_w"]), strict=True):
            mean, log_mean = log_w.mean(), logsumexp(log_w) - np.log(len(log_w))
            low = np.quantile(log_w, 0.005)  # the long tail at the left is cut
            axes.hist(log_w[log_w >= low], bins=60, color=PALETTE[0], alpha=0.75)
            axes.axvline(mean, color="black", linewidth=1.6)
            axes.axvline(log_mean, color="black", linewidth=1.6, linestyle="--")
            canvas.label_axes(axes, f"log w: {canvas.number(mean, 1)}, {canvas.number(log_mean, 1)}", "")
    return figure


def posterior_samples(runs):
    """Samples of q(z_1 | x) and of the posterior by sampling-importance-resampling, of single images, a row per run.

    Reads split, image_shape [2], single_index [n], single_x [n, features], single_log_w [n, m],
    single_effective [n], single_k, single_samples [n, 2, m, 2] (resampled, q), single_projection ("latent" or
    "PCA"), single_explained [n, 2] (shares of the variance).
    """
    k = next(iter(runs.values()))["single_k"]
    caption = (
        f"z_1, the layer nearest the data. Blue: one of each {k} samples of q, drawn by its weight: nearer to the "
        "posterior than q, the more so the more of the samples are effective. Red: q(z_1 | x)."
    )
    if any(arrays["single_projection"] == "PCA" for arrays in runs.values()):
        caption += " PCA: of the active units of both together, image by image."
    figure, panels = _image_panels(runs, "Samples of q for single images, resampled by their weights", caption, 2.9)
    for row, arrays in zip(panels, runs.values(), strict=True):
        for i, axes in enumerate(row):
            resampled, q = arrays["single_samples"][i]
            axes.scatter(*q.T, s=5, color=PALETTE[1], alpha=0.5, linewidths=0)
            axes.scatter(*resampled.T, s=5, color=PALETTE[0], alpha=0.7, linewidths=0)
            axes.set(aspect="equal", adjustable="datalim")
            canvas.label_axes(
                axes, *canvas.projection_names(arrays["single_projection"], arrays["single_explained"][i], "")
            )
    return figure


def _image_panels(runs, title, caption, height):
    """A Figure and its panels [run, image], of the single images of runs, each named."""
    count = len(next(iter(runs.values()))["single_index"])
    figure = canvas.new_figure(title, caption, 0.7 + height * len(runs))
    panels = figure.subplots(len(runs), count, squeeze=False)
    for row, (run, arrays) in zip(panels, runs.items(), strict=True):
        about = f"of {arrays['single_log_w'].shape[1]:,} samples"
        titles = zip(arrays["single_index"], arrays["single_effective"], strict=True)
        canvas.name_row(
            row, run, [f"{canvas.split_of(runs)} image {index}:\n{n:,.0f} {about} effective" for index, n in titles]
        )
        for axes, image in zip(row, arrays["single_x"], strict=True):
            _thumbnail(axes.inset_axes((0.82, 0.78, 0.18, 0.22)), image, canvas.image_shape_of(runs))
    return figure, panels


def common_epochs(runs):
    """The epochs of which all runs kept a snapshot."""
    kept = [arrays["snapshot_epoch"].tolist() for arrays in runs.values()]
    return [epoch for epoch in kept[0] if all(epoch in epochs for epochs in kept)]


def _thumbnail(axes, image, shape):
    """One image, at the top of its panel."""
    axes.imshow(image.reshape(shape), **IMAGE_STYLE)
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set_visible(False)


def _kl(nats):
    """A KL to a tenth: that of q_ew, a mean over few groups of samples, is good to no more."""
    return f"KL {nats:.1f}" if nats > 0.1 else "KL < 0.1"


def _density(axes, arrays, i, j):
    """Density j of input i: shade, on the scale of the true posterior, and contours; the true posterior's, dashed.

    Reads grid_centre [n, 2], grid_half [n], grid_view [n, 2, 2] (the corners shown), grid_log_density
    [n, 1 + c, side, side], grid_level [n, 1 + c, levels].
    """
    density = np.exp(arrays["grid_log_density"][i])
    style = {"cmap": "Blues", "vmin": 0, "vmax": density[0].max(), "interpolation": "bilinear"}
    axes.imshow(density[j], **_placed(arrays, i), **style)
    if j:
        _contours(axes, arrays, i, 0, colors=TRUE, linewidths=0.8, linestyles="dashed")
    _contours(axes, arrays, i, j, colors=OTHER if j else TRUE, linewidths=1.2)
    (left, bottom), (right, top) = arrays["grid_view"][i]
    axes.set(xlim=(left, right), ylim=(bottom, top), facecolor=colormaps["Blues"](0))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=SMALL - 1)
    axes.spines[:].set_color("0.7")


def _contours(axes, arrays, i, j, **style):
    """The lines at grid_level of density j of input i, those that lie on the grid."""
    log_density = arrays["grid_log_density"][i, j]
    levels = [level for level in sorted({*arrays["grid_level"][i, j]}) if log_density.min() < level < log_density.max()]
    if levels:
        axes.contour(np.exp(log_density), levels=np.exp(levels), **_placed(arrays, i), **style)


def _placed(arrays, i):
    """Where imshow and contour draw the grid of input i: the square that its cells fill, the first row below."""
    (x, y), half = arrays["grid_centre"][i], arrays["grid_half"][i]
    return {"origin": "lower", "extent": (x - half, x + half, y - half, y + half)}
