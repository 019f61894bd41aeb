"""Train, evaluate and compare VAE and IWAE: edit PARAMETERS below and run this file, or name runs on the command line.

python experiments.py                                       PARAMETERS, once per objective in COMPARE
python experiments.py iwae_l1_k50 --epochs 3 --seed 2       a named run, any field of Parameters overridden
python experiments.py estimators                            a named group of runs, compared with its first
python experiments.py estimators --shard 1/3                a third of them: two shards never take the same run
python experiments.py --list                                the named runs and groups, with the paper's numbers
python experiments.py --report                              the README's tables of what is in pretrained/, again
"""

import contextlib
import shlex
import signal
import sys
from dataclasses import dataclass, replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("experiments.py: stopped before anything was begun"))

from command_line import (
    EVALUATION,
    NOT_IN_NAME,
    OBJECTIVE_PARAMETERS,
    OBJECTIVES,
    illegal_values,
    is_first,
    leave,
    parse,
    problems,
    run_name,
    start_tensorflow,
    unknown,
)
from comparison import compare
from datasets_download import DatasetError, own_binarization
from report import PAPER, SWITCHED, write_report
from run_folder import lock
from runs import diagnose_run, evaluate_run, initial_folder, load_data, open_run, plot_run, settings, train_run


@dataclass(frozen=True)
class Parameters:
    """A run. These defaults are fixed points for the names of folders: edit PARAMETERS below instead."""

    dataset: str = "mnist"  # mnist, mnist_fixed, omniglot, fashion_mnist, mnist_sample or path/to/your.npz
    binarization: str | None = None  # stochastic, fixed or none (continuous data); None: the data set's own
    # The bound and the estimator of its gradient (losses.py): vae, iwae, stl, dreg, rws, rws_dreg, ciwae, miwae,
    # miwae_dreg, piwae, vr or vr_dreg. In PARAMETERS, COMPARE sets it.
    objective: str = "iwae"
    beta: float | None = None  # ciwae only: share of the ELBO, in [0, 1]
    groups: int | None = None  # miwae, miwae_dreg and piwae only: a divisor of k
    alpha: float | None = None  # vr and vr_dreg only: the Renyi divergence's order, in [0, 1)
    k: int = 5  # samples per image in training, 1 or more
    latent_units: tuple = (50,)  # units of each stochastic layer, nearest the data first
    hidden_units: tuple = ((200, 200),)  # for each stochastic layer: the tanh layers between it and what lies below
    likelihood: str = "bernoulli"  # bernoulli, or gaussian for continuous data
    schedule: str = "quick"  # quick or hold (16 passes), fast (130), paper (3280) or switch (60): schedules.py
    epochs: int | None = None  # passes over the training images; cuts `paper` short, rescales others; None: all
    rate_scale: float | None = None  # multiplies the learning rates of the schedule, above 0; None: as they stand
    batch: int = 20  # images per step
    optimizer: str = "adam"  # adam or muon
    beta_1: float = 0.9  # Adam: decay of the first moment, in [0, 1)
    beta_2: float = 0.999  # Adam: decay of the second moment, in [0, 1)
    epsilon: float = 1e-4  # Adam: added to the root of the second moment, above 0
    momentum: float = 0.95  # Muon: its momentum, in [0, 1); Muon trains biases by Adam
    output_rate: float | None = None  # Muon: multiplies the rate of the output layer's weights, above 0; None: as it is
    ema: float = 0.0  # decay, in [0, 1), of the weights' average over steps, which is evaluated; 0: no average
    clip_norm: float | None = None  # limit on the norm of the whole gradient, above 0; None: none, as in the paper
    backward_samples: int | None = None  # differentiate only so many of the k samples, resampled; None: all
    snapshot_epochs: tuple = ()  # keep the weights at these epochs, in snapshots/
    # A trained run's folder, or its name without seed in results/ or pretrained/, whose weights training starts from.
    init_from: str | None = None
    seed: int = 0  # weights, order of the images, every random number: 0 or more
    k_evaluation: int = 500  # samples per image for the log-likelihood L_k; the paper has 5000
    split: str = "test"  # evaluate on train, validation or test images
    images: int | None = None  # the first so many of them, 2 or more; None: all
    units: str = "all"  # evaluate the net as it is, or with its active latent units alone: all or active
    pretrained: bool = False  # take the weights in pretrained/, of the paper's cells those by `fast`, and train nothing
    train: bool = True  # train, or go on where a training was stopped; False: take what is on disk
    evaluate: bool = True  # log-likelihood, ELBO, active units
    plot: bool = True  # figures
    diagnose: bool = False  # importance weights, gradients and cost of every objective on the trained net; minutes
    # auto, none (one device), mirrored (all GPUs of this machine) or multi_worker (the machines that TF_CONFIG names).
    strategy: str = "auto"
    results_dir: str = "results"  # where runs are written
    datasets_dir: str | None = None  # where data are cached; None: $IWAE_DATASETS_DIR, or datasets/ beside this file

    def __new__(cls, **fields):  # of an unknown field Python would say no more than that it is unexpected
        legal = cls.__annotations__
        leave([unknown("field of Parameters", name, legal) for name in fields if name not in legal])
        return super().__new__(cls)


# ---------------------------------------------------------------------------------------------- edit here
PARAMETERS = Parameters(
    dataset="mnist",
    k=5,
    latent_units=(50,),
    hidden_units=((200, 200),),
    schedule="quick",
    k_evaluation=500,
    seed=0,
)
COMPARE = ("vae", "iwae")  # objectives to train PARAMETERS with, side by side
# --------------------------------------------------------------------------------------------------------

NETS = {"l1": ((50,), ((200, 200),)), "l2": ((100, 50), ((200, 200), (100, 100)))}  # latent_units, hidden_units
NETS["2d"] = ((2,), ((200, 200),))  # not the paper's: a latent space to be seen as it is


def run_named(name, **others):
    """The run of a name such as iwae_l1_k50: objective, net and k are in it. others: what else it has."""
    objective, net, k = name.split("_")
    latent_units, hidden_units = NETS[net]
    return Parameters(objective=objective, k=int(k[1:]), latent_units=latent_units, hidden_units=hidden_units, **others)


NAMED_RUNS = {name: run_named(name, schedule="paper", k_evaluation=5000) for name in PAPER}
# The paper's cells, and dreg, by 130 passes in place of 3280.
FAST = {"schedule": "fast", "optimizer": "muon", "output_rate": 8.0, "batch": 400, "epsilon": 1e-8, "ema": 0.997}
FAST |= {"k_evaluation": 5000}
NAMED_RUNS |= {
    f"{name}_fast": run_named(name, backward_samples=16 if name.endswith("k50") else None, **FAST)
    for name in (*PAPER, "dreg_l1_k5", "dreg_l1_k50", "dreg_l2_k5", "dreg_l2_k50")
}
NAMED_RUNS |= {
    f"{name}_fast": replace(NAMED_RUNS[f"{then}_fast"], schedule="switch", init_from=f"{first}_fast")
    for name, (first, then, *_) in SWITCHED.items()
}
POSTERIOR_2D = ("vae_2d_k5", "iwae_2d_k1", "iwae_2d_k5", "iwae_2d_k30", "iwae_2d_k50")
TRAINED_2D = {"schedule": "hold", "epochs": 30, "snapshot_epochs": (1, 2, 4, 8, 16)}
NAMED_RUNS |= {name: run_named(name, **TRAINED_2D) for name in POSTERIOR_2D}
ALIASES = {"iwae_l1_k1": "vae_l1_k1", "iwae_l2_k1": "vae_l2_k1"}  # at k = 1 the two bounds are one
# Where all objectives are compared: between the ends at which a parameter makes `iwae` and `vae` of them.
OWN_VALUES = {"beta": 0.5, "groups": 2, "alpha": 0.5}
OWN = {objective: {name: OWN_VALUES[name]} for objective, name in OBJECTIVE_PARAMETERS.items()}
ALL_OBJECTIVES = dict.fromkeys(("iwae", *OBJECTIVES))  # `iwae` first

# Names of several runs, the first of which the others are compared with.
GROUPS = {
    "estimators": [Parameters(objective=name, k=8, schedule="hold", **OWN.get(name, {})) for name in ALL_OBJECTIVES],
    "posterior_2d": [NAMED_RUNS[name] for name in POSTERIOR_2D],
}


def runs_called(name):
    """[((name, base run), Parameters)] that a word of the command line stands for: see `command_line.run_name`."""
    name = ALIASES.get(name, name)
    runs = GROUPS.get(name) or [NAMED_RUNS.get(name) or replace(PARAMETERS, objective=name)]
    bases = [next((named for named in NAMED_RUNS.items() if named[1] == run), None) for run in runs]
    return [
        (base or (run.objective, Parameters(objective=run.objective)), run)
        for base, run in zip(bases, runs, strict=True)
    ]


def resolve(names, overrides, wrong=()):
    """[(run name, Parameters)] of the runs that the command line asks for, without those that train the same.

    Leaves with all that is wrong; of values that only do not go together nothing, as long as there are unknown words.
    """
    legal = [*NAMED_RUNS, *ALIASES, *GROUPS, *OBJECTIVES]
    if not names and not (COMPARE and isinstance(COMPARE, tuple) and all(isinstance(name, str) for name in COMPARE)):
        leave([f"COMPARE = {COMPARE!r}: must be a tuple of objectives or runs, such as ('vae', 'iwae') or ('vae',)"])
    if not names and "objective" not in overrides and PARAMETERS.objective not in ("iwae", *COMPARE):
        leave([f"PARAMETERS has objective = {PARAMETERS.objective!r}: enter it in COMPARE = {COMPARE!r}"])
    if wrong := [*wrong, *(unknown("run", name, legal) for name in names if name not in legal)]:
        leave([*wrong, *illegal_values(replace(PARAMETERS, **overrides)).values()])
    objective, runs = overrides.get("objective"), {}
    names = [objective if name in OBJECTIVES and objective in OBJECTIVES else name for name in names or COMPARE]
    for name in ALIASES.keys() & names if overrides.get("k", 1) != 1 else ():
        wrong.append(f"{name} --k {overrides['k']}: {name} is {ALIASES[name]} at k = 1 alone: name another run")
    if overrides.get("pretrained") and overrides.keys() <= NOT_IN_NAME:  # 3280 passes were not trained
        names = [f"{name}_fast" if name in PAPER else name for name in (ALIASES.get(name, name) for name in names)]
    asked = [(base, replace(run, **overrides)) for name in names for base, run in runs_called(name)]
    taken = {OBJECTIVE_PARAMETERS.get(parameters.objective) for _, parameters in asked} - {None}
    for base, parameters in asked:  # of several runs, a parameter of an objective is for those that take it
        parameters = replace(parameters, **dict.fromkeys(taken - {OBJECTIVE_PARAMETERS.get(parameters.objective)}))
        found = problems(parameters)
        wrong += found
        if not found and parameters.binarization == own_binarization(parameters.dataset):
            parameters = replace(parameters, binarization=None)
        name = run_name(base, parameters)
        if runs.get(name, parameters) != parameters:
            wrong.append(f"{name}: asked for twice, and not with the same values: run one command after the other")
        elif parameters not in runs.values():  # else the same training by another name
            runs[name] = parameters
    for field in (*EVALUATION, "strategy"):
        if len(values := {str(getattr(parameters, field)) for parameters in runs.values()}) > 1:
            wrong.append(f"{field} = {', '.join(values)}: one for all wanted: add --{field}")
    leave(wrong)
    return list(runs.items())


def list_runs():
    """Print the named runs, with the paper's numbers beside them."""
    print(f"{'run':<14}{'paper: NLL':>11}{'active units':>14}   Burda et al. 2016, Table 1 (MNIST, -L_5000 in nats)")
    for name, (nll, active) in PAPER.items():
        also = "".join(f"   also called {alias}" for alias, run in ALIASES.items() if run == name)
        print(f"{name:<14}{nll:>11.2f}{active:>14}{also}")
    for schedule, meaning in (("fast", "130 passes"), ("switch", "60 more passes, as in Table 2")):
        names = ", ".join(name for name, run in NAMED_RUNS.items() if run.schedule == schedule)
        print(f"\nBy the `{schedule}` schedule, {meaning}: {names}")
    for name in GROUPS:
        print(f"\n{name}: {', '.join(run for run, _ in resolve([name], {'strategy': 'none'}))}")
    own = [name for name, run in NAMED_RUNS.items() if run.schedule not in ("fast", "switch")]
    if own := [name for name in own if name not in (*PAPER, *POSTERIOR_2D)]:
        print(f"\nEntered by you: {', '.join(own)}")
    print(f"\nPARAMETERS of experiments.py, trained with one objective: {', '.join(OBJECTIVES)}")


def main(arguments=None):
    """Do what the command line asks for; everything that can be refused is, before TensorFlow is imported."""
    names, overrides, alone, wrong, (i, n) = parse(arguments, Parameters, __doc__)
    if alone and not wrong:
        return list_runs() if alone[0] == "list" else write_report(NAMED_RUNS, POSTERIOR_2D)
    loaded, asked = {}, []
    for name, parameters in resolve(names, overrides, wrong)[i - 1 :: n]:
        source = (parameters.dataset, parameters.datasets_dir, parameters.binarization)
        if source not in loaded:
            loaded[source] = load_data(parameters)
        data = loaded[source]
        dataset = parameters.dataset if parameters.dataset.endswith(".npz") else data.name  # maybe the sample
        parameters = replace(parameters, dataset=dataset, binarization=data.binarization)
        asked.append((name, parameters, data))
    with contextlib.ExitStack() as locks:
        for run in [open_run(*each) for each in asked]:
            if is_first(run.parameters):
                locks.enter_context(lock(run.folder))
        if asked:  # opened again: until the lock another process may have changed a folder
            perform([open_run(*each) for each in asked], compared=n == 1)
        else:
            print(f"nothing to do in shard {i}/{n}: there are fewer runs")


def perform(runs, compared):
    """Train, evaluate, plot and compare runs, as far as each asks for it: the first two on all devices together."""
    start_tensorflow()
    from distributed import open_strategy, own_folder

    first, lost = is_first(runs[0].parameters), []
    with open_strategy(*(run.parameters for run in runs)) as strategy:
        for run in runs:
            run = run._replace(initial=initial_folder(run.folder, run.parameters))  # one before it may have made it
            try:
                with strategy.scope(), own_folder(run, settings(run.parameters, run.data)) as ours:
                    if run.parameters.train:
                        train_run(ours)
                    if run.parameters.evaluate:
                        evaluate_run(ours)
            except FloatingPointError as error:
                if len(runs) == 1:
                    raise
                lost.append(run.label)  # as it would be next time: the others go on
                print(f"experiments.py: {error}", file=sys.stderr)
                continue
            if run.parameters.plot and first:
                plot_run(run)
            if run.parameters.diagnose and first:
                diagnose_run(run, GROUPS["estimators"])
    if lost:
        raise FloatingPointError(f"not done, see above: {', '.join(lost)}")
    if not (compared and first):  # a shard has but a part of what is to be compared
        return
    for place in dict.fromkeys(run.folder.parent for run in runs):
        together = [run for run in runs if run.folder.parent == place]
        if len(together) > 1 and all((run.results / "results.json").exists() for run in together):
            compare(together)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except (DatasetError, FloatingPointError, OSError) as error:
        sys.exit(f"experiments.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"experiments.py: stopped; to go on where it was: python {shlex.join(sys.argv)}")
