"""What all figures share: sizes and colours, figures and their panels, labels, tiles of images, PNG files."""

import math
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

WIDTH = 8.3  # inches: a README shows about 830 pixels, so that an inch is 100 of them
DPI = 160
TITLE, TEXT, SMALL = 12, 10, 9  # font sizes in points
# Colours of runs and digits: Paul Tol's "muted" scheme, safe for colour-blind readers, and black as tenth.
PALETTE = "#332288 #CC6677 #117733 #88CCEE #882255 #DDCC77 #44AA99 #999933 #AA4499 #000000".split()
IMAGE_STYLE = {"cmap": "gray", "vmin": 0, "vmax": 1}


def new_figure(title, caption, height):
    """An empty Figure of README width with its title above and its caption below."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, 125), x=0.01, ha="left", fontsize=SMALL, color="0.35")
    return figure


def columns_of(count):
    """How many of `count` panels stand side by side: at most three, and rows as even as can be."""
    return math.ceil(count / math.ceil(count / 3))


def panels_of(runs, title, caption, height, rows=1, **subplots):
    """A Figure and its panels [run, rows]: runs side by side, each with `rows` panels of `height` inches.

    Names that take more lines than one make them higher: the layout would else take these lines from the caption's.
    """
    columns = columns_of(len(runs))
    blocks = math.ceil(len(runs) / columns)
    lines = max(panel_name(run, len(runs)).count("\n") for run in runs)
    figure = new_figure(title, caption, 0.6 + (height + 0.2 * lines) * rows * blocks)
    grid = figure.subplots(blocks * rows, columns, squeeze=False, **subplots)
    panels = grid.reshape(blocks, rows, columns).swapaxes(1, 2).reshape(-1, rows)
    for axes in panels[len(runs) :].flat:
        axes.remove()
    return figure, panels[: len(runs)]


def broken(run, width):
    """A run's name in lines of at most so many characters, broken where its parts meet."""
    return textwrap.fill(run.replace("__", "__ "), width).replace("__ ", "__")


def legend_label(run, numbers):
    """A run's name and what is to be said of it, in as many lines as they need."""
    return broken(run, 95) + (": " if len(run) < 45 else ":\n") + numbers


def legend_above(axes):
    """A legend above a panel, for whose lines the figure grows: the panel keeps its height."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=SMALL, borderaxespad=0.2)
    lines = "\n".join(axes.get_legend_handles_labels()[1]).count("\n") + 1
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.2 * lines)


def panel_name(run, count):
    """The run's name, broken where its parts meet if `count` panels leave no room for it."""
    return broken(run, 90 // columns_of(count))


def name_panel(axes, run, count, text=""):
    """The run's name above its panel, and a text below it; smaller where the name takes several lines."""
    name = panel_name(run, count)
    axes.set_title(f"{name}\n{text}".strip(), loc="left", fontsize=SMALL if "\n" in name else TEXT)


def name_row(row, run, titles):
    """The run's name over a row of panels, above their titles, which leave a line for it."""
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(f"\n{title}", loc="left", fontsize=SMALL)
    style = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom", "fontsize": TEXT}
    lines = titles[0].count("\n") + 1
    # Not in the layout, which would widen the first panel's column for it.
    row[0].annotate(broken(run, 100), (0, 1), (0, 4 + 11 * lines), **style).set_in_layout(False)


def line_style(i):
    """Colour and marker of the i-th line: no two of 30 are alike."""
    return {"color": PALETTE[i % 10], "marker": "os^"[i // 10 % 3], "markersize": 4}


def label_axes(axes, xlabel, ylabel):
    """Axis labels and ticks in the sizes of this file, without the frame's upper and right side."""
    axes.set_xlabel(xlabel, fontsize=TEXT)
    axes.set_ylabel(ylabel, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL, labelbottom=True, labelleft=True)
    axes.spines[["top", "right"]].set_visible(False)


def number(value, decimals=2):
    """A number with the same long minus sign as those on the axes."""
    return f"{value:.{decimals}f}".replace("-", "−")


def split_of(runs):
    """Which images the runs were evaluated on, the same for all: training, validation or test."""
    return str(next(iter(runs.values()))["split"]).replace("train", "training")


def image_shape_of(runs):
    """Rows and columns of an image, the same for all runs."""
    return next(iter(runs.values()))["image_shape"]


def cell_height(image_shape):
    """Height of a tile of width 1: the image's own, but rows of pixels (1, n) would be hairlines."""
    return np.clip(image_shape[0] / image_shape[1], 0.4, 2.5)


def draw_tiles(axes, images, image_shape, columns, top=0.0, **style):
    """Draws images [n, features] as tiles of width 1 in rows of `columns`, from `top` downwards; the axes end there."""
    height = cell_height(image_shape)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        extent = (column, column + 0.94, top + row * height + 0.94 * height, top + row * height)
        axes.imshow(image.reshape(image_shape), extent=extent, interpolation="nearest", **style)
    bottom = top + height * math.ceil(len(images) / columns)
    axes.set(xlim=(0, columns), ylim=(bottom, 0), xticks=[], yticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_anchor("NW")  # else the layout misjudges the room for the labels of a panel of fixed aspect


def tile_figure(title, caption, image_shape, width, rows, styles):
    """A Figure of tile grids, a column per run, and its panels [run, row]; `width` inches hold the grids.

    rows: a list of {run: (images [n, features], text below the run's name)}; styles: one for each row.
    """
    runs = list(rows[0])
    cells = [cell for row in rows for cell in row.values()]
    most = max(len(images) for images, _ in cells)
    columns = min(most, 20 if len(runs) == 1 else 10)
    bottom = math.ceil(most / columns) * cell_height(image_shape)
    heading = 0.1 + 0.28 * any(text for _, text in cells)
    height = heading + max(0.6, bottom * width / columns_of(len(runs)) / columns)
    figure, panels = panels_of(runs, title, caption, height, len(rows))
    for row, style, column in zip(rows, styles, panels.T, strict=True):
        for axes, (run, (images, text)) in zip(column, row.items(), strict=True):
            draw_tiles(axes, images, image_shape, columns, **style)
            axes.set_ylim(bottom, 0)  # the same for all runs
            name_panel(axes, run, len(runs), text)
    return figure, panels


def classes_of(runs):
    """The classes that the labels of all runs name; none where there are no labels, or more classes than colours."""
    classes = np.unique(np.concatenate([arrays["labels"] for arrays in runs.values()]))
    return classes[:0] if classes[0] < 0 or len(classes) > len(PALETTE) else classes


def scatter_classes(axes, points, labels, classes, reach):
    """Points [s, 2] in the colours of their classes, on square axes that reach so far from 0."""
    colours = np.take(PALETTE, np.searchsorted(classes, labels)) if len(classes) else PALETTE[0]
    axes.scatter(*points.T, s=4, c=colours, alpha=0.4, linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", anchor="NW")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def class_legend(place, classes, **where):
    """The colour of each class, in a figure or panel."""
    style = {"marker": "o", "linestyle": ""}
    dots = [Line2D([], [], color=c, label=n, **style) for n, c in zip(classes, PALETTE, strict=False)]
    if dots:
        place.legend(handles=dots, frameon=False, fontsize=SMALL, handletextpad=0, **where)


def projection_names(projection, shares, of=" of variance"):
    """The names of both axes: latent units, or principal components with their share [2] of the variance."""
    if str(projection) == "latent":
        return ["latent unit 1", "latent unit 2"]
    return [f"PCA {i} ({share:.0%}{of})" for i, share in enumerate(shares, 1)]


def save_figure(figure, path):
    """Writes a PNG about 1,300 pixels wide: the same bytes for the same figure."""
    # The layout creeps each time it is computed and a second PNG would differ: computed once, it stays.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


def save_animation(figures, path):
    """Writes figures of one size and kind as a GIF that goes on for ever, their panels where the last has them."""
    frames, last = [], figures[-1]
    last.draw_without_rendering()
    for figure in figures:
        figure.set_layout_engine("none")
        for axes, there in zip(figure.axes, last.axes, strict=True):
            axes.set_position(there.get_position(original=True))
        figure.set_dpi(100)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128))
    pauses = [800] * (len(frames) - 1) + [2400]  # milliseconds
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=pauses, loop=0)
