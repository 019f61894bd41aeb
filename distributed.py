"""Several devices or machines as one, by tf.distribute: what replicas do together, and what is done of workers lost.

Each replica draws the random numbers of the whole batch and keeps its own part: the result is that of one device, but
for rounding. In a strategy's scope all workers make the same calls, and wait for each other in them.
"""

import contextlib
import functools
import json
import operator
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from command_line import cluster, is_first, strategy_kind
from run_folder import digest, reading, signals_go_to

SECONDS_TO_COME = 300  # from the first worker to the last
SECONDS_TO_ANSWER = 8  # a worker that has not answered twice is lost
SECONDS_BETWEEN_CHECKS = 5
LOST = (  # what a worker that is gone looks like to the others
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)
NOT_COPIED = ("tensorboard", "figures", ".lock")  # of a run's folder: what says nothing about how it goes on


def whole(tensor, axis):
    """What one device keeps of a batch: all of it."""
    return tensor


def over_replicas(share):
    """A function of all that share(own, ..) takes but `own`: the sum over replicas of the tensors that it returns.

    To be called in strategy.run. own(tensor, axis): a replica's part of a tensor of the whole batch. One device runs
    `share` as it is, for a compiled loop; on several it is compiled by itself, since XLA has no kernel for the sum.
    """
    strategy = tf.distribute.get_strategy()
    if not tf.distribute.has_strategy():
        return functools.partial(share, whole)

    @tf.function(jit_compile=True)
    def compiled(replica, *arguments):
        def own(tensor, axis):
            return tf.stack(tf.split(tensor, strategy.num_replicas_in_sync, axis))[replica]

        return share(own, *arguments)

    def summed(*arguments):
        here = tf.distribute.get_replica_context()
        parts = compiled(here.replica_id_in_sync_group, *arguments)
        return here.all_reduce(tf.distribute.ReduceOp.SUM, parts)

    return summed


def run_alike(function, *arguments):
    """What function(*arguments) returns on every replica, nested as it likes, where that is the same on all."""
    strategy = tf.distribute.get_strategy()
    values = strategy.run(function, arguments)
    return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], values)


def on_replicas(function, *stacks):
    """[function(*blocks)] for the blocks of the stacks [replicas, ..], one of each to a replica; all have all results.

    function: of tensors, returns tensors, nested as it likes.
    """
    stacks = [tf.constant(stack) for stack in stacks]
    if not tf.distribute.has_strategy():
        return [function(*(stack[0] for stack in stacks))]
    gathered = gather_results(function, tf.distribute.get_strategy())(*stacks)
    return [tf.nest.map_structure(operator.itemgetter(i), gathered) for i in range(len(stacks[0]))]


@functools.lru_cache(maxsize=8)
def gather_results(function, strategy):
    """The program of `on_replicas`: of stacks [replicas, ..], the results [replicas, ..]."""

    def own(*stacks):
        here = tf.distribute.get_replica_context()
        result = function(*(stack[here.replica_id_in_sync_group] for stack in stacks))
        return here.all_gather(tf.nest.map_structure(lambda part: part[None], result), axis=0)

    return tf.function(lambda *stacks: run_alike(own, *stacks))


def everyone(number):
    """What the worker of each replica says, an integer, in order of the replicas."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return [int(answer) for answer in on_replicas(tf.identity, np.full(replicas, number, np.int64))]


def meet(workers, index):
    """Wait until every other worker is there, which then listens at its address: TensorFlow would wait deaf and dumb.

    workers, index: of `cluster`. Leaves where one does not come, and where this one cannot listen at its own address.
    """
    places = [address.rpartition(":") for address in workers.values()]
    away = {(host.strip("[]"), int(port)) for i, (host, _, port) in enumerate(places) if i != index}
    dual = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    with reading("TF_CONFIG: this worker cannot listen; way out: free ports of these machines"):
        server = socket.create_server(("", int(places[index][2])), **dual)
    with server:
        end, told = time.monotonic() + SECONDS_TO_COME, False
        while away:
            for place in list(away):
                with contextlib.suppress(OSError), socket.create_connection(place, timeout=1):
                    away.remove(place)
            names = ", ".join(f"{host}:{port}" for host, port in sorted(away))
            if away and time.monotonic() > end:
                way_out = "start the same command on every machine that TF_CONFIG names, with its own index"
                sys.exit(f"experiments.py: the workers at {names} did not come in {SECONDS_TO_COME} s: {way_out}")
            if away and not told:
                print(f"waiting for the workers at {names}, {SECONDS_TO_COME} s at most", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2 if away else 1)  # in that second the last ones see that all are there


@contextlib.contextmanager
def open_strategy(parameters, *others):
    """The strategy of runs, TensorFlow's default one for a single device; other workers are watched until the end.

    Leaves where a batch does not split between the replicas there are; ends the process where a worker is lost.
    """
    kind, finished = strategy_kind(parameters), threading.Event()
    if kind == "multi_worker":
        workers, index = cluster()
        meet(workers, index)
        # Ctrl-C and SIGTERM end the process at once, though TensorFlow be deaf; it changes SIGTERM's handler, too.
        with reading("TF_CONFIG: its workers do not come together"), signals_go_to(signal.SIG_DFL):
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        for name in [name for i, name in enumerate(workers) if i != index]:
            threading.Thread(target=watch, args=[name, workers[name], finished], daemon=True).start()
    else:
        strategy = tf.distribute.get_strategy()
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        if kind == "mirrored" and len(devices) > 1:  # where TensorFlow cannot use the GPUs one CPU is left
            strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    replicas = strategy.num_replicas_in_sync
    for batch in {run.batch for run in (parameters, *others)}:
        if batch % replicas:
            sys.exit(f"experiments.py: batch = {batch}: {replicas} replicas do not divide it")
    try:
        yield strategy
        with strategy.scope():
            everyone(0)  # all are ready to leave
            finished.set()  # from here on one that does not answer has left
            with contextlib.suppress(tf.errors.OpError):
                everyone(0)  # which none does before all have passed the first
    except (tf.errors.OpError, OSError) as error:
        if kind != "multi_worker" or not isinstance(reason := error.__cause__ or error, LOST):
            raise
        time.sleep(4 * (SECONDS_BETWEEN_CHECKS + SECONDS_TO_ANSWER))  # `watch` may find who is lost
        stop(f"the workers lost each other ({type(reason).__name__}: {textwrap.shorten(str(reason), 200)})")
    finally:
        finished.set()


def watch(name, address, finished):
    """Stop this process where another worker twice in succession does not answer, for it would wait for ever."""
    silent = False
    while not finished.wait(SECONDS_BETWEEN_CHECKS):
        try:
            context.context().check_collective_ops_peer_health(name, 1000 * SECONDS_TO_ANSWER)
            silent = False
        except tf.errors.OpError:
            if silent and not finished.is_set():
                stop(f"the worker at {address} does not answer any more: it is dead or hangs")
            silent = True


def stop(reason):
    """End this process, which may be deep in TensorFlow, with a line on why and how to go on."""
    again = "to go on from the last checkpoint, on every worker, with as many as you like"
    print(f"\nexperiments.py: {reason}; {again}: python {shlex.join(sys.argv)}", file=sys.stderr, flush=True)
    for place in Path(tempfile.gettempdir()).glob(f"iwae.{os.getpid()}.*"):
        shutil.rmtree(place, ignore_errors=True)
    os._exit(1)


@contextlib.contextmanager
def own_folder(run, settings):
    """The run, on any worker but the first in a copy of its folder that goes when the block ends: one of them writes.

    settings: see `runs.settings`. Begins when all have theirs, ends when all are done. Leaves where they differ in what
    they were asked for, in versions, or see other files.
    """
    if strategy_kind(run.parameters) != "multi_worker":
        yield run
        return
    files = [path.relative_to(run.folder) for path in sorted(run.folder.rglob("*")) if path.is_file()]
    files = [path for path in files if path.parts[0] not in NOT_COPIED]
    seen = [(str(path), (run.folder / path).stat().st_size) for path in files]
    asked = settings | {"results_dir": "", "datasets_dir": "", "seen": seen}
    initial = run.initial / "model.weights.h5" if run.initial else None
    weights = [initial.read_bytes()] if initial and initial.exists() else []
    state = int(digest(json.dumps(asked).encode(), *weights), 16) >> 1
    with contextlib.ExitStack() as places:
        ours = run
        if not is_first(run.parameters):
            place = places.enter_context(tempfile.TemporaryDirectory(prefix=f"iwae.{os.getpid()}."))
            ours = run._replace(folder=Path(place, *run.folder.parts[-2:]))
            ours = ours._replace(results=ours.folder / run.results.relative_to(run.folder))
            for path in files:
                (ours.folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run.folder / path, ours.folder / path)
        if len(set(everyone(state))) > 1:
            way_out = "the same command on all, and a results_dir that all see"
            differ = "the workers differ in command, data, files or versions"
            sys.exit(f"experiments.py: {run.label}: {differ}; way out: {way_out}")
        yield ours
        everyone(0)  # what the first worker writes is there
