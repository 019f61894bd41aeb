"""What more workers are worth: milliseconds per step at 1, 2 and 3 over loopback, beside a model of them.

    python benchmarks/workers.py

Each worker has a core, shared where there are fewer. The model: a step on n workers takes what one takes for an n-th of
the batch, and the sum of the gradients over n workers, timed by itself. Net of one stochastic layer.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
BATCH, KS, WORKERS, STEPS, ROUNDS = 24, (1, 50), (1, 2, 3), 40, 7


def time_worker(kind, batch):
    """Print milliseconds of the sum alone, then of a step for each k, the least of some rounds, as a JSON list."""
    import numpy as np
    import tensorflow as tf
    from speed import NETS, make_images

    from distributed import open_strategy, over_replicas, run_alike
    from experiments import Parameters
    from models import Autoencoder
    from optimizers import build_optimizer
    from training import compile_stretch

    images, parameters = make_images(), Parameters(batch=batch, binarization="stochastic", strategy=kind)
    order = np.arange(len(images) // batch * batch, dtype=np.int32).reshape(-1, batch)
    inputs = order, np.full(len(order), 1e-3, np.float32), np.int32([0, 1]), 0, STEPS
    with open_strategy(parameters) as strategy, strategy.scope():
        model = Autoencoder(images.mean(axis=0) / 255, *NETS["l1"])
        add = over_replicas(lambda own, scale: [scale * variable for variable in model.phi + model.theta])
        runs = [tf.function(lambda *inputs: [run_alike(add, float(i))[0] for i in range(STEPS)][-1])]
        for run in (replace(parameters, k=k) for k in KS):
            runs.append(compile_stretch(model, build_optimizer(run, model), tf.constant(images), run, run.k))
        times = np.zeros([len(runs), ROUNDS])
        for i, j in np.ndindex(*times.shape):
            start = time.perf_counter()
            runs[i](*inputs).numpy()
            times[i, j] = 1000 * (time.perf_counter() - start) / STEPS
    print(json.dumps(times.min(axis=1).tolist()))


def measure(n, kind="multi_worker", batch=BATCH):
    """What the first of n workers prints."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    cluster = {"worker": [f"127.0.0.1:{place.getsockname()[1]}" for place in sockets]}
    for place in sockets:
        place.close()
    processes = []
    for index in range(n):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
        command = ["taskset", "-c", str(index % os.cpu_count()), sys.executable, __file__, kind, str(batch)]
        environment = os.environ | {"TF_CONFIG": config, "TF_CPP_MIN_LOG_LEVEL": "2"}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes][0]


def main():
    print("workers | k | measured, ms | model, ms | of that the sum", flush=True)
    for n in WORKERS:
        alone = measure(1, batch=BATCH // n)
        total, *steps = measure(n) if n > 1 else alone
        for k, step, share in zip(KS, steps, alone[1:], strict=True):
            print(f"{n} | {k} | {step:.2f} | {share + total - alone[0]:.2f} | {total:.2f}", flush=True)
    print(f"one process, compiled loop: {measure(1, 'none')[1:]} ms at k = {KS}, batch {BATCH}")


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else time_worker(sys.argv[1], int(sys.argv[2]))
