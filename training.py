"""Training: compiled stretches of steps, checkpoints, logs, the step that is not finite."""

import json
import time

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from checkpoints import Checkpoints, tensorflow_writes
from distributed import everyone, on_replicas, over_replicas, run_alike, whole
from gradients import gradients
from losses import build_objective
from models import fold_seed, random_uniform, save_weights, snapshots, split_seed
from optimizers import assign, averaged_weights, build_optimizer, values_of
from run_folder import due, stop_asked, write_text
from schedules import Epoch, describe, epoch_inputs, plan_epochs

STRETCHES_PER_EPOCH = 5  # entries into Python, for the progress bar, checkpoints and Ctrl-C
STEPS_TIMED = 20  # for the estimate of a run's time


def objective_of(parameters):
    """The run's objective, a function of log_w alone."""
    return build_objective(parameters.objective, beta=parameters.beta, groups=parameters.groups, alpha=parameters.alpha)


def compile_stretches(model, optimizer, x_train, parameters, plan):
    """The program of `compile_stretch` for each k of the plan, over one copy of the images: {k: stretch}."""
    images = tf.constant(x_train)
    return {k: compile_stretch(model, optimizer, images, parameters, k) for k in {epoch.k for epoch in plan}}


def compile_stretch(model, optimizer, images, parameters, k):
    """A program that takes the steps first .. last - 1 of an epoch, and stops after a bound that is not finite.

    On one device all of it is compiled by XLA, on several each one's share of a step: see `over_replicas`.
    images: [n, features] tensor, uint8 or float32 in [0, 1], binarised as it is served.
    Called as stretch(order [steps, batch], rates [steps], seed [2] of the epoch, first, last); returns the sum of the
    steps' mean bounds. To test gradients as well would cost a fifth: see `run_stretch`.
    """
    variables = model.phi + model.theta
    steps = images.shape[0] // parameters.batch
    signature = [((steps, parameters.batch), tf.int32), ((steps,), tf.float32), ((2,), tf.int32), ((), tf.int32)]

    @over_replicas
    def ascend(own, rows, seed, step):
        bound, ascent = step_gradients(model, rows, fold_seed(seed, step), parameters, k, own)
        return [tf.reduce_sum(bound) / parameters.batch, *ascent]

    def take_step(rows, seed, step):
        bound, *ascent = ascend(rows, seed, step)
        if parameters.clip_norm:
            ascent, _ = tf.clip_by_global_norm(ascent, parameters.clip_norm)
        optimizer.apply_gradients([(-gradient, v) for gradient, v in zip(ascent, variables, strict=True)])
        return bound

    @tf.function(
        jit_compile=not tf.distribute.has_strategy(),
        input_signature=[tf.TensorSpec(*spec) for spec in signature + signature[-1:]],
    )
    def stretch(order, rates, seed, first, last):
        step, total = first, 0.0
        while step < last and tf.math.is_finite(total):
            optimizer.learning_rate.assign(rates[step])
            total += run_alike(take_step, tf.gather(images, order[step]), seed, step)
            step += 1
        return total

    return stretch


def step_gradients(model, images, seed, parameters, k, own=whole):
    """Bound [batch] and gradients, as of `gradients`, of a step's images [batch, features], binarised afresh."""
    binarization_seed, gradient_seed = tf.unstack(split_seed(seed))
    x = tf.cast(images, tf.float32) / (255.0 if images.dtype == tf.uint8 else 1.0)
    if parameters.binarization == "stochastic":
        x = tf.cast(random_uniform(tf.shape(x), binarization_seed) < x, tf.float32)
    return gradients(model, objective_of(parameters), x, k, gradient_seed, parameters.backward_samples, own)


def step_seconds(stretch, inputs, variables):
    """Seconds of a step of a compiled stretch: some are timed, and undone."""
    before, steps = values_of(variables), min(len(inputs[1]), STEPS_TIMED)
    stretch(*inputs, 0, 1).numpy()  # compiles
    start = time.perf_counter()
    stretch(*inputs, 0, steps).numpy()
    seconds = (time.perf_counter() - start) / steps
    assign(variables, before)
    return seconds


def estimate_seconds(stretches, plan, n, parameters, variables):
    """Seconds that the epochs of `plan` will take."""
    inputs = epoch_inputs(plan[0], n, parameters)
    seconds = {k: step_seconds(stretch, inputs, variables) for k, stretch in stretches.items()}
    return len(inputs[1]) * sum(seconds[epoch.k] for epoch in plan)


def step_milliseconds(model, x_train, runs):
    """Time of a training step of each run, [Parameters], as it is compiled: an array [runs]. The model stays as it is.

    The least of ten measurements, taken in turns: whatever else the machine does falls on all runs alike.
    """
    images, programs = tf.constant(x_train), []
    for run in runs:
        optimizer, inputs = build_optimizer(run, model), epoch_inputs(Epoch(1, run.k, 0.0, 0.0), len(x_train), run)
        stretch = compile_stretch(model, optimizer, images, run, run.k)
        programs.append((stretch, inputs, model.variables + optimizer.variables))
    return 1000 * np.min([[step_seconds(*program) for program in programs] for _ in range(10)], axis=0)


def duration(seconds):
    """Seconds in the largest fitting unit: "45 s", "12 min", "16 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class Progress(tf.train.experimental.PythonState):
    """How far a training has come: what a checkpoint holds beside variables, as JSON."""

    def __init__(self):
        self.log = []  # a record for each finished epoch: see `end_epoch`
        self.stretch = 0  # the next one of the epoch after them
        self.total = 0.0  # of that epoch: sum of the steps' mean bounds, nats
        self.seconds = 0.0  # of training

    @property
    def epochs(self):
        """How many are finished."""
        return len(self.log)

    def serialize(self):
        return json.dumps([self.log, self.stretch, self.total, self.seconds])

    def deserialize(self, text):
        self.log, self.stretch, self.total, self.seconds = json.loads(text)


def run_stretch(stretch, inputs, done, variables, bar):
    """Take the next stretch of an epoch, and tell the progress; returns the first step that is not finite, or None.

    That is the step whose bound is not, or whose update leaves a weight or a variable of the optimizer that is not;
    the variables are then as they were before it, and no progress is told.
    """
    start, before = time.perf_counter(), values_of(variables)
    edges = np.linspace(0, len(inputs[1]), STRETCHES_PER_EPOCH + 1, dtype=np.int32)
    first, last = edges[done.stretch : done.stretch + 2]
    total = float(stretch(*inputs, first, last))
    if not all_finite(total, variables):
        return bad_step(stretch, inputs, first, last, variables, before)
    done.stretch, done.total = done.stretch + 1, done.total + total
    bar.update(last - first)
    bar.set_postfix(bound=f"{done.total / max(1, last):.2f}", refresh=False)
    done.seconds += time.perf_counter() - start
    return None


def all_finite(total, variables):
    """Whether a sum of bounds and every value of the variables is finite."""
    return np.isfinite(total) and all(np.isfinite(variable.numpy()).all() for variable in variables)


def bad_step(stretch, inputs, first, last, variables, before):
    """The first step in first .. last - 1 that is not finite, found by taking one after the other.

    before: values of the variables at `first`, where they are still finite; they are left as they were at that step.
    """
    assign(variables, before)
    for step in range(first, last):
        before = values_of(variables)
        if not all_finite(float(stretch(*inputs, step, step + 1)), variables):
            break
    assign(variables, before)
    return step


def replay(model, x_train, parameters, k, inputs, step):
    """Bound [batch] and gradients of one step, outside XLA but for its random numbers, which are the same."""
    order, _, seed = inputs
    replicas = tf.distribute.get_strategy().num_replicas_in_sync

    def again(seed):
        return step_gradients(model, tf.constant(x_train[order[step]]), fold_seed(seed, step), parameters, k)

    return on_replicas(again, np.tile(seed, [replicas, 1]))[0]


def not_finite(model, x_train, parameters, epoch, inputs, step):
    """The error of a step of `bad_step`: taken again from its seed, for what is not finite and where."""
    order, rates, _ = inputs
    bound, ascent = replay(model, x_train, parameters, epoch.k, inputs, step)
    images = order[step][~np.isfinite(bound)]
    layers = [
        variable.path.partition("/")[2]
        for variable, gradient in zip(model.phi + model.theta, ascent, strict=True)
        if not np.isfinite(gradient).all()
    ]
    if not layers:
        largest = max(np.abs(gradient).max() for gradient in ascent)
        overflow = f", but its largest value, {largest:.1e}, overflows the optimizer or clip_norm"
        layers = [f"no layer{overflow * (not len(images))}"]
    return diverged(
        f"epoch {epoch.number}, step {step}, learning rate {rates[step]:.3g}: "
        f"the bound of training images {images.tolist() or 'none'} of {order[step].tolist()}; "
        f"the gradient of {', '.join(layers)}",
        parameters,
    )


def diverged(what, parameters):
    """The error of a training that has come to a number that is not finite, with the ways out."""
    clip_norm = "a lower --clip_norm" if parameters.clip_norm else "--clip_norm 10"
    return FloatingPointError(
        f"not finite in {what}. The last checkpoint stands; nothing after it is saved. "
        f"Way out: {clip_norm}, lower learning rates (--rate_scale 0.5), another seed, or another likelihood"
    )


def resume(model, optimizer, folder):
    """Take the last checkpoint of a folder, if it has one: its Checkpoints, and the Progress that they keep."""
    done = Progress()
    # As lists of variables: TensorFlow does not see into Keras's lists of layers, so of a model it keeps nothing.
    state = {"model": model.variables, "optimizer": optimizer.variables, "kept": done}
    checkpoints = Checkpoints(folder / "checkpoints", **state)
    checkpoints.restore()
    return checkpoints, done


def write_log(folder, log):
    """Write log.jsonl, a line for each record: a copy for readers of what the checkpoints hold."""
    write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))


def tell_lost(folder, parameters, epochs):
    """Say which weights that `snapshot_epochs` asks for were not kept, in a training gone so many epochs far."""
    lost = [epoch for epoch in parameters.snapshot_epochs if epoch <= epochs and epoch not in snapshots(folder)]
    if lost:
        way_out = f"for them delete {folder}, or name another place by --results_dir"
        print(f"{folder.name}: the weights of epochs {', '.join(map(str, lost))} were not kept: {way_out}")


def train(model, x_train, parameters, folder, validation_bound, shown=dict):
    """Train `model` in place as `parameters` say, from the last checkpoint in `folder` if it holds one.

    Writes log.jsonl, checkpoints/, tensorboard/, snapshots/ and, at the end, model.weights.h5. With `ema` the averaged
    weights are what is validated and saved, and what the model has on return.

    x_train: [n, features], uint8 or float32 in [0, 1]. validation_bound: function () -> bound of the model as it
    stands, in nats, for the log. shown: function () -> {name: [rows, columns]}, of the same, for TensorBoard.
    Raises FloatingPointError where a bound or a gradient is not finite; the last checkpoint then stands as it was.
    Raises KeyboardInterrupt, once a checkpoint is written, after Ctrl-C or SIGTERM.
    """
    optimizer = build_optimizer(parameters, model)
    checkpoints, done = resume(model, optimizer, folder)
    variables = model.variables + optimizer.variables
    if done.log:  # the file may be damaged, or ahead
        write_log(folder, done.log)
    tell_lost(folder, parameters, done.epochs)
    plan = plan_epochs(parameters)[done.epochs :]
    stretches = compile_stretches(model, optimizer, x_train, parameters, plan)
    if plan:
        seconds = estimate_seconds(stretches, plan, len(x_train), parameters, variables)
        print(f"{folder.name}: {describe(plan, parameters)}: about {duration(seconds)} on this machine", flush=True)
    with tensorflow_writes(folder / "tensorboard"):
        writer = tf.summary.create_file_writer(str(folder / "tensorboard"))
    steps = len(x_train) // parameters.batch
    initial = done.stretch * steps // STRETCHES_PER_EPOCH
    bar = tqdm(total=len(plan) * steps, initial=initial, unit="step", desc=folder.name, disable=not plan)
    with bar, stop_asked() as asked:
        for epoch in plan:
            inputs = epoch_inputs(epoch, len(x_train), parameters)
            while done.epochs < epoch.number:
                bad = run_stretch(stretches[epoch.k], inputs, done, variables, bar)
                if bad is not None:
                    raise not_finite(model, x_train, parameters, epoch, inputs, bad)
                if done.stretch == STRETCHES_PER_EPOCH:
                    with averaged_weights(model, optimizer):
                        end_epoch(epoch, done, steps, validation_bound(), parameters)
                        write_tensorboard(writer, done.log[-1], shown)
                        if epoch.number in parameters.snapshot_epochs:
                            save_weights(model, folder / "snapshots" / f"epoch{epoch.number:04d}.weights.h5")
                stop = any(everyone(len(asked)))
                if stop or due(checkpoints.saved) or done.epochs == plan[-1].number:
                    write_log(folder, done.log)
                    checkpoints.save(f"{done.epochs:05d}-{done.stretch}")
                if stop:
                    raise KeyboardInterrupt
        if any(everyone(len(asked))):  # while the last checkpoint was written
            raise KeyboardInterrupt
    optimizer.finalize_variable_values(model.phi + model.theta)  # the averaged weights, where `ema` is set
    save_weights(model, folder / "model.weights.h5")


def end_epoch(epoch, done, steps, bound_validation, parameters):
    """Tell the progress a line of log.jsonl: bounds in nats, seconds of training so far."""
    if not np.isfinite(bound_validation):
        raise diverged(f"epoch {epoch.number}: the bound of validation images", parameters)
    record = {
        "epoch": epoch.number,
        "k": epoch.k,
        "learning_rate": epoch.rate_to,
        "bound_train": done.total / steps,
        "bound_validation": bound_validation,
        "seconds": round(done.seconds, 1),
    }
    done.log, done.stretch, done.total = [*done.log, record], 0, 0.0


def write_tensorboard(writer, record, shown):
    """Show a record, and after epochs 1, 2, 4, 8, .. shown() as well: {name: [rows, columns] in [0, 1]}."""
    epoch = record["epoch"]
    with tensorflow_writes("tensorboard/"), writer.as_default(epoch):
        for name, value in record.items():
            tf.summary.scalar(name, value)
        for name, image in shown().items() if epoch & (epoch - 1) == 0 else ():
            tf.summary.image(name, image[None, :, :, None])
