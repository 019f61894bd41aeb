"""training.py, schedules.py, optimizers.py, checkpoints.py: what a training does, and in which order."""

import gc
import itertools
import signal
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

import canvas
import evaluation
import optimizers
import plotting
import run_folder
import training
from checkpoints import Checkpoints
from experiments import Parameters
from schedules import PAPER_EPOCHS, SCHEDULES, Epoch, Stage, epoch_inputs, plan_epochs, stages_of

TINY = Parameters(batch=10, k=2, epochs=2, binarization="stochastic")


def grey(x):
    return np.uint8(255 * (0.2 + 0.6 * x))


def train(model, x, folder, parameters=TINY):
    training.train(model, grey(x), parameters, folder, lambda: 0.0)
    return [variable.numpy() for variable in model.variables]


def test_paper_schedule_is_the_papers():
    """Pitfall: stages at cumulative 1, 4, 13, 40, 121, 364, 1093, 3280 passes, at 0.001 * 10^(-i/7), eight of them."""
    plan = plan_epochs(replace(TINY, schedule="paper", epochs=None))
    starts = [epoch.number for epoch, before in zip(plan[1:], plan[:-1], strict=True) if epoch[2:] != before[2:]]
    assert [start - 1 for start in starts] == [1, 4, 13, 40, 121, 364, 1093]
    assert len(plan) == PAPER_EPOCHS == 3280
    assert plan[0].rate_from == 0.001 and plan[-1].rate_to == pytest.approx(0.0001)
    assert all(epoch.rate_from == epoch.rate_to for epoch in plan)
    rounded = [1e-3, 7.2e-4, 5.2e-4, 3.7e-4, 2.7e-4, 1.9e-4, 1.4e-4, 1e-4]  # as the authors' code has them
    assert [stage.rate_from for stage in stages_of("paper")] == pytest.approx(rounded, rel=0.02)


@pytest.mark.parametrize("epochs", [1, 3, 4, 5, 121, 3279, 3280])
def test_epochs_cut_the_paper_schedule_short(epochs):
    whole, cut = (plan_epochs(replace(TINY, schedule="paper", epochs=e)) for e in (None, epochs))
    assert cut == whole[:epochs]


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "paper"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 100])
def test_epochs_rescale_other_schedules(schedule, epochs):
    whole, scaled = stages_of(schedule), stages_of(schedule, epochs)
    assert sum(stage.epochs for stage in scaled) == epochs
    assert scaled[-1].rate_to == whole[-1].rate_to
    if epochs == 100:
        share = sum(stage.epochs for stage in whole) / 100
        for a, b in zip(scaled, whole, strict=True):
            assert abs(a.epochs * share - b.epochs) <= share


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_meet_from_epoch_to_epoch(schedule):
    plan = plan_epochs(replace(TINY, schedule=schedule, epochs=None))
    assert [epoch.number for epoch in plan] == list(range(1, len(plan) + 1))
    assert all(epoch.k >= 1 and epoch.rate_from >= 0 and epoch.rate_to >= 0 for epoch in plan)
    if schedule != "paper":  # which has steps
        assert all(a.rate_to == pytest.approx(b.rate_from) for a, b in itertools.pairwise(plan))
    _, rates, _ = epoch_inputs(plan[-1], 60, TINY)
    assert rates[0] == np.float32(plan[-1].rate_from) and rates.dtype == np.float32


def test_stages_may_have_a_k_of_their_own(monkeypatch):
    stages = [Stage(1, 1e-3, 1e-3, k=1), Stage(1, 1e-3, 0.0)]
    monkeypatch.setitem(SCHEDULES, "quick", stages)
    assert [epoch.k for epoch in plan_epochs(replace(TINY, epochs=None))] == [1, 2]
    assert [epoch.k for epoch in plan_epochs(replace(TINY, epochs=None, k=1))] == [1, 1]


def test_a_stage_is_trained_with_its_own_k(small_net, x_small, tmp_path, monkeypatch, uncompiled):
    ks, gradients = [], training.gradients
    monkeypatch.setattr(training, "gradients", lambda *a, **named: ks.append(a[3]) or gradients(*a, **named))
    monkeypatch.setattr(training, "estimate_seconds", lambda *_: 0.0)
    monkeypatch.setitem(SCHEDULES, "quick", [Stage(1, 1e-3, 1e-3, k=1), Stage(1, 1e-3, 0.0)])
    train(small_net(), x_small, tmp_path, replace(TINY, epochs=None))
    assert ks == 6 * [1] + 6 * [2]


def test_every_epoch_has_a_new_permutation_without_the_last_incomplete_batch():
    plan = plan_epochs(replace(TINY, epochs=2))
    orders = [epoch_inputs(epoch, 64, TINY)[0] for epoch in plan]
    for order in orders:
        assert order.shape == (6, 10) and order.dtype == np.int32
        assert len(set(order.ravel())) == 60 and order.max() < 64
    assert not np.array_equal(*orders)
    np.testing.assert_array_equal(orders[0], epoch_inputs(plan[0], 64, TINY)[0])
    assert not np.array_equal(orders[0], epoch_inputs(plan[0], 64, replace(TINY, seed=1))[0])
    seeds = {tuple(epoch_inputs(epoch, 64, replace(TINY, seed=seed))[2]) for epoch in plan for seed in (0, 1)}
    assert len(seeds) == 4  # of the noise


class Recorder:
    """Stands in for the gradients: `of` [batch, features] images that it is served becomes the bound [batch]."""

    def __init__(self, model, of=lambda x: tf.reduce_mean(x, axis=1)):
        self.zeros, self.of = [tf.zeros_like(variable) for variable in model.phi + model.theta], of

    def __call__(self, model, objective, x, k, seed, backward_samples, own):
        legal = tf.reduce_all((x == 0) | (x == 1)) if backward_samples is None else True
        return tf.where(legal, self.of(x), -1.0), self.zeros


def stretch_of(model, monkeypatch, x, parameters, **recorded):
    monkeypatch.setattr(training, "gradients", Recorder(model, **recorded))
    optimizer = optimizers.build_optimizer(parameters, model)
    return training.compile_stretch(model, optimizer, tf.constant(x), parameters, 2)


def test_images_are_binarised_afresh_each_time_they_are_served(small_net, monkeypatch):
    """Pitfall: binarised once, or never. Pixels are 0 or 1, their mean the grey value, and draws differ by step."""
    x = np.full((60, 12), 51, np.uint8)  # grey 0.2
    stretch = stretch_of(small_net(), monkeypatch, x, TINY)
    order, rates, seed = epoch_inputs(plan_epochs(TINY)[0], 60, TINY)
    same_images = np.repeat(order[:1], len(order), axis=0)
    means = [float(stretch(same_images, rates, seed, step, step + 1)) for step in range(6)]
    assert min(means) >= 0 and len(set(means)) > 1
    assert float(stretch(same_images, rates, seed, 0, 6)) == pytest.approx(sum(means))  # in one call or in six
    draws = [float(stretch(order, rates, (7, epoch), 0, 6)) / 6 for epoch in range(100)]
    # 72,000 pixels of standard deviation 0.4: beyond 4.5 standard errors once in 100,000 seeds.
    assert abs(np.mean(draws) - 0.2) < 4.5 * 0.4 / np.sqrt(72000)


@pytest.mark.parametrize("pair", [lambda x: x[:, 0] * x[:, 1], lambda x: x[:, 0] * tf.reverse(x, [0])[:, 0]])
def test_pixels_are_binarised_independently(small_net, monkeypatch, pair):
    """Two of one image, one of two images: both are 1 in 0.04 of 6,000 cases, with a shared uniform in 0.2.

    The second cases come twice each, which doubles the variance: beyond 5 standard errors once in a million seeds.
    """
    stretch = stretch_of(small_net(), monkeypatch, np.full((60, 12), 51, np.uint8), TINY, of=pair)
    order, rates, _ = epoch_inputs(plan_epochs(TINY)[0], 60, TINY)
    draws = [float(stretch(order, rates, (8, epoch), 0, 6)) / 6 for epoch in range(100)]
    assert abs(np.mean(draws) - 0.04) < 5 * np.sqrt(2 * 0.04 * 0.96 / 6000)


def test_every_step_has_its_own_rate(small_net, monkeypatch):
    """Rates fall within an epoch, and each step takes its own: by SGD of gradients of 1 a weight moves by their sum."""
    rates = epoch_inputs(Epoch(1, 2, 0.2, 0.1), 60, TINY)[1]
    np.testing.assert_allclose(rates, np.linspace(0.2, 0.1, 7)[:-1], rtol=1e-6)
    model = small_net()
    recorder, variables = Recorder(model), model.phi + model.theta
    recorder.zeros = [tf.ones_like(variable) for variable in variables]
    monkeypatch.setattr(training, "gradients", recorder)
    optimizer, before = keras.optimizers.SGD(), variables[0].numpy()
    optimizer.build(variables)
    order, _, seed = epoch_inputs(plan_epochs(TINY)[0], 60, TINY)
    stretch = training.compile_stretch(model, optimizer, tf.zeros([60, 12]), TINY, 2)
    stretch(order, np.float32([1, 2, 4, 8, 16, 32]), seed, 1, 4)
    np.testing.assert_allclose(variables[0], before + 14, rtol=1e-5)


def test_bound_train_is_the_mean_of_all_steps_and_seconds_add_up(small_net, tmp_path, monkeypatch, uncompiled):
    """Of seven steps of nine images, the tenth of which belongs to no batch."""
    model, parameters = small_net(), replace(TINY, batch=9, binarization="none", backward_samples=1)
    monkeypatch.setattr(training, "gradients", Recorder(model))
    monkeypatch.setattr(training.time, "perf_counter", itertools.count().__next__)  # a second for each stretch
    training.train(model, np.full((64, 12), 51, np.uint8), parameters, tmp_path, lambda: 0.0)
    log = run_folder.read_log(tmp_path, 2)
    assert [record["bound_train"] for record in log] == pytest.approx([0.2, 0.2])
    assert [record["seconds"] for record in log] == [training.STRETCHES_PER_EPOCH, 2 * training.STRETCHES_PER_EPOCH]


def test_progress_is_restored_whole():
    done, again = training.Progress(), training.Progress()
    done.log, done.stretch, done.total, done.seconds = [{"epoch": 1}], 2, -3.0, 4.0
    again.deserialize(done.serialize())
    assert vars(again) == vars(done)


def test_rate_scale_multiplies_every_rate():
    plans = [plan_epochs(replace(TINY, schedule="fast", rate_scale=scale)) for scale in (None, 3)]
    for plain, scaled in zip(*plans, strict=True):
        assert scaled == plain._replace(rate_from=3 * plain.rate_from, rate_to=3 * plain.rate_to)


@pytest.mark.parametrize("binarization", ["fixed", "none"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_other_images_are_served_as_they_are(small_net, monkeypatch, binarization, dtype):
    x = np.full((60, 12), 51, np.uint8) if dtype == np.uint8 else np.full((60, 12), 0.2, np.float32)
    parameters = replace(TINY, binarization=binarization, backward_samples=1)  # told to the Recorder: grey is legal
    stretch = stretch_of(small_net(), monkeypatch, x, parameters)
    inputs = epoch_inputs(plan_epochs(parameters)[0], 60, parameters)
    assert float(stretch(*inputs, 0, 6)) / 6 == pytest.approx(0.2)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_optimizers_take_the_constants_of_the_run(small_net, optimizer):
    parameters = replace(TINY, optimizer=optimizer, beta_1=0.8, beta_2=0.99, epsilon=1e-3, momentum=0.9, ema=0.7)
    built = optimizers.build_optimizer(parameters, small_net())
    config = built.get_config()
    prefix = "adam_" if optimizer == "muon" else ""
    assert (config[f"{prefix}beta_1"], config[f"{prefix}beta_2"], config["epsilon"]) == (0.8, 0.99, 1e-3)
    assert built.use_ema and built.ema_momentum == 0.7
    assert not config["weight_decay"] and not config.get("adam_weight_decay")
    if optimizer == "muon":
        assert built.momentum == 0.9


@pytest.mark.parametrize("output_rate", [None, 8.0])
def test_steps_of_muon_have_the_rate_as_spectral_norm(small_net, output_rate):
    """Newton and Schulz's five iterations leave singular values between 0.6 and 1.3; the output layer has its own."""
    model, rng = small_net(2), np.random.default_rng(0)
    optimizer = optimizers.build_optimizer(replace(TINY, optimizer="muon", output_rate=output_rate), model)
    variables = model.phi + model.theta
    before = [variable.numpy() for variable in variables]
    optimizer.learning_rate.assign(0.1)
    optimizer.apply_gradients([(np.float32(rng.normal(size=v.shape)), v) for v in variables])
    steps = {v.path: np.linalg.norm(v - old, 2) for v, old in zip(variables, before, strict=True) if old.ndim == 2}
    output = steps.pop(model.decoder[0].head.kernel.path)
    assert len(steps) == 12 and all(0.06 < step < 0.13 for step in steps.values())
    assert 0.06 < output / (output_rate or 1) < 0.13


def test_averaged_weights_are_put_back(small_net):
    model = small_net()
    optimizer = optimizers.build_optimizer(replace(TINY, ema=0.5), model)
    variables = model.phi + model.theta
    optimizer.learning_rate.assign(0.1)
    for _ in range(3):
        optimizer.apply_gradients([(tf.ones_like(variable), variable) for variable in variables])
    current = [variable.numpy() for variable in variables]
    with optimizers.averaged_weights(model, optimizer):
        assert all(np.all(v.numpy() > value) for v, value in zip(variables, current, strict=True))
    for variable, value in zip(variables, current, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_training_ascends_the_bound(small_net, x_small, tmp_path):
    train(small_net(), x_small, tmp_path, replace(TINY, epochs=30))
    bounds = [record["bound_train"] for record in run_folder.read_log(tmp_path, 30)]
    assert len(bounds) == 30 and np.mean(bounds[-3:]) > bounds[0] + 0.1


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_resumed_training_is_bit_for_bit_the_uninterrupted(small_net, x_small, tmp_path, monkeypatch, ema):
    """Stopped inside an epoch, by the signal that a user or a machine sends: the checkpoint is inside the epoch too."""
    parameters = replace(TINY, epochs=4, ema=ema)
    whole = train(small_net(), x_small, tmp_path / "whole", parameters)
    run_stretch = training.run_stretch

    def asked_in_epoch_3(stretch, inputs, done, variables, bar):
        if (done.epochs, done.stretch) == (2, 1):
            signal.raise_signal(signal.SIGTERM)
        return run_stretch(stretch, inputs, done, variables, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "run_stretch", asked_in_epoch_3)
        train(small_net(), x_small, tmp_path / "stopped", parameters)
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert checkpoint.name == "00002-2"
    resumed = train(small_net(seed=9), x_small, tmp_path / "stopped", parameters)
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [run_folder.read_log(tmp_path / run, 4) for run in ("whole", "stopped")]
    for record in logs[0] + logs[1]:
        del record["seconds"]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_a_signal_during_the_last_checkpoint_stops_the_program(small_net, x_small, tmp_path, monkeypatch, uncompiled):
    whole, save = train(small_net(), x_small, tmp_path / "whole"), Checkpoints.save

    def asked_while_saving(checkpoints, name):
        if name == f"{TINY.epochs:05d}-0":
            signal.raise_signal(signal.SIGTERM)
        save(checkpoints, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", asked_while_saving)
        train(small_net(), x_small, tmp_path / "stopped")
    for a, b in zip(whole, train(small_net(seed=9), x_small, tmp_path / "stopped"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_weights_are_the_same_with_and_without_evaluation_plots_and_checkpoints(
    small_net, x_small, tmp_path, monkeypatch, uncompiled
):
    plain, model = train(small_net(), x_small, tmp_path / "plain"), small_net()
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CHECKPOINTS", -1)

    def look_at_everything():
        arrays = evaluation.figure_arrays(model, x_small, x_small) | {"image_shape": np.array([3, 4])}
        canvas.save_figure(plotting.PLOTS["prior_samples"]({"run": arrays}), tmp_path / "prior_samples.png")
        return float(evaluation.log_likelihood(model, x_small, k=3).mean())

    parameters = replace(TINY, snapshot_epochs=(1, 2))
    training.train(model, grey(x_small), parameters, tmp_path / "watched", look_at_everything)
    assert (tmp_path / "prior_samples.png").exists() and len(
        list((tmp_path / "watched" / "checkpoints").iterdir())
    ) == 2
    for a, b in zip(plain, model.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_trains_the_same_net_to_other_weights(small_net, x_small, tmp_path, uncompiled):
    """The seed of order, binarisation and samples: the initial weights are the same here."""
    runs = [train(small_net(), x_small, tmp_path / str(seed), replace(TINY, seed=seed)) for seed in (0, 1)]
    assert all(np.abs(a - b).max() > 1e-5 for a, b in zip(*runs, strict=True))


OTHERS = {
    "shape": {"progress": tf.Variable([""])},
    "type": {"progress": tf.Variable(0.0)},
    "variable more": {"more": tf.Variable(0.0)},
    "layer more": {"layers": 2},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("newer", [True, False])
def test_checkpoints_of_another_version_are_refused(small_net, tmp_path, other, newer, capfd):
    """In one line; they are not taken for damaged."""
    other, ours = dict(OTHERS[other]), {"progress": tf.Variable("")}
    states = [ours | {"model": small_net().variables}]
    states.append(ours | {"model": small_net(other.pop("layers", 1)).variables} | other)
    saved, wanted = states if newer else reversed(states)
    Checkpoints(tmp_path, **saved).save("00001-0")
    with pytest.raises(OSError, match="of another version of this program"):
        Checkpoints(tmp_path, **wanted).restore()
    assert [path.name for path in tmp_path.iterdir()] == ["00001-0"]
    gc.collect()  # TensorFlow says what it has to say when its objects go
    assert capfd.readouterr().err == ""


def test_estimate_leaves_everything_as_it_was(small_net, x_small):
    model = small_net()
    optimizer, plan = optimizers.build_optimizer(TINY, model), plan_epochs(TINY)
    variables = model.variables + optimizer.variables
    before = [variable.numpy() for variable in variables]
    stretches = training.compile_stretches(model, optimizer, grey(x_small), TINY, plan)
    assert training.estimate_seconds(stretches, plan, 60, TINY, variables) > 0
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_cost_of_a_step_is_the_least_measured_in_turns(small_net, x_small, monkeypatch):
    seconds = iter([0.15, 0.2] + 8 * [0.2, 0.25] + [0.1, 0.3])
    monkeypatch.setattr(training, "step_seconds", lambda *_: next(seconds))
    milliseconds = training.step_milliseconds(small_net(), grey(x_small), [TINY, replace(TINY, batch=20, k=3)])
    np.testing.assert_allclose(milliseconds, [100, 200])


@pytest.mark.parametrize("seconds, words", [(4, "4 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (57600, "16 h")])
def test_durations_are_said_in_the_largest_fitting_unit(seconds, words):
    assert training.duration(seconds) == words
