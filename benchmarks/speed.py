"""How long a training step takes, beside plain JAX and PyTorch steps of the same model, measured in one sitting.

    python benchmarks/speed.py [--quick] [--json FILE]

Contenders take turns, several rounds; figures are medians. JAX and PyTorch take part where they are installed
(benchmarks/requirements.txt). Writes benchmarks/README.md and benchmarks/time_per_step.png; with --quick prints alone.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from evaluation import log_likelihood
from experiments import NETS, Parameters
from models import Autoencoder
from report import markdown_table
from training import build_optimizer, compile_stretch

BATCH, FEATURES, IMAGES = 20, 784, 60_000
CELLS = [(layers, k) for layers in NETS for k in (1, 5, 50)]
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # k of the figure
SQUARE = 4000  # rows of the matrix product that stands for the machine's peak
REFERENCES = {"JAX": "reference_jax", "PyTorch": "reference_torch"}


def make_images():
    """Noise that is black for the most part, as MNIST is: [n, features] uint8."""
    return np.uint8(255 * np.random.default_rng(0).random((IMAGES // 10, FEATURES)) ** 4)


def our_run(images, latent_units, hidden_units, k, **fields):
    """A function of a number of steps that takes so many of the very program that experiments.py trains with."""
    parameters = Parameters(k=k, batch=BATCH, binarization="stochastic")
    parameters = replace(parameters, latent_units=latent_units, hidden_units=hidden_units, **fields)
    model = Autoencoder(images.mean(axis=0) / 255, latent_units, hidden_units)
    stretch = compile_stretch(model, build_optimizer(parameters, model), tf.constant(images), parameters, k)
    order = np.random.default_rng(0).permutation(len(images)).astype(np.int32).reshape(-1, BATCH)
    rates, seed = np.full(len(order), 1e-3, np.float32), np.int32([0, 1])
    return lambda steps: stretch(order, rates, seed, 0, steps).numpy()


def square_run():
    """A function of a number of times that multiplies two large square matrices so often."""
    a = tf.random.normal([SQUARE, SQUARE])
    product = tf.function(lambda: tf.reduce_sum(tf.matmul(a, a)[0]))
    return lambda times: [product().numpy() for _ in range(times)]


def products(layers, k):
    """Floating-point operations of the matrix products of one step: 2 forward, 4 backward per weight and row."""
    latent_units, hidden_units = NETS[layers]
    total, below = 0, FEATURES
    for layer, (hidden, units) in enumerate(zip(hidden_units, latent_units, strict=True)):
        sizes = [below, *hidden]
        inner = sum(a * b for a, b in zip(sizes[1:-1], sizes[2:], strict=True)) + 2 * hidden[-1] * units
        rows = BATCH * (k if layer else 1)
        total += rows * ((6 if layer else 4) * below * hidden[0] + 6 * inner)  # the image itself needs no gradient
        outputs = below * (2 if layer else 1)
        up = [units, *hidden[::-1]]
        total += k * BATCH * 6 * (sum(a * b for a, b in zip(up[:-1], up[1:], strict=True)) + up[-1] * outputs)
        below = units
    return total


def measure(runs, rounds, seconds):
    """Median seconds per step of each of {name: run}, which take turns; each turn lasts about `seconds`."""
    steps, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        run(1)  # compiles
        start = time.perf_counter()
        run(2)
        steps[name] = int(np.clip(seconds / (time.perf_counter() - start) * 2, 2, IMAGES // 10 // BATCH))
        run(steps[name])
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(steps[name])
            times[name].append((time.perf_counter() - start) / steps[name])
    return {name: float(np.median(values)) for name, values in times.items()}


def contenders():
    """{name: function of (images, latent_units, hidden_units, k) that makes a run}: ours, and what is installed."""
    found = {"ours": our_run}
    for name, module in REFERENCES.items():
        try:
            found[name] = partial(importlib.import_module(module).make_run, batch=BATCH)
        except ImportError as error:
            print(f"{name} takes no part: {error}")
    return found


def step_times(images, rounds, seconds):
    """Median milliseconds per step, {(contender, layers, k): ms}, and the peak in GFLOP/s of the same sitting."""
    runs = {"square": square_run()}
    for name, make_run in contenders().items():
        runs |= {(name, layers, k): make_run(images, *NETS[layers], k) for layers, k in CELLS}
    runs["subsampled"] = our_run(images, *NETS[1], 50, backward_samples=8)
    times = measure(runs, rounds, seconds)
    peak = 2 * SQUARE**3 / times.pop("square") / 1e9
    return {name: 1000 * value for name, value in times.items()}, peak


def step_table(times, peak):
    """Markdown: a row for each net and k, a column for each contender, our ratio to it, our share of the peak."""
    names = list(dict.fromkeys(key[0] for key in times if key != "subsampled"))
    header = ["net", *[f"{name}, ms" for name in names], *[f"ours / {name}" for name in names[1:]], "share of peak"]
    rows = []
    for layers, k in CELLS:
        ours, *others = [times[name, layers, k] for name in names]
        share = products(layers, k) / (ours / 1000) / (peak * 1e9)
        cells = [f"{ms:.2f}" for ms in (ours, *others)] + [f"{ours / other:.2f}" for other in others]
        rows.append([f"{layers} layer{'s' * (layers > 1)}, k = {k}", *cells, f"{share:.0%}"])
    return markdown_table(header, rows)


def likelihood_seconds(images, k=500, n=1000):
    """Seconds that L_5000 of 10,000 images takes, extrapolated from n images and k samples."""
    model = Autoencoder(images.mean(axis=0) / 255, *NETS[1])
    x = np.float32(images[:n] > 127)
    seconds = []
    for samples in (k, 2 * k):  # the difference is free of the compilation
        start = time.perf_counter()
        log_likelihood(model, x, samples)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) * (5000 / k) * (10_000 / n)


START_UP = """
import time
start = time.perf_counter()
from speed import make_images, our_run, NETS
imported = time.perf_counter()
run = our_run(make_images(), *NETS[1], 5)
run(1)
first = time.perf_counter()
run(1)
print(imported - start, first - imported, time.perf_counter() - first)
"""


def start_up():
    """Seconds of a new process: imports, net and compilation with the first step, a second step."""
    done = subprocess.run([sys.executable, "-c", START_UP], cwd=HERE, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()[-3:]]


def curve_figure(ms):
    """Time per step against k; {(layers, k): ms}."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for layers, colour in zip(NETS, ("#332288", "#CC6677"), strict=True):
        values = [ms[layers, k] for k in CURVE]
        axes.loglog(CURVE, values, "o-", color=colour, label=f"{layers} stochastic layer{'s' * (layers > 1)}")
        axes.loglog(CURVE, [values[-1] * k / CURVE[-1] for k in CURVE], ":", color=colour, linewidth=1)
    axes.set(
        xlabel="k", ylabel="milliseconds per step", title=f"Training step, batch {BATCH}; dotted: proportional to k"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute; prints, and writes no table")
    parser.add_argument("--json", metavar="FILE", help="write the medians of our step, in ms, to a file")
    options = parser.parse_args()
    images = make_images()
    times, peak = step_times(images, *((3, 0.1) if options.quick else (9, 0.5)))
    table = step_table(times, peak)
    print(table)
    if options.json:
        medians = {f"l{layers}_k{k}": round(times["ours", layers, k], 4) for layers, k in CELLS}
        Path(options.json).write_text(json.dumps(medians, indent=2) + "\n")
    if options.quick:
        return
    curve = {(layers, k): our_run(images, *NETS[layers], k) for layers in NETS for k in CURVE}
    curve_figure({key: 1000 * s for key, s in measure(curve, 5, 0.2).items()}).savefig(HERE / "time_per_step.png")
    imported, compiled, step = start_up()
    subsampled = times["subsampled"]
    text = f"""# Speed

`python benchmarks/speed.py`, with the packages of `benchmarks/requirements.txt`: {os.cpu_count()} cores ({machine()}),
TensorFlow {tf.__version__}, batch {BATCH}, medians. Times change with the machine: the ratios, measured in one sitting,
count.

{table}

Share of peak: matrix products of the step against a product of two square matrices of {SQUARE:,} rows,
{peak:.0f} GFLOP/s.

- `backward_samples=8`, k = 50, one layer: {subsampled:.2f} ms, {subsampled / times["ours", 1, 50]:.2f} of a full step.
- L_5000 of 10,000 images, one layer: {likelihood_seconds(images):.0f} s (extrapolated from 1,000 images, k = 500).
- Start: imports {imported:.1f} s; net, compilation, first step {compiled:.1f} s; then {1000 * step:.1f} ms a step.

![Time per step against k](time_per_step.png)
"""
    (HERE / "README.md").write_text(text)


def machine():
    """The processor's name, where the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
