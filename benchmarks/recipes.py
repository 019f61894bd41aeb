"""Recipes for the schedule `fast`, judged on 10,000 training images that they are not trained on.

    python benchmarks/recipes.py [TABLE ...] [--datasets_dir DIR] [--results_dir results]

The others, 49,600, are trained on, by the recipes of each table of RECIPES (all, if none is named). Each recipe is a
run like any other, in <results_dir>/held_out/: what is finished is not done again. Then a step of each is timed, in
turns, and the tables are written between their markers in benchmarks/recipes.md.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np

import experiments
from comparison import markdown_table, paired
from datasets_download import grey, load_dataset
from report import rewritten
from run_folder import whole_file, write_text
from runs import read_results

PAGE = HERE / "recipes.md"
HELD_OUT = 10_000
RECIPES = {  # tables, by run and passes: first `fast` as it stands, what the others are compared with
    "dreg_l1_k5_fast__epochs30": [
        {},
        {"rate_scale": 0.7},
        {"rate_scale": 1.4},
        {"output_rate": 4.0},
        {"output_rate": 16.0},
        {"output_rate": None},
        {"momentum": 0.9},
        {"batch": 200, "rate_scale": 0.7},
        {"batch": 100, "rate_scale": 0.125, "optimizer": "adam", "output_rate": None},
        {"ema": 0.99},
        {"ema": 0.0},
        {"objective": "iwae"},
    ],
    "dreg_l1_k5_fast__epochs130": [{}, {"rate_scale": 1.4}],
    "dreg_l2_k5_fast__epochs30": [{}, {"rate_scale": 1.4}, {"output_rate": 4.0}, {"output_rate": 16.0}],
    "dreg_l1_k50_fast__epochs20": [{}, {"backward_samples": 8}, {"backward_samples": None}],
    "iwae_l1_k50_fast__epochs20": [{}, {"backward_samples": None}],
}


def hold_out(data, path):
    """Write training images alone as a data set: the last 10,000 are its test images."""
    kept = len(data.x_train) - HELD_OUT
    parts = {"x_train": data.x_train[:kept], "x_test": data.x_train[kept:], "x_validation": data.x_validation}
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **{name: x.reshape(-1, *data.image_shape) for name, x in parts.items()})


def pass_seconds(runs, x_train):
    """Seconds of a pass over the training images of each run, [Parameters]: an array [runs]."""
    from models import Autoencoder
    from training import step_milliseconds

    model = Autoencoder(grey(x_train).mean(axis=0), runs[0].latent_units, runs[0].hidden_units)
    return step_milliseconds(model, x_train, runs) / 1000 * [len(x_train) // run.batch for run in runs]


def recipe_table(recipes, results, seconds):
    """Markdown: a row for each of a run's recipes, the lowest NLL first. results, seconds: of each."""
    rows = []
    for i in np.argsort([r["nll"] for r in results]):
        recipe = ", ".join(f"`{name}={value!r}`" for name, value in recipes[i].items()) or "as it stands"
        rows.append([recipe, f"{results[i]['nll']:.2f}", paired(results[0], results[i]), f"{seconds[i]:.1f} s"])
    return markdown_table(["recipe", "NLL", "difference", "one pass"], rows)


def compare_recipes(title, data, path):
    """Train by each recipe of a table that is not trained by yet, and time a step of each: the table."""
    name, epochs = title.split("__epochs")
    fixed = {"dataset": str(path), "binarization": "stochastic", "k_evaluation": 100, "plot": False}
    fixed |= {"epochs": int(epochs), "results_dir": str(path.parents[1])}
    runs = {}
    for recipe in RECIPES[title]:
        overrides = fixed | recipe
        experiments.main([name, *(word for field, value in overrides.items() for word in (f"--{field}", str(value)))])
        ((run, parameters),) = experiments.resolve([name], overrides)
        runs[run] = replace(parameters, binarization="stochastic")
    results = [read_results(path.parent / f"{run}__seed0") for run in runs]
    seconds = pass_seconds(list(runs.values()), data.x_train[:-HELD_OUT])
    return f"`python benchmarks/recipes.py {title}`\n\n{recipe_table(RECIPES[title], results, seconds)}"


def main():
    """Train what is not trained yet, time a step of each, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--datasets_dir")
    parser.add_argument("--results_dir", default="results")
    options = parser.parse_args()
    if unknown := [title for title in options.tables if title not in RECIPES]:
        parser.error(f"unknown table {', '.join(unknown)}: one of {', '.join(RECIPES)}")
    data, path = load_dataset("mnist", options.datasets_dir), Path(options.results_dir) / "held_out" / "held_out.npz"
    if not path.exists():
        hold_out(data, path)
    for title in options.tables or RECIPES:
        table = compare_recipes(title, data, path)
        write_text(PAGE, rewritten(PAGE, {title: table}))
        print(table)


if __name__ == "__main__":
    main()
