"""Recipes for the schedule `fast`, judged on 10,000 training images that they are not trained on.

    python benchmarks/recipes.py [--epochs 30] [--datasets_dir DIR] [--results_dir results]

The others, 49,600, are trained on, by `dreg` with one layer and k = 5; NLL is L_100. Each recipe is a run like any
other in <results_dir>/held_out/: what is finished is not done again. Prints all that are, the lowest NLL first.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import experiments
from datasets_download import load_dataset
from report import comparison_table
from run_folder import whole_file
from runs import read_results

HELD_OUT = 10_000
FIXED = "dreg_l1_k5_fast --binarization stochastic --k_evaluation 100 --plot false"
RECIPES = [
    "",  # `fast` as it stands: what the others are compared with
    "--rate_scale 1.4",
    "--rate_scale 2",
    "--rate_scale 2.8",
    "--rate_scale 2 --ema 0.99",
    "--rate_scale 2 --ema 0.999",
    "--rate_scale 2 --momentum 0.9",
    "--rate_scale 2 --batch 50",
    "--rate_scale 2.8 --batch 200",
    "--rate_scale 5 --schedule quick",  # no warm-up, one line from 0.005 to 0
    "--optimizer adam",
    "--optimizer adam --rate_scale 0.5",
]


def hold_out(data, path):
    """Write training images alone as a data set: the last 10,000 are its test images."""
    kept = len(data.x_train) - HELD_OUT
    parts = {"x_train": data.x_train[:kept], "x_test": data.x_train[kept:], "x_validation": data.x_validation}
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **{name: x.reshape(-1, *data.image_shape) for name, x in parts.items()})


def main():
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--datasets_dir")
    parser.add_argument("--results_dir", default="results")
    options = parser.parse_args()
    place = Path(options.results_dir) / "held_out"
    path = place / "held_out.npz"
    if not path.exists():
        hold_out(load_dataset("mnist", options.datasets_dir), path)
    given = f"{FIXED} --dataset {path} --epochs {options.epochs} --results_dir {options.results_dir}"
    for recipe in RECIPES:
        experiments.main([*given.split(), *recipe.split()])
    finished = [path.parent for path in place.glob(f"*__epochs{options.epochs}__*/results.json")]
    results = sorted(((folder.name, read_results(folder)) for folder in finished), key=lambda run: run[1]["nll"])
    first = min(results, key=lambda run: len(run[0]))
    print(comparison_table(dict([first, *results])))


if __name__ == "__main__":
    main()
