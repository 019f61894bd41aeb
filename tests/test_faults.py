"""What happens to real machines: processes killed at any moment, full disks, damaged files, bad numbers.

Every kill is a SIGKILL of a process of its own, forked from one that has imported TensorFlow and done nothing with it.
"""

import errno
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import signal
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import evaluation
import optimizers
import posterior
import run_folder
import runs
import training
from checkpoints import Checkpoints
from datasets_download import Dataset
from experiments import Parameters
from models import Autoencoder, save_weights
from schedules import epoch_inputs, plan_epochs

ROOT = Path(training.__file__).resolve().parent
TINY = "iwae --k 2 --latent_units 3 --hidden_units (8,), --epochs 2 --batch 5 --k_evaluation 60 --ema 0.9"
TINY = [*TINY.split(), "--snapshot_epochs", "1", "--plot", "false"]
FILES = ".index", ".data-00000-of-00001"  # of a checkpoint


def die(number=signal.SIGKILL, inside=True):
    os.write(1, b"hit inside\n" if inside else b"hit beside\n")
    os.kill(os.getpid(), number)


def on_file(count, pattern, then=die):
    """Die at the count-th time that Python opens, renames or removes a file; the pattern is of its path and mode."""
    counter = itertools.count(1)

    def hook(event, arguments):
        touched = event in ("open", "os.rename", "os.remove", "shutil.rmtree")
        if touched and re.search(pattern, f"{arguments[0]} {arguments[1]}"):
            if next(counter) == count:
                then()

    sys.addaudithook(hook)


def on_call(module, name, count, seconds, number=signal.SIGKILL):
    """Die so many seconds after the count-th call of module.name has begun, wherever XLA then is."""
    function, counter, at_work = getattr(module, name), itertools.count(1), []

    def wrapper(*arguments, **options):
        at_work.append(True)
        if next(counter) == count:
            threading.Timer(seconds, lambda: die(number, bool(at_work))).start()
        answer = function(*arguments, **options)
        at_work.clear()
        return answer

    setattr(module, name, wrapper)


def on_write(count, then):
    """In place of the count-th writing of a checkpoint: then(prefix, write), where write() writes it."""
    write, counter = tf.train.Checkpoint.write, itertools.count(1)

    def wrapper(checkpoint, prefix):
        whole = partial(write, checkpoint, prefix)
        return then(prefix, whole) if next(counter) == count else whole()

    tf.train.Checkpoint.write = wrapper


def half(prefix, write):
    """Die when half of a checkpoint's bytes are on disk."""
    write()
    data = Path(f"{prefix}{FILES[1]}")
    os.truncate(data, data.stat().st_size // 2)
    die()


def in_stretch(rng):
    on_call(training, "run_stretch", rng.randint(1, 6), rng.uniform(0, 0.02))


def in_checkpoint(rng):
    if rng.random() < 0.5:
        on_write(rng.randint(1, 5), half)
    else:
        on_file(rng.randint(1, 40), r"checkpoints|^state\.")  # by its bare name a file is removed


def in_evaluation(rng):
    on_call(evaluation, "bounds", 1, rng.uniform(0, 2))


def in_results(rng):
    on_file(rng.randint(1, 12), "/evaluation/|results.json|log_likelihoods|model.weights|log.jsonl")


def anywhere(rng):
    on_file(rng.randint(1, 40), "results/") if rng.random() < 0.5 else threading.Timer(rng.uniform(0, 4), die).start()


def asked(number):
    return lambda rng: on_call(training, "run_stretch", 2, 0, number)


def full_disk(rng):
    """From one write on no file may grow beyond some bytes: the kernel refuses, as it does where the disk is full."""
    size = rng.choice([0, 100])

    def fill():
        os.write(1, b"hit inside\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    if rng.random() < 0.5:
        on_write(rng.randint(1, 5), lambda _, write: (fill(), write()))
    else:
        on_file(rng.randint(1, 12), r"partial\.\d+\.\S*(json|jsonl|npz|npy|png) wb?$", fill)


PHASES = {f.__name__: f for f in (in_stretch, in_checkpoint, in_evaluation, in_results, anywhere)}
FAULTS = PHASES | {"SIGINT": asked(signal.SIGINT), "SIGTERM": asked(signal.SIGTERM), "full_disk": full_disk}


def child(arguments, fault, seed, output):
    """The program in a process of its own, with a fault at a place that the seed draws."""
    os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    run_folder.SECONDS_BETWEEN_CHECKPOINTS = 0
    if fault:
        FAULTS[fault](random.Random(seed))
    sys.argv = ["experiments.py", *arguments]
    runpy.run_path(str(ROOT / "experiments.py"), run_name="__main__")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    sizes = {"x_train": 2000, "x_validation": 20, "x_test": 3000}
    np.savez(path, **{key: rng.integers(0, 256, (n, 4, 4), np.uint8) for key, n in sizes.items()})
    return path


@pytest.fixture(scope="module")
def start(tiny):
    """A function (place, fault, seed): a run with that fault; its exit status, -9 if it was killed, and all it said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "plotting"])

    def call(place, fault=None, seed=0):
        arguments = [*TINY, "--dataset", str(tiny), "--results_dir", str(place / "results")]
        said, output = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(arguments, fault, seed, output), daemon=True)
        process.start()
        output.close()
        with open(said.fileno(), "rb", closefd=False) as text:
            text = text.read().decode()
        process.join()
        return process.exitcode, text

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        yield call


def folder_of(place):
    (folder,) = (place / "results").glob("*/*__seed0")
    return folder


def arrays_of(path):
    """Every weight of a Keras file."""
    arrays = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: arrays.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    return arrays


def outcome(place):
    """What a run leaves, seconds aside: weights and likelihoods to the last bit, the log, the results."""
    folder = folder_of(place)
    assert not list(folder.rglob("partial.*")) and not (folder / "evaluation").exists()
    return {
        "weights": arrays_of(folder / "model.weights.h5"),
        "snapshot": arrays_of(folder / "snapshots" / "epoch0001.weights.h5"),
        "log_likelihoods": (folder / "log_likelihoods.npy").read_bytes(),
        "log": [record | {"seconds": 0} for record in run_folder.read_log(folder, 2)],
        "results": json.loads((folder / "results.json").read_text()) | {"train_seconds": 0, "digest": "of seconds too"},
    }


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The outcome of a run that nothing stopped."""
    place = tmp_path_factory.mktemp("whole")
    status, said = start(place)
    assert status == 0, said
    return outcome(place)


def go_through(faults, start, whole, tmp_path):
    """Runs in one folder, each going on from the one before, meet one fault each; whatever ends, ends alike."""
    met, place = 0, tmp_path / "0"
    for seed in range(5 * len(faults)):
        place.mkdir(exist_ok=True)
        status, said = start(place, faults[met], seed)
        check_fault(faults[met], status, said)
        for log in place.rglob("log.jsonl"):
            assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] in ([], [1], [1, 2])
        if status == 0:  # it ended before the fault came
            assert outcome(place) == whole
            place = tmp_path / str(seed + 1)
        met += "hit inside" in said
        if met == len(faults):
            break
    assert met == len(faults)
    place.mkdir(exist_ok=True)
    status, said = start(place)
    assert status == 0, said
    assert outcome(place) == whole


def check_fault(fault, status, said):
    """A fault that does not kill is told in one line: what, where, and the way out."""
    lines = [line for line in said.splitlines() if line.startswith("experiments.py: ")]
    if fault in PHASES:
        assert status in (0, -signal.SIGKILL), said
    elif status != 0:
        assert status == 1 and len(lines) == 1 and "Traceback" not in said, said
        if fault == "full_disk":
            assert re.search("cannot write .*__seed0.*: File too large; what .* stands. Way out: make room", lines[0])
        else:
            assert re.search(r"stopped; to go on where it was: python \S*experiments.py iwae --k 2 .*", lines[0])


@pytest.mark.slow
def test_one_run_through_fault_after_fault(start, whole, tmp_path):
    go_through([*FAULTS], start, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_often(start, whole, tmp_path, phase):
    """10 kills in each of five phases: 50."""
    go_through(10 * [phase], start, whole, tmp_path)


@pytest.mark.slow
def test_full_disk_often(start, whole, tmp_path):
    go_through(6 * ["full_disk"], start, whole, tmp_path)


# Damaged checkpoints, two processes, bad numbers: in this process, on the functions themselves.


def state(n):
    values = {"progress": np.array([n, 0.5]), "weights": np.full((3, 4), n, np.float32), "step": np.int64(n)}
    return {name: tf.Variable(value) for name, value in values.items()}


@pytest.fixture
def newest(tmp_path):
    """Three states saved, of which two are kept: the folder of the last."""
    for n in (1, 2, 3):
        Checkpoints(tmp_path, **state(n)).save(f"{n:05d}-0")
    return tmp_path / "00003-0"


def restored(folder):
    """Which state the variables of state(0) then hold, each to the last bit; 0 where none was found."""
    variables = state(0)
    Checkpoints(folder, **variables).restore()
    n = int(variables["step"])
    for name, value in state(n).items():
        np.testing.assert_array_equal(variables[name], value)
    return n


def test_the_newest_of_two_generations(newest, capsys):
    assert sorted(path.name for path in newest.parent.iterdir()) == ["00002-0", "00003-0"]
    assert restored(newest.parent) == 3 and capsys.readouterr().err == ""
    assert restored(newest / "none") == 0


DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "zeros": lambda data: bytes(len(data)),
    "something else": lambda data: b"<html>",
    "something longer": lambda data: b"<html>" * len(data),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [*DAMAGE, "gone"])
def test_damaged_checkpoint_is_told_and_the_one_before_is_used(newest, file, damage, capsys):
    def harm(folder):
        path = folder / f"state{file}"
        path.unlink() if damage == "gone" else path.write_bytes(DAMAGE[damage](path.read_bytes()))

    for _ in range(2):
        harm(newest)
        assert restored(newest.parent) == 2
        said = capsys.readouterr().err
        assert f"damaged.{newest.name}: damaged; going on from the state before\n" in said and said.count("\n") == 1
        Checkpoints(newest.parent, **state(3)).save(newest.name)  # the damaged one is no generation
        assert restored(newest.parent) == 3 and newest.with_name("00002-0").exists()
    harm(newest)
    harm(newest.with_name("00002-0"))
    assert restored(newest.parent) == 0 and "starting from the beginning" in capsys.readouterr().err


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_is_seen(newest, file):
    """But in what is not read of the index, an empty block and padding at its end: the values are then right."""
    path = newest / f"state{file}"
    data = path.read_bytes()
    unread = range(len(data) - 81, len(data) - 8) if file == ".index" else ()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        if restored(newest.parent) == 2:
            newest.with_name(f"damaged.{newest.name}").rename(newest)
        else:
            assert place in unread and restored(newest.parent) == 3, place


def test_checkpoint_on_a_full_disk(tmp_path):
    """One line, nothing half-written, and the state before stands; with room the same state is saved."""
    Checkpoints(tmp_path, **state(1)).save("00001-0")
    checkpoints, limits = Checkpoints(tmp_path, **state(2)), resource.getrlimit(resource.RLIMIT_FSIZE)
    words = f"^cannot write {tmp_path}/00002-0: File too large; what was there before stands. Way out: make room"
    for size in (0, 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=words):
                checkpoints.save("00002-0")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in tmp_path.iterdir()] == ["00001-0"] and restored(tmp_path) == 1
    checkpoints.save("00002-0")
    assert restored(tmp_path) == 2


def test_evaluation_goes_on_from_whole_blocks_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    x, kept, seen = np.arange(40, dtype=np.float32).reshape(20, 2), tmp_path / "evaluation" / "key.npz", []

    def double(images, seed):
        seen.append(int(seed[1]))
        return 2 * images

    def results(size=6):
        seen.clear()
        return evaluation.map_images(double, x, 0, size, kept=kept)

    assert np.array_equal(results(), 2 * x) and seen == [0, 6, 12, 18]
    data = kept.read_bytes()
    assert np.array_equal(results(), 2 * x) and seen == []
    assert np.array_equal(results(size=7), 2 * x) and seen == [0, 7, 14]
    flipped = [data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :] for i in range(0, len(data), 7)]
    for damaged in [harm(data) for harm in DAMAGE.values()] + flipped:
        kept.write_bytes(damaged)
        assert np.array_equal(results(), 2 * x)


def test_a_stopped_evaluation_keeps_its_finished_blocks(tmp_path):
    """By Ctrl-C or SIGTERM, however short the time since the last were kept."""
    x, kept, seen = np.arange(40, dtype=np.float32).reshape(20, 2), tmp_path / "key.npz", []

    def double(images, seed):
        seen.append(int(seed[1]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return 2 * images

    with pytest.raises(KeyboardInterrupt):
        evaluation.map_images(double, x, 0, 6, kept=kept)
    assert np.array_equal(evaluation.map_images(double, x, 0, 6, kept=kept), 2 * x) and seen == [0, 6, 12, 12, 18]


def hold(folder, ready):
    with run_folder.lock(folder):
        ready.set()
        signal.pause()


def test_second_process_stops_at_once_and_a_dead_one_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready), daemon=True)  # ends with a test that fails
    process.start()
    assert ready.wait(20)
    with pytest.raises(SystemExit, match=f"another process is at work in {tmp_path}: wait") as left:
        with run_folder.lock(tmp_path):
            pytest.fail("two hold it")
    assert "\n" not in left.value.code
    process.kill()
    process.join()
    (tmp_path / "checkpoints" / "partial.7.00001-0" / "state_temp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "partial.7.00001-0" / "state_temp" / "partial.part").write_bytes(b"half")
    (tmp_path / "partial.7.log.jsonl").write_text("half")
    with run_folder.lock(tmp_path):
        assert not any((tmp_path / "checkpoints").iterdir()) and not list(tmp_path.glob("partial.*"))


def test_a_lock_that_is_waited_for_clears_no_more_than_asked(tmp_path, capsys):
    """As of data sets and comparisons, in whose folders others are at work."""
    for name in ("partial.7.comparison.md", "comparison/partial.7.a.png", "run/partial.7.log.jsonl", "partial.csv"):
        run_folder.write_text(tmp_path / name, "")
    with run_folder.lock(tmp_path, inside=[".", "comparison"]):
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("partial.*"))
        assert left == ["partial.csv", "run/partial.7.log.jsonl"]
        waiting = threading.Thread(target=lambda: run_folder.lock(tmp_path, wait=True).__enter__(), daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and "waiting for its end" in capsys.readouterr().err
    waiting.join(20)
    assert not waiting.is_alive() and not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace", "open", "mkdir"])
def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, number, call):
    path = tmp_path / "log.jsonl"
    run_folder.write_text(path, "old")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*{"open": (io, "open"), "mkdir": (Path, "mkdir")}.get(call, (os, call)), fail)
    words = f"cannot write {path}: {os.strerror(number)}; what was there before stands. Way out: make room"
    with pytest.raises(OSError, match=words):
        run_folder.write_text(path, "new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"] and path.read_text() == "old"


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*: (File exists|Not a directory)"):
        run_folder.write_text(tmp_path / "results" / "log.jsonl", "new")
    with pytest.raises(OSError, match="cannot write .*: (File exists|Not a directory)"):
        run_folder.lock(tmp_path / "results" / "run").__enter__()


def test_tensorboard_that_cannot_be_written(tmp_path):
    writer = tf.summary.create_file_writer(str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write tensorboard/: .*File too large.*Way out"):
            training.write_tensorboard(writer, {"epoch": 1, "bound_train": -1.0}, dict)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# A folder that was touched by other hands, or by another version.


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def finished(tmp_path, small_net):
    """A folder with what a run of two epochs leaves that is read again."""
    folder, record = tmp_path / "run", {"epoch": 1, "bound_train": -2.0, "bound_validation": -2.0, "seconds": 1}
    run_folder.write_text(folder / "log.jsonl", "".join(json.dumps(record | {"epoch": n}) + "\n" for n in (1, 2)))
    (folder / "log_likelihoods.npy").write_bytes(npy(-np.ones(3, np.float32)))
    results = runs.sealed(dict.fromkeys(runs.RESULTS, 1), npy(-np.ones(3, np.float32)))
    (folder / "results.json").write_text(json.dumps(results))
    np.savez(folder / "arrays.npz", x=np.ones(3))
    shape = {"features": 12, "latent_units": [4], "hidden_units": [[8, 8]], "likelihood": "bernoulli"}
    (folder / "parameters.json").write_text(json.dumps(shape))
    save_weights(small_net(), folder / "model.weights.h5")
    return folder


READERS = {
    "log.jsonl": lambda folder: run_folder.read_log(folder, 2),
    "results.json": runs.read_results,
    "log_likelihoods.npy": runs.read_results,
    "arrays.npz": lambda folder: runs.read_arrays(folder / "arrays.npz"),
    "model.weights.h5": runs.load_model,
}
FOREIGN = {
    "log.jsonl": [b'{"epoch": 1}\n', b"[1]\n"],
    "results.json": [b"[]", b"null", b'{"nll": 1}', json.dumps(dict.fromkeys(runs.RESULTS, 1)).encode()],
    "log_likelihoods.npy": [npy(np.ones(4)), npy(np.array([{}] * 3)), npy(-np.ones(3, "<f4") - 2.0**-23)],
}


UNSEEN = {"log.jsonl": {"one byte short"}, "arrays.npz": {"one bit"}}  # the end of a line, what zip does not read


@pytest.mark.parametrize("file", READERS)
def test_damaged_file_of_a_run_is_one_line_with_the_way_out(finished, file):
    path, read = finished / file, READERS[file]
    good = path.read_bytes()
    changed = DAMAGE | {f"foreign {i}": lambda _, data=data: data for i, data in enumerate(FOREIGN.get(file, []))}
    unseen = set()
    for name, change in [("gone", None), *changed.items()]:
        path.unlink() if name == "gone" else path.write_bytes(change(good))
        try:
            read(finished)
            unseen.add(name)
        except OSError as error:
            said = str(error)
            assert str(path) in said and " is damaged or missing; what else is there stands. Way out: delete " in said
            assert "\n" not in said
    assert unseen == UNSEEN.get(file, set())


def test_a_damaged_snapshot_is_one_line_with_the_way_out(small_net, x_small, tmp_path):
    (tmp_path / "epoch0001.weights.h5").write_bytes(b"half")
    with pytest.raises(OSError, match="epoch0001.weights.h5 is damaged .*delete it, and the same command draws"):
        posterior.snapshot_arrays(small_net(), {1: tmp_path / "epoch0001.weights.h5"}, x_small)


def test_a_flipped_bit_of_any_weight_is_seen(finished):
    path = finished / "model.weights.h5"
    for name in arrays_of(path):
        with h5py.File(path, "a") as file:
            good = file[name][()]
            file[name][...] = (good.view(np.int32) ^ 1).view(np.float32)
        with pytest.raises(OSError, match="model.weights.h5 is damaged .*these are not the weights that were written"):
            runs.load_model(finished)
        with h5py.File(path, "a") as file:
            file[name][...] = good
    runs.load_model(finished)


def test_other_weights_are_not_taken_for_the_runs(finished):
    save_weights(Autoencoder(np.full(12, 0.5), (5,), ((8, 8),)), finished / "model.weights.h5")
    with pytest.raises(OSError, match="model.weights.h5 is damaged .*delete .*/run, and take it by --pretrained"):
        runs.load_model(finished)
    (finished / "checkpoints").mkdir()
    with pytest.raises(OSError, match="model.weights.h5 is damaged .*delete it, and the command that trained it makes"):
        runs.load_model(finished)


@pytest.mark.parametrize(
    "damage", ["gone", *(pytest.param(d, marks=[pytest.mark.slow] * (d != "half")) for d in DAMAGE)]
)
def test_a_damaged_log_is_written_again_from_the_checkpoint(
    small_net, x_small, tmp_path, monkeypatch, damage, uncompiled
):
    """Of a training that goes on, and of one that has ended once its model.weights.h5 is deleted, as is advised."""
    parameters = replace(Parameters(), batch=30, k=1, epochs=2, binarization="fixed")
    path, bounds = tmp_path / "log.jsonl", iter([-2.0, np.nan, -1.0])
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    with pytest.raises(FloatingPointError):
        training.train(small_net(), x_small, parameters, tmp_path, lambda: next(bounds))
    for _ in range(2):
        path.unlink() if damage == "gone" else path.write_bytes(DAMAGE[damage](path.read_bytes()))
        training.train(small_net(), x_small, parameters, tmp_path, lambda: next(bounds))
        log = run_folder.read_log(tmp_path, 2)
        assert [record["bound_validation"] for record in log] == [-2.0, -1.0]
        (tmp_path / "model.weights.h5").unlink()


def begun(place, version="2.0", pixel=0, trained=False):
    """What `open_run` says of a folder that a run of that TensorFlow, on images of that grey, has begun or ended."""
    images = np.full((2, 4), pixel, np.uint8)
    data = Dataset("tiny", images, images, images, None, None, None, "fixed", (2, 2))
    parameters = replace(Parameters(), results_dir=str(place), batch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "versions", lambda: {"tensorflow": version})
        folder = runs.open_run("iwae", parameters, data).folder
        if not folder.exists():
            run_folder.write_text(folder / "parameters.json", json.dumps(runs.settings(parameters, data)))
    if trained:
        (folder / "model.weights.h5").touch()
    return folder


def test_training_goes_on_with_the_same_data_and_versions_alone(tmp_path):
    """What is trained already may be evaluated by another version: its parameters.json stays as it is."""
    folder = begun(tmp_path)
    assert begun(tmp_path) == folder
    with pytest.raises(SystemExit, match=r"holds another run:\n.*\n  tensorflow +'2.0' +'2.1'\nWay out"):
        begun(tmp_path, version="2.1")
    with pytest.raises(SystemExit, match=r"holds another run:\n.*\n  data +'\w{16}' +'\w{16}'\nWay out"):
        begun(tmp_path, pixel=255)
    begun(tmp_path, trained=True)
    assert begun(tmp_path, version="2.1") == folder
    with pytest.raises(SystemExit, match="data"):
        begun(tmp_path, version="2.1", pixel=255)
    (folder / "parameters.json").unlink()
    with pytest.raises(OSError, match="parameters.json is damaged or missing"):
        begun(tmp_path)


@pytest.mark.parametrize("text", ['{"k": 1', "[1, 2]", "", "null"])
def test_parameters_that_cannot_be_read(tmp_path, text):
    (tmp_path / "parameters.json").write_text(text)
    with pytest.raises(OSError, match="parameters.json is damaged or missing; .*Way out: delete that folder"):
        run_folder.check_parameters(tmp_path, {"k": 1}, set())


# Bad numbers.


def spoil_weights(model):
    model.decoder[0].head.bias.assign_add(12 * [np.inf])


def spoil_gradient(model):
    """A density whose value is finite and whose gradient is not: the root of 0."""
    log_joint = model.log_joint
    model.log_joint = lambda x, z: log_joint(x, z) + tf.sqrt(tf.abs(model.decoder[0].head.bias[0] * 0.0))


def spoil_image(model):
    log_joint = model.log_joint
    model.log_joint = lambda x, z: log_joint(x, z) + tf.where(tf.reduce_sum(x, -1) == 12, np.nan, 0.0)


def spoil_update(model):
    """A gradient that is finite, but not its square: bounds are finite for ever, and other variables too for a step."""
    bias, log_joint = model.decoder[0].head.bias, model.log_joint
    huge = lambda: 1e30 * (bias[0] - tf.stop_gradient(bias[0]))  # noqa: E731
    model.log_joint = lambda x, z: log_joint(x, z) + tf.where(tf.reduce_sum(x, -1) == 12, huge(), 0.0)


SPOILT = {  # what is spoilt: whether by image 17 alone, what is said of layers
    spoil_weights: (False, "gaussian_layer"),
    spoil_gradient: (False, "data_layer"),
    spoil_image: (True, "gaussian_layer"),
    spoil_update: (True, r"no layer, but its largest value, \d\.\de\+\d\d, overflows the optimizer or clip_norm"),
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spoil, clip_norm", [*[(spoil, None) for spoil in SPOILT], (spoil_update, 10)])
def test_bad_step_is_named(small_net, x_small, tmp_path, monkeypatch, request, spoil, clip_norm, compiled):
    """With its epoch, step, rate, images and layers; weights and optimizer, here and on disk, are those before it."""
    if not compiled:
        request.getfixturevalue("uncompiled")
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    parameters = replace(Parameters(), batch=5, k=2, schedule="hold", epochs=2, binarization="fixed")
    parameters, x, model = replace(parameters, clip_norm=clip_norm), x_small.copy(), small_net(layers=2)
    x[x.sum(1) == 12] = 0
    x[17] = 1  # what spoil_image looks for
    spoil(model)
    order = epoch_inputs(plan_epochs(parameters)[0], 60, parameters)[0]
    by_image, layers = SPOILT[spoil]
    bad = int(np.argwhere(order == 17)[0, 0]) if by_image else 0
    with pytest.raises(FloatingPointError) as error:
        training.train(model, x, parameters, tmp_path, lambda: 0.0)
    said = str(error.value)
    assert f"not finite in epoch 1, step {bad}, learning rate 0.001:" in said
    assert f"Way out: {'a lower --clip_norm' if clip_norm else '--clip_norm 10'}, " in said
    images = {spoil_image: "[17]", spoil_weights: str(order[0].tolist())}.get(spoil, "none")
    assert f"the bound of training images {images} of {order[bad].tolist()};" in said
    assert re.search(f"gradient of {layers}", said)
    assert all(np.isfinite(v.numpy()).all() for v in model.variables if spoil is not spoil_weights)
    saved = list(tmp_path.glob("checkpoints/*"))
    assert len(saved) == min(2, bad * training.STRETCHES_PER_EPOCH // len(order))
    for path in saved:
        reader = tf.train.load_checkpoint(str(path / "state"))
        names = [name for name in reader.get_variable_to_shape_map() if re.match("(model|optimizer)/.*VALUE$", name)]
        assert names and all(np.isfinite(reader.get_tensor(name)).all() for name in names)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_validation_bound_that_is_not_finite_stops_the_training(
    small_net, x_small, tmp_path, monkeypatch, value, uncompiled
):
    """It is neither logged nor kept in a checkpoint, nor are the weights it is of."""
    parameters, bounds = replace(Parameters(), batch=30, k=1, epochs=2, binarization="fixed"), iter([-1.0, value])
    words = "^not finite in epoch 2: the bound of validation images. The last checkpoint stands; .* Way out: [^\n]*$"
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    with pytest.raises(FloatingPointError, match=words):
        training.train(small_net(), x_small, parameters, tmp_path, lambda: next(bounds))
    assert len(run_folder.read_log(tmp_path, 1)) == 1 and not (tmp_path / "model.weights.h5").exists()
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == "00001-4"


def test_snapshots_of_epochs_that_are_past_are_told_at_the_start(
    small_net, x_small, tmp_path, monkeypatch, capsys, uncompiled
):
    parameters, bounds = replace(Parameters(), batch=30, k=1, epochs=3, binarization="fixed"), iter([-1.0, np.nan])
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    with pytest.raises(FloatingPointError):
        training.train(small_net(), x_small, parameters, tmp_path, lambda: next(bounds))
    capsys.readouterr()
    parameters = replace(parameters, snapshot_epochs=(1, 2))
    training.train(small_net(), x_small, parameters, tmp_path, lambda: -1.0)
    first, second = capsys.readouterr().out.splitlines()
    assert "the weights of epochs 1 were not kept: for them delete" in first and "about" in second
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["epoch0002.weights.h5"]


def test_clipped_gradient_has_the_norm_asked_for(small_net, x_small, tmp_path, monkeypatch):
    """Seen through plain gradient descent: the step's length is rate times norm, and the direction is kept."""
    steps = {}
    for clip_norm in (None, 0.01):
        model, parameters = small_net(), replace(Parameters(), batch=60, k=2, binarization="fixed", clip_norm=clip_norm)
        optimizer = keras.optimizers.SGD()
        optimizer.build(model.phi + model.theta)
        before = [variable.numpy() for variable in model.phi + model.theta]
        stretch = training.compile_stretch(model, optimizer, tf.constant(x_small), parameters, 2)
        inputs = epoch_inputs(plan_epochs(parameters)[0], 60, parameters)
        stretch(*inputs, 0, 1)
        after = [variable.numpy() for variable in model.phi + model.theta]
        steps[clip_norm] = np.concatenate([(b - a).ravel() for a, b in zip(before, after, strict=True)])
    norms = {clip_norm: np.linalg.norm(step) for clip_norm, step in steps.items()}
    assert norms[0.01] == pytest.approx(0.001 * 0.01, rel=1e-2) and norms[None] > 10 * norms[0.01]
    cosine = steps[None] @ steps[0.01] / (norms[None] * norms[0.01])
    assert cosine > 0.999


@pytest.mark.slow
def test_a_step_taken_again_is_the_same_step(small_net, x_small):
    """The same binarisation and samples as inside the compiled loop: other draws would be off by far more."""
    model, parameters = small_net(layers=2), replace(Parameters(), batch=10, k=2, binarization="stochastic")
    x = np.uint8(255 * (0.2 + 0.6 * x_small))
    stretch = training.compile_stretch(
        model, optimizers.build_optimizer(parameters, model), tf.constant(x), parameters, 2
    )
    inputs = epoch_inputs(plan_epochs(parameters)[0], 60, parameters)
    again = [np.mean(training.replay(model, x, parameters, 2, inputs, step)[0]) for step in (3, 4)]
    assert abs(again[0] - again[1]) > 0.01
    assert again[0] == pytest.approx(float(stretch(*inputs, 3, 4)), rel=1e-5)


def test_a_name_too_long_for_a_folder_is_told_with_the_way_out(tmp_path):
    images = np.zeros((2, 4), np.uint8)
    data = Dataset("tiny", images, images, images, None, None, None, "fixed", (2, 2))
    with pytest.raises(SystemExit, match=r"iwae__iwae.*: 307 characters, 200 may be: enter it in NAMED_RUNS"):
        runs.open_run("iwae__" * 50, replace(Parameters(), results_dir=str(tmp_path), batch=1), data)


def test_what_h5py_says_of_a_full_disk_is_one_line(tmp_path):
    """It raises RuntimeError or OSError, in several lines; another RuntimeError stays what it is."""
    for kind in (RuntimeError, OSError, partial(OSError, 28)):
        with pytest.raises(OSError, match="cannot write .*w.h5: No space left on device; what .* Way out") as caught:
            with run_folder.whole_file(tmp_path / "w.h5"):
                raise kind("flush failed (file write failed: time = Wed\n, filename = 'w.h5', errno = 28, total = 8)")
        assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), run_folder.whole_file(tmp_path / "w.h5"):
        raise RuntimeError("something else")


def test_what_may_not_be_read_is_not_called_damaged():
    with pytest.raises(OSError, match="no right to read a.json; way out: give it"), run_folder.reading("damaged"):
        raise PermissionError(13, "Permission denied", "a.json")
    with pytest.raises(OSError, match="no right to read .*name = 'w.h5'.*; way out"), run_folder.reading("damaged"):
        raise PermissionError(13, "unable to open file: name = 'w.h5'")  # h5py's


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EACCES, "no right to read .*way out: give it, and the same"),
        (errno.EMFILE, "00003-0 cannot be read, and stands"),
    ],
)
def test_a_state_that_cannot_be_read_now_is_not_set_aside(newest, monkeypatch, number, words):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=words):
        Checkpoints(newest.parent, **state(0)).restore()
    assert newest.exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}: no lock can be had there, Function not implemented; "):
        run_folder.lock(tmp_path).__enter__()


def test_tensorboard_that_cannot_be_written_is_one_line(small_net, x_small, tmp_path, uncompiled):
    (tmp_path / "tensorboard").write_text("in the way")
    parameters = replace(Parameters(), batch=30, k=1, epochs=1, binarization="fixed")
    with pytest.raises(OSError, match="cannot write .*tensorboard: .*what was there before stands"):
        training.train(small_net(), x_small, parameters, tmp_path, lambda: 0.0)
