"""What looking at every value, and keeping checkpoints, cost of training time (MNIST or its sample, k = 5).

    python benchmarks/overhead.py [--repetitions 20] [--datasets_dir DIR]

A fifth of an epoch, all that is done around it, and a checkpoint take turns; figures are medians.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from timeit import timeit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from experiments import Parameters
from models import Autoencoder
from optimizers import build_optimizer
from run_folder import SECONDS_BETWEEN_CHECKPOINTS
from runs import load_data
from schedules import epoch_inputs, plan_epochs
from training import STRETCHES_PER_EPOCH, Progress, compile_stretches, resume, run_stretch


def main():
    """Measure, and print a line for each cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--datasets_dir")
    options, parameters = parser.parse_args(), Parameters(binarization="stochastic")
    x, plan = load_data(Parameters(datasets_dir=options.datasets_dir)).x_train, plan_epochs(parameters)[:1]
    model = Autoencoder(x.mean(axis=0) / 255, parameters.latent_units, parameters.hidden_units)
    optimizer, inputs = build_optimizer(parameters, model), epoch_inputs(plan[0], len(x), parameters)
    (stretch,) = compile_stretches(model, optimizer, x, parameters, plan).values()
    variables, last = model.variables + optimizer.variables, np.int32(len(inputs[1]) // STRETCHES_PER_EPOCH)
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=True) as bar:
        checkpoints, _ = resume(model, optimizer, Path(folder))
        ways = {
            "bare": lambda _: float(stretch(*inputs, np.int32(0), last)),
            "checks": lambda _: run_stretch(lambda *_: 0.0, inputs, Progress(), variables, bar),  # all but the steps
            "saved": lambda number: checkpoints.save(f"{number:05d}-0"),
        }
        rounds = [
            {name: timeit(partial(way, number), number=1) for name, way in ways.items()}
            for number in range(options.repetitions)
        ]
    bare, checks, saved = (np.median([each[name] for each in rounds[1:]]) for name in ways)  # the first compiles
    print(f"checks: {1000 * checks:.1f} ms of {bare:.2f} s: {checks / bare:.2%}")
    share = saved / SECONDS_BETWEEN_CHECKPOINTS
    print(f"checkpoints: {1000 * saved:.1f} ms each {SECONDS_BETWEEN_CHECKPOINTS} s: {share:.2%}")


if __name__ == "__main__":
    main()
