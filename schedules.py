"""Schedules: the learning rate, k and order of images of every epoch of a training, without TensorFlow."""

import itertools
from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
    """Part of a schedule: the learning rate goes linearly from one value to the other."""

    epochs: int
    rate_from: float
    rate_to: float
    k: int | None = None  # at most so many samples; None: the run's own k


SCHEDULES = {
    # Burda et al. 2016, section 5: 3^i passes at 0.001 * 10^(-i/7), 3280 passes in all.
    "paper": [Stage(3**i, 0.001 * 10 ** (-i / 7), 0.001 * 10 ** (-i / 7)) for i in range(8)],
    # For first runs: a decay to zero at once in place of the paper's long tail of ever lower rates.
    "quick": [Stage(16, 0.001, 0.0)],
    # Higher rates for longer: a lower NLL after as many passes, but IWAE and VAE lie closer together.
    "hold": [Stage(8, 0.001, 0.001), Stage(8, 0.001, 0.0)],
    # In place of the paper's 3280 passes, with Muon and batches of 400: few samples until the net is worth more.
    "fast": [Stage(2, 0.0, 0.02, 5), Stage(68, 0.02, 0.0092, 5), Stage(60, 0.0092, 0.0)],
}
SCHEDULES["switch"] = SCHEDULES["fast"][-1:]  # to go on with another objective, as the paper does: the last stage again
MUON_SCHEDULES = ("fast", "switch")  # whose rates are spectral norms of steps
PAPER_EPOCHS = sum(stage.epochs for stage in SCHEDULES["paper"])


def stages_of(schedule, epochs=None):
    """The stages of a named schedule with `epochs` passes in all; None: as they stand.

    `paper` is cut short, so that its first passes stay the paper's; the others are rescaled to keep their shape, but
    for a stage of less than half a pass, as the warm-up of `fast` is below 33: it is left out.
    """
    stages = SCHEDULES[schedule]
    ends = np.cumsum([stage.epochs for stage in stages])
    if epochs is not None and schedule == "paper":
        ends = np.minimum(ends, epochs)
    elif epochs is not None:
        ends = (2 * ends * epochs + ends[-1] - 1) // (2 * ends[-1])  # rounded, halves down
        ends[:-1] = np.minimum(ends[:-1], epochs - 1)  # the last stage keeps an epoch
    lengths = np.diff(ends, prepend=0).tolist()
    return [stage._replace(epochs=n) for stage, n in zip(stages, lengths, strict=True) if n]


class Epoch(NamedTuple):
    """One pass over the training images; its learning rate goes linearly from one value to the other."""

    number: int  # from 1
    k: int
    rate_from: float
    rate_to: float


def plan_epochs(parameters):
    """The whole training of a run, epoch by epoch."""
    plan = []
    for stage in stages_of(parameters.schedule, parameters.epochs):
        rates = np.linspace(stage.rate_from, stage.rate_to, stage.epochs + 1) * (parameters.rate_scale or 1)
        for rate_from, rate_to in itertools.pairwise(rates.tolist()):
            plan.append(Epoch(len(plan) + 1, min(stage.k or parameters.k, parameters.k), rate_from, rate_to))
    return plan


def epoch_inputs(epoch, n, parameters):
    """What a stretch of `training.compile_stretch` is told of an epoch: order [steps, batch], rates [steps], seed [2].

    The order is a new permutation of the n images each epoch, from (seed, epoch) alone; a last incomplete batch is
    dropped.
    """
    steps = n // parameters.batch
    order = np.random.default_rng((parameters.seed, epoch.number)).permutation(n)[: steps * parameters.batch]
    rates = np.linspace(epoch.rate_from, epoch.rate_to, steps, endpoint=False)
    seed = (parameters.seed, epoch.number)
    return np.int32(order).reshape(steps, parameters.batch), np.float32(rates), np.int32(seed)


def describe(plan, parameters):
    """The training that lies ahead, in words."""
    ks = " then ".join(str(k) for k, _ in itertools.groupby(epoch.k for epoch in plan))
    return f"{parameters.schedule} schedule, k = {ks}, {len(plan)} epoch{'s' * (len(plan) > 1)}"
