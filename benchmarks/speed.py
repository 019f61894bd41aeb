"""How long a training step takes, beside plain JAX and PyTorch steps of the same model, measured in one sitting.

    python benchmarks/speed.py [--quick] [--json FILE]

Contenders take turns, several rounds; figures are medians. JAX and PyTorch take part where they are installed
(benchmarks/requirements.txt). Writes benchmarks/README.md and benchmarks/time_per_step.png; with --quick prints alone.
"""

import argparse
import importlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from command_line import start_tensorflow

start_tensorflow()

import numpy as np
import tensorflow as tf

from canvas import PALETTE, label_axes, legend_above, new_figure, save_figure
from comparison import markdown_table
from evaluation import log_likelihood
from experiments import NETS, Parameters
from models import Autoencoder
from optimizers import build_optimizer
from training import compile_stretch

BATCH, FEATURES, IMAGES = 20, 784, 6000
DEPTHS = {"l1": "1 layer", "l2": "2 layers"}
CELLS = [(net, k) for net in DEPTHS for k in (1, 5, 50)]
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # k of the figure
SQUARE = 4000  # rows of the matrix product that stands for the machine's peak
# In the order of CELLS: the share of peak that is our step's goal, and the one that a JAX step had where that was set.
GOALS = (0.30, 0.50, 0.75, 0.30, 0.50, 0.75)
JAX_SHARES = (0.26, 0.43, 0.65, 0.22, 0.35, 0.60)
REFERENCES = {"JAX": "reference_jax", "PyTorch": "reference_torch"}


def make_images():
    """Noise that is black for the most part, as MNIST is: [n, features] uint8."""
    return np.uint8(255 * np.random.default_rng(0).random((IMAGES, FEATURES)) ** 4)


def our_run(images, latent_units, hidden_units, k, batch=BATCH, **fields):
    """A function of a number of steps that takes so many of the very program that experiments.py trains with."""
    net = {"latent_units": latent_units, "hidden_units": hidden_units, "binarization": "stochastic"}
    parameters = Parameters(k=k, batch=batch, **net, **fields)
    model = Autoencoder(images.mean(axis=0) / 255, latent_units, hidden_units)
    stretch = compile_stretch(model, build_optimizer(parameters, model), tf.constant(images), parameters, k)
    order = np.random.default_rng(0).permutation(len(images)).astype(np.int32).reshape(-1, batch)
    rates, seed = np.full(len(order), 1e-3, np.float32), np.int32([0, 1])
    return lambda steps: stretch(order, rates, seed, 0, steps).numpy()


def square_run(jit_compile):
    """A function of a number of times that multiplies two large square matrices so often, by XLA or by oneDNN."""
    a = tf.random.normal([SQUARE, SQUARE])
    product = tf.function(lambda a: tf.matmul(a, a)[0], jit_compile=jit_compile)
    return lambda times: [product(a).numpy() for _ in range(times)]


def last_product_run():
    """A function of a number of times that XLA takes the last product of the decoder of a step, k = 50, so often."""
    z = tf.random.normal([50 * BATCH, 200])

    @tf.function(jit_compile=True)
    def take(times):
        weights = tf.ones([200, FEATURES])
        for _ in tf.range(times):
            weights -= 1e-3 * (z @ weights)[:200]  # none is like the one before
        return tf.reduce_sum(weights)

    return lambda times: take(tf.constant(times)).numpy()


def products(net, k):
    """Floating-point operations of the matrix products of one step: 2 forward, 4 backward per weight and row."""
    latent_units, hidden_units = NETS[net]
    total, below = -2 * BATCH * FEATURES * hidden_units[0][0], FEATURES  # the image itself needs no gradient
    for layer, (hidden, units) in enumerate(zip(hidden_units, latent_units, strict=True)):
        encoder = [below, *hidden, 2 * units]
        decoder = [units, *hidden[::-1], below * (2 if layer else 1)]
        for sizes, samples in ((encoder, k if layer else 1), (decoder, k)):
            total += 6 * BATCH * samples * sum(a * b for a, b in itertools.pairwise(sizes))
        below = units
    return total


def measure(runs, rounds):
    """Median seconds per step of each of {name: (run, steps)}, which take turns of so many steps."""
    times = {name: [] for name in runs}
    for run, steps in runs.values():
        run(steps)  # compiles
    for _ in range(rounds):
        for name, (run, steps) in runs.items():
            start = time.perf_counter()
            run(steps)
            times[name].append((time.perf_counter() - start) / steps)
    return {name: float(np.median(values)) for name, values in times.items()}


def installed():
    """{name: module} of the references that are installed."""
    found = {}
    for name, module in REFERENCES.items():
        try:
            found[name] = importlib.import_module(module)
        except ImportError as error:
            print(f"{name} takes no part: {error}")
    return found


def step_times(images, references, quick):
    """Median milliseconds per step, {(contender, net, k): ms}, and GFLOP/s of square products, {by what: rate}.

    Unless `quick` all that main() writes, too: of more k, of subsampled steps {(batch, backward_samples): ms}.
    """
    runs = {"oneDNN": (square_run(jit_compile=False), 1)}
    curve = [] if quick else [(net, k) for net in DEPTHS for k in CURVE]
    for net, k in dict.fromkeys([*CELLS, *curve]):
        steps = min(300, max(8, 2500 // k))  # so many that it does not count what a call costs
        runs["ours", net, k] = our_run(images, *NETS[net], k), steps
        for name, reference in references.items() if (net, k) in CELLS else ():
            runs[name, net, k] = reference.make_run(images, *NETS[net], k, BATCH), steps
    if not quick:
        runs["XLA"] = square_run(jit_compile=True), 1
        runs["last product"] = last_product_run(), 50
        for batch, samples in ((BATCH, 8), (100, None), (100, 8)):
            runs[batch, samples] = our_run(images, *NETS["l1"], 50, batch, backward_samples=samples), 1000 // batch
    times = measure(runs, rounds=3 if quick else 9)
    squares = {name: 2 * SQUARE**3 / times.pop(name) / 1e9 for name in ("oneDNN", "XLA") if name in times}
    return {name: 1000 * value for name, value in times.items()}, squares


def rate(net, k, milliseconds):
    """GFLOP/s of the matrix products of a step."""
    return products(net, k) / milliseconds / 1e6


def step_table(times, names):
    """Markdown: a row for each net and k, a column for each contender, and our ratio to it."""
    header = ["net", "ours, ms"] + [f"{name}, ms" for name in names] + [f"ours / {name}" for name in names]
    rows = []
    for net, k in CELLS:
        ours, *others = [times[name, net, k] for name in ("ours", *names)]
        cells = [f"{ms:.2f}" for ms in (ours, *others)] + [f"{ours / other:.2f}" for other in others]
        rows.append([f"{DEPTHS[net]}, k = {k}", *cells])
    return markdown_table(header, rows)


def share_table(times, squares, names):
    """Markdown: the rate of each contender's products over each of {name: GFLOP/s of the square product}."""
    columns = list(itertools.product(squares, ("ours", *names)))
    rows = []
    for cell, goal, jax in zip(CELLS, GOALS, JAX_SHARES, strict=True):
        shares = [rate(*cell, times[name, *cell]) / squares[square] for square, name in columns]
        rows.append([f"{DEPTHS[cell[0]]}, k = {cell[1]}", *(f"{share:.0%}" for share in (*shares, goal, jax))])
    header = ["net", *(f"{name} / {square}" for square, name in columns), "goal", "JAX where it was set"]
    return markdown_table(header, rows)


def likelihood_seconds(images, references, k=5000):
    """{contender: seconds of L_k of the images}, of those that have a likelihood."""
    x, model = np.float32(images > 127), Autoencoder(images.mean(axis=0) / 255, *NETS["l1"])
    runs = {"ours": (lambda _: log_likelihood(model, x, k), 1)}
    for name, reference in references.items():
        if hasattr(reference, "make_likelihood"):
            runs[name] = reference.make_likelihood(x, *NETS["l1"], k), 1
    return measure(runs, rounds=1)


START_UP = """
import time
start = time.perf_counter()
from speed import make_images, our_run, NETS
imported = time.perf_counter()
run = our_run(make_images(), *NETS["l1"], 5)
run(1)
first = time.perf_counter()
run(1)
print(imported - start, first - imported, time.perf_counter() - first)
"""


def start_up():
    """Seconds of a new process: imports, net and compilation with the first step, a second step."""
    done = subprocess.run([sys.executable, "-c", START_UP], cwd=HERE, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()[-3:]]


def curve_figure(times):
    """Our time per step against k, of the times of `step_times`."""
    figure = new_figure("Training step", f"Batch {BATCH}. Dotted: proportional to k.", 4)
    axes = figure.subplots()
    for (net, depth), colour in zip(DEPTHS.items(), PALETTE, strict=False):
        values = [times["ours", net, k] for k in CURVE]
        axes.loglog(CURVE, values, "o-", color=colour, label=depth)
        axes.loglog(CURVE, [values[-1] * k / CURVE[-1] for k in CURVE], ":", color=colour, linewidth=1)
    label_axes(axes, "k", "milliseconds per step")
    legend_above(axes)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="our step alone, in less than a minute; prints, and writes no table"
    )
    parser.add_argument("--json", metavar="FILE", help="write the medians of our step, in ms, to a file")
    options = parser.parse_args()
    images, references = make_images(), {} if options.quick else installed()
    times, squares = step_times(images, references, options.quick)
    tables = [step_table(times, references), share_table(times, squares, references)]
    print(*tables, sep="\n\n")
    if options.json:
        medians = {f"{net}_k{k}": round(times["ours", net, k], 4) for net, k in CELLS}
        Path(options.json).write_text(json.dumps(medians, indent=2) + "\n")
    if not options.quick:
        write_page(images, references, times, squares, tables)


def write_page(images, references, times, squares, tables):
    """Write README.md and the figure: what main() has measured, and likelihoods and a start besides."""
    likelihoods = likelihood_seconds(images[:1000], references)
    imported, compiled, step = start_up()
    save_figure(curve_figure(times), HERE / "time_per_step.png")
    full = {BATCH: times["ours", "l1", 50], 100: times[100, None]}
    subsampled = ", ".join(f"{times[b, 8] / ms:.2f} of a step at batch {b}" for b, ms in full.items())
    last_product = 2 * 50 * BATCH * 200 * FEATURES / times["last product"] / 1e6
    square, by_xla = squares.values()
    ratios = [[f"{times['ours', net, 500] / times['ours', net, k]:.2f}" for net in DEPTHS] for k in (50, 100)]
    growth = [" and ".join(row) for row in ratios]
    text = f"""# Speed

`pip install -r benchmarks/requirements.txt && python benchmarks/speed.py`: {os.cpu_count()} cores ({machine()}),
TensorFlow {tf.__version__}, medians. A step is that of `iwae` with Adam on a batch of {BATCH}, from the bytes
of the images (noise, as sparse as MNIST) to new weights. JAX: `jit` around `lax.scan` over the steps; PyTorch:
eager, without `torch.compile`. Times change with the machine; the ratios, measured in one sitting, count: below 1 ours
is faster.
`--quick` times our step alone, `--json FILE` keeps its medians.

{tables[0]}

Operations per second of a step's matrix products, over those of two square matrices of {SQUARE:,} rows: oneDNN
(TensorFlow without XLA) makes {square:.0f} GFLOP/s of these, XLA, which compiles the step, {by_xla:.0f} (and
{last_product:.0f} of the decoder's last product at k = 50, [{50 * BATCH:,}, 200] by [200, {FEATURES}]).
The goals were set on another processor, where oneDNN made 322, with the shares that a JAX step had there:

{tables[1]}

- k = 500 takes {growth[0]} times as long as k = 50 (one layer, two), {growth[1]} times as long as k = 100.
- `backward_samples=8`, k = 50, one layer: {subsampled}
  (its products are half of the full step's: all 50 samples go forward).
- L_5000 of 1,000 images, one layer: {", ".join(f"{name} {s:.2f} s" for name, s in likelihoods.items())}.
- Start: imports {imported:.1f} s; net, compilation, first step {compiled:.1f} s; one step called alone then
  {1000 * step:.1f} ms (one layer, k = 5).

![Time per step against k](time_per_step.png)
"""
    (HERE / "README.md").write_text(text)


def machine():
    """The processor's name, where the system tells it, and whether it has AVX-512."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    found = re.search(r"model name.*: (.*)", text)  # which ARM processors do not have
    return (found[1] if found else platform.machine()) + " with AVX-512" * ("avx512f" in text)


if __name__ == "__main__":
    main()
