"""Recipes for the schedule `fast`, judged on 10,000 training images that they are not trained on.

    python benchmarks/recipes.py [RUN ...] [--epochs 30] [--datasets_dir DIR] [--results_dir results]

The others, 49,600, are trained on, by the runs of RECIPES (all, if none is named). Each recipe is a run like any other,
in <results_dir>/held_out/: what is finished is not done again. Then a step of each is timed, in turns, and the runs'
tables are written between their markers in benchmarks/recipes.md.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np

import experiments
from datasets_download import load_dataset
from report import markdown_table, paired_difference, rewritten
from run_folder import whole_file, write_text
from runs import grey, read_results

PAGE = HERE / "recipes.md"
HELD_OUT = 10_000
RECIPES = {  # of each run first `fast` as it stands: what the others are compared with
    "dreg_l1_k5_fast": [
        {},
        {"rate_scale": 0.7},
        {"rate_scale": 1.4},
        {"output_rate": 4.0},
        {"output_rate": 16.0},
        {"output_rate": None},
        {"momentum": 0.9},
        {"batch": 200, "rate_scale": 0.7},
        {"batch": 100, "rate_scale": 0.125, "optimizer": "adam", "output_rate": None},
    ],
    "dreg_l2_k5_fast": [{}, {"rate_scale": 1.4}, {"output_rate": 4.0}, {"output_rate": 16.0}],
    "dreg_l1_k50_fast": [{}, {"backward_samples": 8}, {"backward_samples": None}],
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
        difference, error = paired_difference(results[0]["log_likelihoods"], results[i]["log_likelihoods"])
        compared = f"{difference:+.2f} ± {error:.2f}" if i else ""
        rows.append([recipe, f"{results[i]['nll']:.2f}", compared, f"{seconds[i]:.1f} s"])
    return markdown_table(["recipe", "NLL", "difference", "one pass"], rows)


def compare_recipes(name, options, data, path):
    """Train a run by each of its recipes that it is not trained by yet, and time a step of each: the table."""
    fixed = {"dataset": str(path), "binarization": "stochastic", "k_evaluation": 100, "plot": False}
    fixed |= {"epochs": options.epochs, "results_dir": options.results_dir}
    runs = {}
    for recipe in RECIPES[name]:
        overrides = fixed | recipe
        experiments.main([name, *(word for field, value in overrides.items() for word in (f"--{field}", str(value)))])
        ((run, parameters),) = experiments.resolve([name], overrides)
        runs[run] = replace(parameters, binarization="stochastic")
    results = [read_results(path.parent / f"{run}__seed0") for run in runs]
    seconds = pass_seconds(list(runs.values()), data.x_train[:-HELD_OUT])
    table = recipe_table(RECIPES[name], results, seconds)
    return f"`python benchmarks/recipes.py {name} --epochs {options.epochs}`\n\n{table}"


def main():
    """Train what is not trained yet, time a step of each, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--datasets_dir")
    parser.add_argument("--results_dir", default="results")
    options = parser.parse_args()
    if unknown := [name for name in options.runs if name not in RECIPES]:
        parser.error(f"unknown run {', '.join(unknown)}: one of {', '.join(RECIPES)}")
    data, path = load_dataset("mnist", options.datasets_dir), Path(options.results_dir) / "held_out" / "held_out.npz"
    if not path.exists():
        hold_out(data, path)
    for name in options.runs or RECIPES:
        table = compare_recipes(name, options, data, path)
        write_text(PAGE, rewritten(PAGE.read_text(), {name: table}))
        print(table)


if __name__ == "__main__":
    main()
