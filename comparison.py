"""Runs side by side, without TensorFlow: paired differences, tables in Markdown, comparison.md and its figures."""

import sys
from pathlib import Path

import numpy as np

from run_folder import lock, write_text
from runs import draw, read_arrays, read_results


def paired_difference(a, b):
    """Mean of a - b over the same images and its standard error: two floats, nats. a, b: [n] log-likelihoods."""
    difference = np.float64(a) - b
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def paired(first, other):
    """NLL of a run less that of the first, paired, ± its standard error; nothing for the first itself."""
    difference, error = paired_difference(first["log_likelihoods"], other["log_likelihoods"])
    return f"{difference:+.2f} ± {error:.2f}" if other is not first else ""


def comparison_table(results):
    """Markdown table of runs evaluated on the same images, each with its paired difference to the first; its caption.

    results: {run: contents of results.json, with log_likelihoods [n]}. Raises ValueError where they were evaluated
    with different k, on another split or other images: their figures cannot stand side by side.
    """
    ways = ("k_evaluation", "split", "dataset", "units", "evaluated")
    evaluations = {(len(r["log_likelihoods"]), *(r[name] for name in ways)) for r in results.values()}
    if len(evaluations) > 1:
        raise ValueError(f"runs evaluated in different ways: (images, {', '.join(ways)}) = {evaluations}")
    n, k, split, dataset, units, _ = evaluations.pop()
    title = f"NLL = -L_{k} in nats on {n:,} {split} images of {dataset}, ± standard error over the images"
    title += ", without the units that are not active" * (units == "active") + "; difference: "
    title += "paired, to the first run, on the same images and the same binarisation draw, ± its standard error."
    header = ["run", "objective", "k", "NLL", "ELBO", "active units", "NLL difference", "training"]
    rows, first = [], next(iter(results.values()))
    for run, r in results.items():
        active, training = "+".join(map(str, r["active_units"])), f"{r['train_seconds'] / 60:.1f} min"
        nll = f"{r['nll']:.2f} ± {r['nll_standard_error']:.2f}"
        measured = [nll, f"{r['elbo']:.2f}", active, paired(first, r), training]
        rows.append([run, r["objective"], str(r["k"]), *measured])
    return markdown_table(header, rows), title


def compare(runs):
    """Print runs of one data set side by side, and write comparison.md and its figures beside their folders."""
    from plotting import COMPARISONS, DIAGNOSTICS, PLOTS

    place, results = runs[0].folder.parent, {run.label: read_results(run.results) for run in runs}
    try:
        table = "\n\n".join(comparison_table({label.partition("/")[2]: r for label, r in results.items()}))
    except ValueError as error:
        sys.exit(f"experiments.py: {error}")
    text = f"# Runs on {place.name}\n\n{table}\n"
    print(f"\n{table}\n")
    with lock(place, inside=[".", "comparison"], wait=True):
        for file, plots in (("arrays.npz", COMPARISONS | PLOTS), ("diagnostics.npz", DIAGNOSTICS)):
            paths = {run.label: run.results / "figures" / file for run in runs}
            if not all(path.exists() for path in paths.values()):
                continue
            arrays = {label: read_arrays(path) for label, path in paths.items()}
            if not all(of_evaluation(arrays[label], r) for label, r in results.items()):
                print("comparison: figures of these runs are of other evaluations: draw them by --plot true")
                continue
            made = draw(arrays, place / "comparison", plots)
            text += "".join(f"\n![{Path(name).stem.replace('_', ' ')}](comparison/{name})\n" for name in made)
        write_text(place / "comparison.md", text)
    print(f"comparison: {place}/comparison.md")


def of_evaluation(arrays, results):
    """Whether arrays of figures hold the likelihoods of an evaluation, or none."""
    likelihoods = results["log_likelihoods"]
    return np.array_equal(arrays.get("log_likelihoods", likelihoods), likelihoods)


def markdown_table(header, rows):
    """Lines of a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
