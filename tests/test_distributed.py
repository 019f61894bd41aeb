"""distributed.py: two logical devices, and workers over loopback, against one process; workers lost; shards."""

import json
import multiprocessing
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import test_faults
from test_faults import arrays_of, folder_of, tiny  # noqa: F401

import command_line
import distributed
import evaluation
import experiments
import training
from command_line import TF_CONFIG, cluster, problems
from datasets_download import load_dataset
from experiments import Parameters
from models import Autoencoder
from run_folder import read_log

TINY = "iwae --k 2 --latent_units 3 --hidden_units (8,), --epochs 2 --batch 24 --k_evaluation 60 --plot false"
CLOSE = {"rtol": 0, "atol": 2e-5}  # weights after some dozen steps, of another order of the sums of 32 bits

# What is refused before TensorFlow starts, and the way out.


def config(n, index=0, **fields):
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": [f"host{i}:1" for i in range(n)]}, "task": task} | fields)


REFUSED = [
    (None, 0, {"strategy": "multi_worker"}, "strategy = 'multi_worker': needs TF_CONFIG on every worker"),
    (None, 1, {"strategy": "mirrored"}, "strategy = 'mirrored': needs two GPUs or more, this machine has 1"),
    ("{", 1, {"strategy": "mirrored"}, "strategy = 'mirrored': needs two GPUs or more, this machine has 1"),
    (config(3), 0, {}, "batch = 20: must be divisible by the 3 replicas: try --batch 21"),
    (config(2), 4, {"batch": 12}, "batch = 12: must be divisible by the 8 replicas: try --batch 16"),
    (None, 3, {"strategy": "mirrored"}, "batch = 20: must be divisible by the 3 replicas: try --batch 21"),
    (config(2), 0, {"pretrained": True}, "pretrained: not for several workers"),
    ("{", 0, {}, "TF_CONFIG = {: must be as "),
    (config(2, 2), 0, {}, f"must be as {TF_CONFIG} (ValueError: "),
    (config(1, cluster={"worker": ["host"]}), 0, {}, f"must be as {TF_CONFIG} (TypeError: "),
    (config(1, cluster={"worker": ["host:99999"]}), 0, {}, "(ValueError: ports go from 1 to 65535)"),
    (config(1, cluster=[]), 0, {}, f"must be as {TF_CONFIG} (AttributeError: "),
]


@pytest.mark.parametrize("environment, gpus, fields, line", REFUSED)
def test_devices_that_are_not_there_are_refused_in_one_line(monkeypatch, environment, gpus, fields, line):
    monkeypatch.setattr(command_line, "gpus", lambda: gpus)
    if environment:
        monkeypatch.setenv("TF_CONFIG", environment)
    (found,) = problems(Parameters(**fields))
    assert line in found and found.endswith("run on one device by --strategy none") and "\n" not in found
    assert not problems(replace(Parameters(**fields), strategy="none"))


def test_auto_is_what_the_machine_has(monkeypatch):
    kinds = []
    for gpus, environment in ((0, None), (1, None), (2, None), (0, config(2)), (2, config(1, 0))):
        monkeypatch.setattr(command_line, "gpus", lambda gpus=gpus: gpus)
        if environment:
            monkeypatch.setenv("TF_CONFIG", environment)
        kinds.append(command_line.strategy_kind(Parameters()))
    assert kinds == ["none", "none", "mirrored", "multi_worker", "multi_worker"]


def test_auto_takes_one_device_where_the_batch_does_not_split(monkeypatch):
    monkeypatch.setattr(command_line, "gpus", lambda: 8)
    kinds = [command_line.strategy_kind(Parameters(batch=batch)) for batch in (20, 24)]
    assert kinds == ["none", "mirrored"] and not problems(Parameters(batch=20))


def test_of_a_cluster_with_a_chief_that_one_writes(monkeypatch):
    task = {"type": "worker", "index": 0}
    monkeypatch.setenv("TF_CONFIG", config(1, cluster={"worker": ["a:1"], "chief": ["b:1"]}, task=task))
    assert cluster() == ({"/job:chief/replica:0/task:0": "b:1", "/job:worker/replica:0/task:0": "a:1"}, 1)


@pytest.mark.parametrize("visible, count", [(None, 2), ("0", 1), ("", 0), ("0,1", 2)])
def test_visible_gpus_are_counted_without_tensorflow(monkeypatch, visible, count):
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("nvidia0"), Path("nvidia1")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert command_line.gpus() == count


def test_where_tensorflow_cannot_use_the_gpus_one_device_trains_as_ever(monkeypatch):
    monkeypatch.setattr(command_line, "gpus", lambda: 2)
    with distributed.open_strategy(Parameters()) as strategy, strategy.scope():
        assert not tf.distribute.has_strategy()


# Shards.


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_shards_take_every_run_once(monkeypatch, tmp_path, n):
    taken = []
    monkeypatch.setattr(experiments, "perform", lambda runs, compared: taken.append([run.folder.name for run in runs]))
    arguments = ["estimators", "--dataset", "mnist_sample", "--results_dir", str(tmp_path)]
    for i in range(1, n + 1):
        experiments.main([*arguments, "--shard", f"{i}/{n}"])
    names = [f"{name}__seed0" for name, _ in experiments.resolve(["estimators"], {})]
    assert sorted(sum(taken, [])) == sorted(names) and len(taken) == min(n, len(names))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "a/b", "1/2/3", "-1/2"])
def test_other_shards_are_refused(shard):
    with pytest.raises(SystemExit, match=re.escape(f"--shard {shard}: must be i/n, with i from 1 to n, such as 1/3")):
        experiments.main(["estimators", f"--shard={shard}"])


# Two logical devices in one process.


def trained(strategy, fields, place):
    """Weights, and bounds of the log, of a tiny net trained for two epochs of five steps."""
    x = np.random.default_rng(0).integers(0, 256, (60, 12), np.uint8)
    parameters = Parameters(batch=12, epochs=2, binarization="stochastic", strategy=strategy, **fields)
    with distributed.open_strategy(parameters) as devices, devices.scope():
        model = Autoencoder(x.mean(axis=0) / 255, parameters.latent_units, parameters.hidden_units)
        bound = evaluation.mean_bound(model, np.float32(x > 127), training.objective_of(parameters), parameters.k)
        training.train(model, x, parameters, place / strategy, bound)
        log = read_log(place / strategy, 2)
        return model.get_weights(), [(record["bound_train"], record["bound_validation"]) for record in log]


def mirrored(strategies, fields, place, answers):
    """In a process of its own, for devices are made before TensorFlow starts: trained by each strategy, or why not."""
    cpu, two = tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    command_line.gpus = lambda: 2
    try:
        answers.send([trained(strategy, fields, place) for strategy in strategies])
    except FloatingPointError as error:
        answers.send(str(error))


ONE = {"latent_units": (3,), "hidden_units": ((8,),)}
TWO = {"latent_units": (4, 2), "hidden_units": ((8, 8), (6,))}
REST = {"optimizer": "muon", "output_rate": 8.0, "ema": 0.9, "clip_norm": 1.0, "backward_samples": 8}
CASES = [net | {"k": k} for net in (ONE, TWO) for k in (1, 50)] + [ONE | {"k": 50} | REST]


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed"])
    root = Path(training.__file__).resolve().parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'tests'}")
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        yield context


def answer(context, fields, place, strategies=("none", "mirrored")):
    """Of `mirrored`, in its process."""
    answers, ours = context.Pipe(duplex=False)
    process = context.Process(target=mirrored, args=(strategies, fields, place, ours), daemon=True)
    process.start()
    ours.close()
    received = answers.recv()
    process.join()
    return received


@pytest.mark.slow
@pytest.mark.parametrize("fields", CASES)
def test_two_devices_train_as_one(context, tmp_path, fields):
    (weights, bounds), (others, other_bounds) = answer(context, fields, tmp_path)
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    np.testing.assert_allclose(bounds, other_bounds, rtol=1e-5)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_named_on_two_devices(context, tmp_path):
    said = answer(context, ONE | {"k": 2, "rate_scale": 1e30}, tmp_path, ["mirrored"])
    assert re.match(r"not finite in epoch 1, step \d, learning rate .*: the bound of training images", said)


# Several processes.


def worker(arguments, environment, output):
    """The program, which says a digest of the weights that it saves in the end."""
    save = training.save_weights

    def told(model, path):
        print("weights", distributed.digest(*model.get_weights()), flush=True)
        save(model, path)

    os.environ |= environment
    training.save_weights = told
    test_faults.child(arguments, None, 0, output)


def free_places(n):
    """Addresses at which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    places = [f"127.0.0.1:{place.getsockname()[1]}" for place in sockets]
    for place in sockets:
        place.close()
    return places


def start(context, n, arguments):
    """n workers, [(process, pipe of what it says)]."""
    places, started = free_places(n), []
    for index in range(n):
        said, output = context.Pipe(duplex=False)
        environment = {"TF_CONFIG": config(n, index, cluster={"worker": places})} if n > 1 else {}
        process = context.Process(target=worker, args=(arguments, environment, output), daemon=True)
        process.start()
        output.close()
        started.append((process, said))
    return started


def test_workers_meet_and_those_that_do_not_come_are_named(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "SECONDS_TO_COME", 1)
    places = dict(enumerate(sorted(free_places(3))))  # in the order in which they are told
    with pytest.raises(
        SystemExit, match=f"the workers at {places[0]}, {places[2]} did not come in 1 s: start the same"
    ):
        distributed.meet(places, 1)
    assert "waiting for the workers at" in capsys.readouterr().err
    monkeypatch.setattr(distributed, "SECONDS_TO_COME", 10)
    with ThreadPoolExecutor() as threads:
        for meeting in [threads.submit(distributed.meet, places, index) for index in places]:
            meeting.result()  # raises what it raised


def test_a_port_in_use_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {0: f"127.0.0.1:{server.getsockname()[1]}"}
        with pytest.raises(OSError, match="this worker cannot listen; way out: free ports .*in use"):
            distributed.meet(places, 0)


def end(started):
    """Wait for the end: [(exit status, what it said)]."""
    texts = []
    for process, said in started:
        with open(said.fileno(), "rb", closefd=False) as text:
            texts.append(text.read().decode())
        process.join()
    return [(process.exitcode, text) for (process, _), text in zip(started, texts, strict=True)]


def run(context, place, n, arguments):
    """n workers to their end: the run's folder."""
    ended = end(start(context, n, [*arguments, "--results_dir", str(place / "results")]))
    assert [status for status, _ in ended] == [0] * n, ended
    digests = [re.findall(r"^weights (\w+)", text, re.M) for _, text in ended]
    assert all(found == digests[0] for found in digests)  # the same weights on every worker
    return folder_of(place)


def assert_close(a, b):
    """Two runs' weights are the same but for rounding, and so are the likelihoods where there are any."""
    ours, theirs = (arrays_of(folder / "model.weights.h5") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(*(np.frombuffer(x[name], np.float32) for x in (ours, theirs)), **CLOSE)
    if (a / "log_likelihoods.npy").exists():
        np.testing.assert_allclose(*(np.load(folder / "log_likelihoods.npy") for folder in (a, b)), rtol=1e-4)


@pytest.mark.slow
def test_two_workers_train_and_evaluate_as_one(context, tiny, tmp_path):  # noqa: F811
    arguments = [*TINY.split(), "--dataset", str(tiny)]
    one, two = (run(context, tmp_path / str(n), n, arguments) for n in (1, 2))
    assert_close(one, two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    shared = np.load(two / "log_likelihoods.npy")
    (two / "results.json").unlink()
    run(context, tmp_path / "2", 1, [*arguments, "--train", "false"])
    np.testing.assert_allclose(shared, np.load(two / "log_likelihoods.npy"), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_workers_start_from_the_weights_of_another_run(context, tiny, tmp_path):  # noqa: F811
    arguments = [*TINY.split(), "--dataset", str(tiny), "--evaluate", "false"]
    first = run(context, tmp_path, 1, arguments).name.removesuffix("__seed0")
    started = start(context, 2, [*arguments, "--init_from", first, "--results_dir", str(tmp_path / "results")])
    assert [status for status, _ in end(started)] == [0, 0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The first digits of MNIST: 20 steps an epoch."""
    sample, path = load_dataset("mnist_sample"), tmp_path_factory.mktemp("data") / "digits.npz"
    sizes = {"x_train": 480, "x_validation": 20, "x_test": 100}
    np.savez(path, **{name: getattr(sample, name)[:n].reshape(-1, 28, 28) for name, n in sizes.items()})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("net, k, n", [("1", 1, 2), ("1", 50, 3), ("2", 1, 3), ("2", 50, 2)])
def test_workers_train_digits_as_one(context, digits, tmp_path, net, k, n):
    """The paper's nets, of one and two layers: 20 steps. Later on rounding grows, as it does from any other machine."""
    units = {"1": "(50,) --hidden_units (200,200),", "2": "100,50 --hidden_units (200,200),(100,100)"}[net]
    arguments = (
        f"iwae --dataset {digits} --epochs 1 --batch 24 --evaluate false --plot false --k {k} --latent_units {units}"
    )
    assert_close(*(run(context, tmp_path / str(count), count, arguments.split()) for count in (1, n)))


@pytest.mark.slow
@pytest.mark.parametrize("number, lost, then", [(9, 1, 1), (9, 0, 3), (19, 0, 2), (15, 1, 1)])
def test_a_worker_lost_stops_the_others_and_the_run_goes_on(context, tiny, tmp_path, number, lost, then):  # noqa: F811
    """By SIGKILL, SIGSTOP, SIGTERM; with as many workers as before, or others."""
    arguments = [*TINY.split(), "--dataset", str(tiny), "--epochs", "12"]
    started = start(context, 2, [*arguments, "--results_dir", str(tmp_path / "results")])
    while not list(tmp_path.glob("results/*/*/checkpoints/0000[2-9]*")):
        assert started[0][0].is_alive()
        time.sleep(0.05)
    os.kill(started[lost][0].pid, number)
    hit = time.monotonic()
    ((status, text),) = end([started[1 - lost]])
    started[lost][0].kill()
    started[lost][0].join()  # until then it has the lock
    assert time.monotonic() - hit < 60 and status == 1
    line = text.strip().splitlines()[-1]
    assert line.startswith("experiments.py: ") and "experiments.py iwae --k 2" in line
    assert not (folder_of(tmp_path) / "model.weights.h5").exists()
    assert_close(run(context, tmp_path, then, arguments), run(context, tmp_path / "whole", 1, arguments))
