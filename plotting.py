"""Figures of one run or of several side by side: numpy arrays in, a matplotlib Figure out.

Every plot takes `runs`, a dict {label: arrays}, where `arrays` maps names to numpy arrays (a loaded npz will
do); its docstring names the arrays that it reads. A new plot is one function and one entry of `PLOTS`, or of
`COMPARISONS` (of several runs, beside the plots), or of `DIAGNOSTICS` (of what --diagnose measures), and of
`NEEDS` where not every run has what it draws. `ANIMATIONS` give lists of Figures.
Nothing here opens a window, needs a display or touches `rcParams`: figures are made without pyplot.
"""

import textwrap

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

import canvas
import plotting_posterior
from canvas import IMAGE_STYLE, PALETTE, SMALL, TEXT, WIDTH

MAX_TILES = 100  # weight images shown per panel


def training_curves(runs):
    """Each run's own bound (nats) against the epoch: training images solid, validation images dashed.

    Reads epoch [e], bound_train [e], bound_validation [e].
    """
    logarithmic = max(arrays["epoch"][-1] for arrays in runs.values()) > 40
    bottom, caption = _bottom_of_curves(runs, np.log if logarithmic else np.asarray)
    title = "Bound on training images (solid) and validation images (dashed)"
    figure = canvas.new_figure(title, caption, 4.4)
    axes = figure.subplots()
    for i, (label, arrays) in enumerate(runs.items()):
        epoch, train, validation = arrays["epoch"], arrays["bound_train"], arrays["bound_validation"]
        last = f"training {canvas.number(train[-1])}, validation {canvas.number(validation[-1])} at epoch {epoch[-1]}"
        style = canvas.line_style(i) | {"markevery": 0.03, "linewidth": 1.6}
        axes.plot(epoch, train, label=canvas.legend_label(label, last), **style)
        axes.plot(epoch, validation, linestyle=(0, (4, 2)), markerfacecolor="white", **style)
    canvas.label_axes(axes, "epoch (logarithmic axis)" if logarithmic else "epoch", "bound (nats)")
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=bottom)
    axes.grid(color="0.92")
    canvas.legend_above(axes)
    return figure


def _bottom_of_curves(runs, scale):
    """Where the bound axis starts (None: at the lowest value) and the caption that says so.

    The first epochs lie so low that they squash the rest: they are cut off where that gives the rest more
    than twice the room. "First" is measured along the x axis as it is drawn, hence the `scale` of the epochs.
    """
    caption = "The bound of the run's objective: in training at that pass's k, by the weights as they then stood; on "
    caption += "validation images at the run's own k, by averaged weights where it has them."
    caption += " Of other objectives or k compare test log-likelihoods instead." * (len(runs) > 1)
    drawn = []
    for arrays in runs.values():
        x = scale(arrays["epoch"])
        for bound in (arrays["bound_train"], arrays["bound_validation"]):
            drawn.append(np.interp(np.linspace(x[0], x[-1], 200), x, bound))
    lowest, highest = np.min(drawn), np.max(drawn)
    bottom = min(np.quantile(bound, 0.15) for bound in drawn)
    if highest - lowest <= 2 * (highest - bottom):
        return None, caption
    return bottom, f"{caption} The first epochs, from {canvas.number(lowest, 0)} nats upwards, lie below the axis."


def reconstructions(runs):
    """Test images, a column each, above what each run's decoder makes of them, a row per way to choose z.

    Reads split, image_shape [2], x_mean and x [n, features], reconstruction_mean, reconstruction_sample and
    reconstruction_resampled [n, features], k_resampling.
    """
    rows, before = [], ()  # rows: (heading above, label at the left, images [n, features])
    for run, arrays in runs.items():
        originals = arrays["x_mean"], arrays["x"]
        if not (before and all(map(np.array_equal, originals, before))):
            rows += [(canvas.broken(f"{run}: images", 72) if before else "", "original", originals[0])]
            rows += [("", "as fed to the encoder", originals[1])]
        resampled = f"importance-weighted\nresampling, k = {arrays['k_resampling']}"
        rows += [(canvas.broken(run, 72), "mean of q(z | x)", arrays["reconstruction_mean"])]
        rows += [("", "one sample of q(z | x)", arrays["reconstruction_sample"])]
        rows += [("", resampled, arrays["reconstruction_resampled"])]
        before = originals
    shape, count = canvas.image_shape_of(runs), max(len(images) for *_, images in rows)
    height = canvas.cell_height(shape)
    inches = (WIDTH - 1.6) / count  # of a tile's width
    spaces = [(0.2 + 0.17 * (heading.count("\n") + 1)) / inches * (heading != "") for heading, *_ in rows]
    tops = height * np.arange(len(rows)) + np.cumsum(spaces)
    bottom = tops[-1] + height
    caption = "Rows of a run: decoder means at the z named at the left, where q is the run's encoder."
    figure = canvas.new_figure(f"Reconstructions of {canvas.split_of(runs)} images", caption, 0.65 + bottom * inches)
    axes = figure.subplots()
    for top, (heading, _, images) in zip(tops, rows, strict=True):
        canvas.draw_tiles(axes, images, shape, count, top, **IMAGE_STYLE)
        if heading:
            axes.text(0, top - 0.1, heading, fontsize=TEXT, fontweight="bold", va="bottom")
    axes.set_yticks(tops + height / 2, [label for _, label, _ in rows], fontsize=SMALL)
    return figure


def prior_samples(runs):
    """Decoder means at samples of the prior, a grid per run.

    Reads image_shape [2], prior_samples [m, features].
    """
    title, caption = "Samples from the prior", "Decoder means at z drawn from the prior p(z)."
    samples = {run: (arrays["prior_samples"], "") for run, arrays in runs.items()}
    return canvas.tile_figure(title, caption, canvas.image_shape_of(runs), WIDTH, [samples], [IMAGE_STYLE])[0]


def posterior_scatter(runs):
    """One sample of q(z|x) for each image, by class: the aggregate posterior, not one input's.

    Reads split, posterior_samples [s, 2], posterior_projection ("latent" or "PCA"), posterior_explained [2] (shares
    of the variance) and labels [s] (-1: there are none; then, and for more than ten classes, one colour).
    """
    classes = canvas.classes_of(runs)
    count, columns = max(len(arrays["posterior_samples"]) for arrays in runs.values()), canvas.columns_of(len(runs))
    caption = f"One sample of q(z | x), top layer, per {canvas.split_of(runs)} image ({count:,})"
    caption += "; numbers at class medians" if len(classes) else ""
    caption += ". Not the posterior of any single image."
    title, height = f"Aggregate posterior over the {canvas.split_of(runs)} images", min(5, (WIDTH - 0.5) / columns)
    figure, panels = canvas.panels_of(runs, title, caption, height)
    reach = 1.05 * max(np.abs(arrays["posterior_samples"]).max() for arrays in runs.values())
    for (axes,), (run, arrays) in zip(panels, runs.items(), strict=True):
        points, labels = arrays["posterior_samples"], arrays["labels"]
        canvas.scatter_classes(axes, points, labels, classes, reach)
        canvas.label_axes(axes, *canvas.projection_names(arrays["posterior_projection"], arrays["posterior_explained"]))
        canvas.name_panel(axes, run, len(runs))
        _class_badges(axes, points, labels, classes, 0.08 * columns * reach)
    canvas.class_legend(panels[columns - 1, 0], classes, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _class_badges(axes, points, labels, classes, distance):
    """Each class's number in a ring of its colour at its median, pushed aside where two would overlap."""
    present = [i for i, name in enumerate(classes) if name in labels]
    medians = np.array([np.median(points[labels == classes[i]], axis=0) for i in present]).reshape(-1, 2)
    for i, place in zip(present, _spread(medians, distance), strict=True):
        ring = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": PALETTE[i], "linewidth": 2}
        style = {"ha": "center", "va": "center", "fontsize": SMALL, "fontweight": "bold"}
        axes.text(*place, classes[i], bbox=ring, **style)


def _spread(points, distance):
    """Places for labels: `points` [n, 2] pushed apart until neighbours are about `distance` apart."""
    for _ in range(200):
        offsets = points[:, None] - points[None]
        gaps = np.linalg.norm(offsets, axis=-1, keepdims=True)
        directions = np.divide(offsets, gaps, out=np.zeros_like(offsets), where=gaps > 0)
        points = points + 0.25 * np.sum(directions * np.maximum(distance - gaps, 0), axis=1)
    return points


def active_units(runs):
    """Histogram of log10 Var_x(E[z|x]) over latent units, a panel per run and stochastic layer.

    Reads split, unit_variance_1 [d_1], unit_variance_2 [d_2], ... (nearest the data first) and active_threshold.
    """
    caption = f"Variance over {canvas.split_of(runs)} images, per latent unit. Dark: active. "
    caption += "The first bin also holds what is lower."
    figure, panels = _layer_panels(runs, "unit_variance", "Active latent units", caption, 2.6, sharex=True, sharey=True)
    highest = max(variance.max() for *_, variance in panels)
    for axes, run, layer, variance in panels:
        threshold = float(runs[run]["active_threshold"])
        _variance_histogram(axes, variance, threshold, highest)
        active = np.count_nonzero(variance > threshold)
        canvas.name_panel(axes, run, len(runs), f"{layer}{active} of {len(variance)} active")
    return figure


def _variance_histogram(axes, variance, threshold, highest):
    """log10 of the variances [d] from three decades below the threshold to the highest, and the threshold."""
    # The threshold is an edge between two bins, so that no bar holds both kinds of unit.
    below, above = 12, np.ceil(4 * np.log10(max(highest / threshold, 10))) + 1
    edges = np.log10(threshold) + np.arange(-below, above + 1) / 4
    # Estimates of dead units may be negative: fmax puts their nan into the first bin.
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.fmax(np.log10(variance), edges[0])
    bars = axes.hist(drawn, bins=edges, color=PALETTE[0])[2]
    for bar in bars[:below]:
        bar.set_facecolor("0.7")
    colour = PALETTE[4]
    axes.axvline(np.log10(threshold), color=colour, linewidth=1.6)
    place = {"xy": (np.log10(threshold), 1), "xycoords": ("data", "axes fraction")}
    place |= {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(f"threshold {threshold:g}", color=colour, fontsize=SMALL, **place)
    axes.margins(y=0.25)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.label_axes(axes, "log₁₀ Var(E[z | x])", "latent units")


def _layer_panels(runs, name, title, caption, height, **subplots):
    """A Figure and, of each run and stochastic layer, (panel, run, "layer l: " if a run has several, array name_l)."""
    names = [f"{name}_{layer}" for layer in range(1, 100)]
    layers = {run: [arrays[name] for name in names if name in arrays] for run, arrays in runs.items()}
    rows, panels = max(map(len, layers.values())), []
    figure, columns = canvas.panels_of(runs, title, caption, height, rows, **subplots)
    for column, (run, values) in zip(columns, layers.items(), strict=True):
        for layer, (axes, value) in enumerate(zip(column, values, strict=False), 1):
            panels.append((axes, run, f"layer {layer}: " if rows > 1 else "", value))
        for axes in column[len(values) :]:
            axes.remove()
    return figure, panels


def weights(runs):
    """What hidden units look at and what they draw: an image of weights per unit, largest norm first.

    Reads image_shape [2], encoder_weights [features, h] (first layer), decoder_weights [h, features] (last).
    """
    encoders = {run: arrays["encoder_weights"].T for run, arrays in runs.items()}
    decoders = {run: arrays["decoder_weights"] for run, arrays in runs.items()}
    rows, styles = [], []
    for name, units_of in (("encoder, first layer", encoders), ("decoder, last layer", decoders)):
        rows.append({})
        for run, units in units_of.items():
            largest = units[np.argsort(-np.linalg.norm(units, axis=1), kind="stable")[:MAX_TILES]]
            rows[-1][run] = largest, f"{name}: {len(largest)} of {len(units)}"
        limit = max(np.quantile(np.abs(units), 0.995) for units in units_of.values())
        styles.append({"cmap": "RdBu_r", "vmin": -limit, "vmax": limit})
    caption = "One image per hidden unit: its weights from or to the pixels. Units in the order of their norm."
    title = "Weights of the first and the last layer"
    figure, panels = canvas.tile_figure(title, caption, canvas.image_shape_of(runs), WIDTH - 0.9, rows, styles)
    for row, style in zip(panels.T, styles, strict=True):
        for axes in row:
            axes.set_facecolor("0.7")  # the middle of the colour scale is white, as the gaps would be
        ticks = [style["vmin"], 0, style["vmax"]]
        place = {"ax": row.tolist(), "aspect": 30, "pad": 0.01, "extend": "both"}
        bar = figure.colorbar(row[0].images[0], ticks=ticks, format="{x:.2g}", **place)
        bar.set_label("weight", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    return figure


def log_likelihoods(runs):
    """Histogram of the estimates of log p(x) (nats) over images, their mean, and the images at both ends, run by run.

    Reads split, image_shape [2], log_likelihoods [n], k_evaluation, extreme_x_mean [2 e, features]: lowest e, highest.
    """
    pooled = np.float64(np.concatenate([arrays["log_likelihoods"] for arrays in runs.values()]))
    edges = np.histogram_bin_edges(pooled, bins=60)
    caption = (
        "Line: the mean, ± one standard error over the images. Below: the images of lowest and of highest estimate."
    )
    caption += " Runs share the images: judge them by their paired difference." * (len(runs) > 1)
    shape = canvas.image_shape_of(runs)
    figure = canvas.new_figure(f"Log-likelihood of each {canvas.split_of(runs)} image", caption, 1 + 2.5 * len(runs))
    panels = figure.subplots(2 * len(runs), height_ratios=[1, 0.32] * len(runs))
    for i, (axes, below, (run, arrays)) in enumerate(zip(panels[0::2], panels[1::2], runs.items(), strict=True)):
        values, extremes = arrays["log_likelihoods"], arrays["extreme_x_mean"]
        error = values.std(ddof=1) / np.sqrt(len(values))
        axes.hist(values, bins=edges, color=PALETTE[i % 10], alpha=0.75)
        axes.axvline(values.mean(), color="black", linewidth=1.6)
        axes.sharex(panels[0])
        axes.sharey(panels[0])
        mean = f"mean {canvas.number(values.mean())} ± {error:.2f} nats"
        canvas.label_axes(axes, "", "images")
        canvas.name_panel(axes, run, 1, f"{mean} ({len(values):,} images, k = {arrays['k_evaluation']})")
        canvas.draw_tiles(below, extremes, shape, len(extremes), **IMAGE_STYLE)
        middle = len(extremes) / 2
        below.axvline(middle - 0.03, color=PALETTE[i % 10], linewidth=3)
        below.set_xticks([0.5 * middle, 1.5 * middle], ["lowest", "highest"], fontsize=SMALL)
    panels[-2].set_xlabel("estimate of log p(x) by k importance samples (nats)", fontsize=TEXT)
    return figure


def unit_kl(runs):
    """Each latent unit's term of KL(q(z | x) || p(z)) in nats, largest first.

    Reads split, unit_kl_1 [d_1], unit_kl_2 [d_2], ... (nearest the data first).
    """
    caption = f"log q(z_i | ..) − log p(z_i | ..), means over {canvas.split_of(runs)} images. Units at 0 are not used "
    caption += "in the top layer; in a lower one the layer above predicts them."
    figure, panels = _layer_panels(runs, "unit_kl", "KL term of each latent unit", caption, 2.4, sharey=True)
    for axes, run, layer, units in panels:
        axes.bar(np.arange(1, len(units) + 1), np.sort(units)[::-1], color=PALETTE[0], width=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlim(0.4, len(units) + 0.6)
        canvas.label_axes(axes, "unit, by rank", "KL (nats)")
        canvas.name_panel(axes, run, len(runs), f"{layer}{canvas.number(units.sum(), 1)} nats")
    return figure


def interpolation(runs):
    """Decoder means on straight ways through z_1 between images, a row per pair, the images themselves at both ends.

    Reads image_shape [2], x_mean [n, features], interpolation [pairs, steps, features]: from image 0 to 1, 2 to 3, ...
    """
    pairs, steps, features = next(iter(runs.values()))["interpolation"].shape
    caption = (
        "First and last column: the images. Between them: decoder means at equal steps from E[z_1 | x] of the one "
        "to that of the other."
    )
    shape, columns = canvas.image_shape_of(runs), steps + 2
    height = 0.4 + pairs * canvas.cell_height(shape) * (WIDTH - 0.2) / canvas.columns_of(len(runs)) / columns
    figure, panels = canvas.panels_of(runs, "Interpolation through the latent space", caption, height)
    for (axes,), (run, arrays) in zip(panels, runs.items(), strict=True):
        ends = arrays["x_mean"][: 2 * pairs].reshape(pairs, 2, features)
        rows = np.concatenate([ends[:, :1], arrays["interpolation"], ends[:, 1:]], axis=1)
        canvas.draw_tiles(axes, rows.reshape(-1, features), shape, columns, **IMAGE_STYLE)
        canvas.name_panel(axes, run, len(runs))
    return figure


def nll_differences(runs):
    """Each run's negative log-likelihood (nats) less the first run's, on the same images, with its standard error.

    Reads log_likelihoods [n], k_evaluation.
    """
    first, arrays = next(iter(runs.items()))
    reference = np.float64(arrays["log_likelihoods"])
    differences = np.array([reference - arrays["log_likelihoods"] for arrays in runs.values()])
    means, errors = differences.mean(axis=1), differences.std(axis=1, ddof=1) / np.sqrt(len(reference))
    caption = f"NLL = −L_k, k = {arrays['k_evaluation']}, {len(reference):,} images. Bars: ± one standard error of the "
    caption += "paired difference over images; another seed would move the runs, too."
    title = canvas.broken(f"NLL minus that of {first}", 80)
    figure = canvas.new_figure(title, caption, 1.2 + 0.2 * title.count("\n") + 0.42 * len(runs))
    axes, rows = figure.subplots(), np.arange(len(runs))
    axes.axvline(0, color="0.7")
    axes.errorbar(means, rows, xerr=errors, linestyle="", marker="o", markersize=4, color=PALETTE[0], capsize=3)
    texts = [f"{mean:+.2f} ± {error:.2f}".replace("-", "−") for mean, error in zip(means, errors, strict=True)]
    texts[0] = f"NLL {-reference.mean():.2f}"
    for row, mean, text in zip(rows, means, texts, strict=True):
        style = {"ha": "center", "fontsize": SMALL, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
        axes.annotate(text, (mean, row), (0, 5), textcoords="offset points", **style)
    canvas.label_axes(axes, "NLL difference (nats): lower is better", "")
    axes.set_yticks(rows, [canvas.broken(run, 36) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.8)
    axes.margins(x=0.1)
    return figure


def importance_weights(runs):
    """Effective sample size, largest normalized weight and L_k against the number of samples k: means over images.

    Reads weight_k [c], effective_sample_size [c], largest_weight [c], bound [c], jackknife [c] (nats).
    """
    caption = (
        "Means over images. Grey: all weights equal, as if q(z | x) were the posterior. Dashed: the jackknife of L_k, "
        "no bound. Where it leaves L_k, more samples would raise L_k: by more than that, where few are effective."
    )
    figure = canvas.new_figure("Importance weights of k samples", caption, 8)
    panels = figure.subplots(3)
    for i, (run, arrays) in enumerate(runs.items()):
        k, ess, largest = (arrays[name] for name in ("weight_k", "effective_sample_size", "largest_weight"))
        last = f"{ess[-1]:.3g} effective samples, largest weight {largest[-1]:.2f} at k = {k[-1]}"
        label = canvas.legend_label(run, last)
        style = canvas.line_style(i)
        for axes, measure, equal in zip(panels[:2], (ess, largest), (k, 1 / k), strict=True):
            axes.plot(k, equal, color="0.7", linewidth=1.6)
            axes.plot(k, measure, label=label, **style)
        panels[2].plot(k, arrays["bound"], **style)
        panels[2].plot(k, arrays["jackknife"], linestyle=(0, (4, 2)), color=style["color"])
    names = {"effective sample size": "log", "largest normalized weight": "log", "L_k (nats)": "linear"}
    for axes, (name, scale) in zip(panels, names.items(), strict=True):
        axes.set(xscale="log", yscale=scale)
        canvas.label_axes(axes, "samples k", name)
    canvas.legend_above(panels[0])
    return figure


def gradient_snr(runs):
    """Signal-to-noise ratio of each estimator's gradient against k: length of its mean / root of its variance.

    Reads label [e], target [e], gradient_k [c], gradient_snr, gradient_snr_low and gradient_snr_high [e, 2, c]
    (encoder, decoder), replicates, gradient_images.
    """
    title, ylabel = "Signal-to-noise ratio of the gradient", "length of mean / root of variance"
    how = "Medians over images, with the notches of a box plot: medians whose bars do not overlap differ."
    figure, panels = _gradient_panels(runs, title, ylabel, how)
    for axes, arrays, part in panels:
        ratio, *ends = (arrays[f"gradient_snr{end}"][:, part] for end in ("", "_low", "_high"))
        _estimator_lines(axes, arrays, ratio, reach=np.abs(ends - ratio))
    return figure


def gradient_variance(runs):
    """Variance of each estimator's gradient against k, summed over parameters: medians over images.

    Reads label [e], target [e], gradient_k [c], gradient_variance [e, 2, c] (encoder, decoder), replicates,
    gradient_images.
    """
    ylabel = "variance, summed over parameters"
    figure, panels = _gradient_panels(runs, "Variance of the gradient", ylabel, "Medians over images.")
    for axes, arrays, part in panels:
        _estimator_lines(axes, arrays, arrays["gradient_variance"][:, part])
    return figure


def gradient_bias(runs):
    """Squared bias of the encoder's gradient, by estimators without a score term, against k: about 0 if there is none.

    Reads label [e], target [e], gradient_k [c], gradient_squared_bias [e, 2, c] (encoder, decoder), replicates,
    gradient_images.
    """
    title = "Bias of gradients without a score term: the unbiased scatter about 0"
    ylabel = "squared bias / squared length of the right mean"
    figure, panels = _gradient_panels(runs, title, ylabel, "Sums over images; lines within 0.01 are one.", ("encoder",))
    for axes, arrays, part in panels:
        axes.set_yscale("linear")
        axes.axhline(0, color="0.7")
        shown = arrays["target"] != np.arange(len(arrays["target"]))
        _estimator_lines(axes, arrays, np.where(shown[:, None], arrays["gradient_squared_bias"][:, part], np.nan), 0.01)
    return figure


def step_cost(runs):
    """Milliseconds of a training step with each estimator, a panel per run.

    Reads label [e], step_k, step_milliseconds [e].
    """
    k = next(iter(runs.values()))["step_k"]
    caption = f"Least of ten measurements in turns, of the compiled program that trains, k = {k}, on this machine."
    figure = canvas.new_figure("Cost of a training step", caption, 0.8 + 3.6 * len(runs))
    panels = figure.subplots(len(runs), squeeze=False)[:, 0]
    for axes, (run, arrays) in zip(panels, runs.items(), strict=True):
        bars = axes.barh(arrays["label"], arrays["step_milliseconds"], color=PALETTE[0])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=SMALL)
        axes.invert_yaxis()
        canvas.label_axes(axes, "milliseconds per step", "")
        canvas.name_panel(axes, run, 1)
    return figure


def _gradient_panels(runs, title, ylabel, how, parts=("encoder", "decoder")):
    """A Figure of measures against k, logarithmic axes, and its (panel, arrays of the run, index of the part)."""
    arrays, shown = next(iter(runs.values())), []
    caption = f"{arrays['replicates']} gradients of each of {arrays['gradient_images']} images. {how} "
    caption += (
        "Dashed: without a score term, in the colour of the estimator whose mean it should have. Equal lines are one."
    )
    figure = canvas.new_figure(title, caption, 0.7 + 4.4 * len(runs))
    panels = figure.subplots(len(runs), len(parts), squeeze=False)
    for row, (run, arrays) in zip(panels, runs.items(), strict=True):
        for i, (axes, part) in enumerate(zip(row, parts, strict=True)):
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(arrays["gradient_k"], arrays["gradient_k"])
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            canvas.label_axes(axes, "samples k", ylabel)
            canvas.name_panel(axes, run, 2, part)
            shown.append((axes, arrays, i))
    return figure, shown


def _estimator_lines(axes, arrays, values, same_within=0.0, reach=None):
    """A line per estimator, values [e, c] against gradient_k, named at its right end; equal lines are one.

    reach: [2, e, c], how far bars go below and above the values.
    """
    k, lines = arrays["gradient_k"], {}
    colours = dict(zip(np.unique(arrays["target"]), PALETTE, strict=False))
    for i in np.flatnonzero(np.isfinite(values).all(axis=1)):
        same = next((j for j in lines if np.allclose(values[j], values[i], 1e-3, same_within)), i)
        lines.setdefault(same, []).append(arrays["label"][i])
    if not lines:
        return
    for i in lines:
        style = "-" if arrays["target"][i] == i else (0, (4, 2))
        bars = {"elinewidth": 0.8, "yerr": None if reach is None else reach[:, i]}
        axes.errorbar(k, values[i], marker="o", markersize=3, ls=style, color=colours[arrays["target"][i]], **bars)
    axes.set_ylim(axes.get_ylim())
    ends = [(k[-1], max(values[i][-1], axes.get_ylim()[0])) for i in lines]  # a logarithm has no place for 0
    heights = axes.transAxes.inverted().transform(axes.transData.transform(ends))[:, 1]
    places = _apart(heights, min(0.14, 1 / len(lines)))
    for end, place, (i, names) in zip(ends, places, lines.items(), strict=True):
        leader = {"arrowstyle": "-", "color": colours[arrays["target"][i]], "relpos": (0, 0.5), "shrinkA": 0}
        style = {"textcoords": "axes fraction", "va": "center", "fontsize": SMALL, "arrowprops": leader}
        text = ", ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
        axes.annotate(textwrap.fill(text, 22), end, (1.08, place), **style)


def _apart(heights, gap):
    """Heights in [0, 1] moved so that any two are `gap` apart, in their order, and none is above 1."""
    order, steps = np.argsort(heights), gap * np.arange(len(heights))
    places = np.minimum(np.maximum.accumulate(heights[order] - steps), 1 - steps[-1]) + steps
    return places[np.argsort(order)]


def in_training(plot):
    """A function of runs that gives a plot as it was at each epoch that all runs kept: figures for an animation.

    Each array snapshot_..., with the epochs snapshot_epoch [e] on its first axis, takes the place of that of its name.
    """

    def frames(runs):
        figures = []
        for epoch in plotting_posterior.common_epochs(runs):
            then = {}
            for run, arrays in runs.items():
                at = arrays["snapshot_epoch"].tolist().index(epoch)
                kept = {name: arrays[f"snapshot_{name}"][at] for name in arrays if f"snapshot_{name}" in arrays}
                then[f"{run}, epoch {epoch}"] = {**arrays} | kept
            figures.append(plot(then))
        return figures

    return frames


PLOTS = {
    function.__name__: function
    for function in (
        training_curves,
        reconstructions,
        interpolation,
        prior_samples,
        plotting_posterior.posterior_side_by_side,
        plotting_posterior.posterior_of_one_input,
        plotting_posterior.manifold,
        plotting_posterior.aggregate_over_training,
        posterior_scatter,
        plotting_posterior.posterior_samples,
        active_units,
        unit_kl,
        weights,
        plotting_posterior.bound_against_k,
        plotting_posterior.log_weights,
        log_likelihoods,
    )
}

ANIMATIONS = {
    "prior_samples_in_training": in_training(prior_samples),
    "posterior_in_training": in_training(plotting_posterior.posterior_side_by_side),
}

# The array without which a plot has nothing to show: nets of two latent units have grids, some runs have snapshots.
NEEDS = dict.fromkeys(("posterior_side_by_side", "posterior_of_one_input", "manifold"), "grid_k")
NEEDS |= {"aggregate_over_training": "snapshot_posterior_samples"}
NEEDS |= {"prior_samples_in_training": "snapshot_epoch", "posterior_in_training": "snapshot_grid_k"}


def applicable(plots, runs):
    """The plots of a table for which every run has the arrays, of epochs that all have."""

    def drawn(name):
        needed = NEEDS.get(name, "")
        there = not needed or all(needed in arrays for arrays in runs.values())
        return there and (not needed.startswith("snapshot") or plotting_posterior.common_epochs(runs))

    return {name: plot for name, plot in plots.items() if drawn(name)}


COMPARISONS = {function.__name__: function for function in (nll_differences,)}

DIAGNOSTICS = {
    function.__name__: function
    for function in (importance_weights, gradient_snr, gradient_variance, gradient_bias, step_cost)
}
