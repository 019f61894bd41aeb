"""What a user may ask of experiments.py: options, legal values, names of runs; settled before TensorFlow starts."""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import itertools
import json
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from datasets_download import BINARIZATIONS, DATASETS, SPLITS, own_binarization
from run_folder import reading
from schedules import MUON_SCHEDULES, PAPER_EPOCHS, SCHEDULES, plan_epochs

OBJECTIVES = ("vae", "iwae", "stl", "dreg", "rws", "rws_dreg", "ciwae", "miwae", "miwae_dreg", "piwae", "vr", "vr_dreg")
OBJECTIVE_PARAMETERS = {"ciwae": "beta", "miwae": "groups", "miwae_dreg": "groups", "piwae": "groups"}
OBJECTIVE_PARAMETERS |= {"vr": "alpha", "vr_dreg": "alpha"}
OPTIMIZERS = ("adam", "muon")
LIKELIHOODS = ("bernoulli", "gaussian")
TF_CONFIG = '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}}'
FLOAT32 = {"low": 2.0**-126, "below": 2.0**128}  # normal positive numbers of 32 bits: any other is 0 there, or infinite
BELOW_1 = 1 - 2.0**-25  # from here on 32 bits round to 1
ALONE = {"list": "list the named runs, with the paper's numbers"}  # options that take the place of runs
ALONE["report"] = "write the README's tables of the runs in pretrained/ again"
SWITCHES = ("pretrained", "train", "evaluate", "plot", "diagnose")
NAMES = {"dataset": tuple(DATASETS), "binarization": BINARIZATIONS, "objective": OBJECTIVES, "schedule": SCHEDULES}
NAMES |= {"optimizer": OPTIMIZERS, "likelihood": LIKELIHOODS, "split": SPLITS, "units": ("all", "active")}
NAMES["strategy"] = ("auto", "none", "mirrored", "multi_worker")
STARTUP_CHATTER = r"oneDNN|[Cc]uda|cuInit|TF-TRT|cpu_feature_guard|To enable the following|before absl::InitializeLog"

EVALUATION = ("k_evaluation", "split", "images", "units")  # fields that change what is found out about a trained run
# Fields that do not change what a run trains; seed and dataset stand in its folder's path by themselves.
NOT_IN_NAME = {"dataset", "seed", "snapshot_epochs", *EVALUATION, *SWITCHES, "strategy", "results_dir", "datasets_dir"}


def is_number(value, kind=(int, float), low=0, below=float("inf")):
    """Whether value is of that kind (never a bool) and low <= value < below."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value < below


def is_count(value, below=2**31):
    """Whether value is an integer from 1 on that 32 bits hold, or below another bound."""
    return is_number(value, int, 1, below)


def is_folder(value):
    """Whether value names a folder; "~name" does only where there is such a user."""
    return isinstance(value, str) and value != "" and not os.path.expanduser(value).startswith("~")


def is_counts(value, length=0):
    """Whether value is a tuple of at least so many integers from 1 to 99999."""
    return isinstance(value, tuple) and len(value) >= length and all(is_count(n, 10**5) for n in value)


def illegal_values(p):
    """{field: a line with its value and the legal ones} for every value of a run that is not."""
    value, optional = vars(p), {field.name for field in dataclasses.fields(p) if isinstance(None, field.type)}
    nested = isinstance(p.hidden_units, tuple) and all(is_counts(units, 1) for units in p.hidden_units)
    known_data = isinstance(p.dataset, str) and (p.dataset in DATASETS or p.dataset.endswith(".npz"))
    counts, count = ("k", "groups", "batch", "backward_samples", "k_evaluation"), "an integer from 1 to 2147483647"
    decays = ("alpha", "beta_1", "beta_2", "momentum", "ema")
    decay = "a number in [0, 1), and not so near to 1 that 32 bits round it"
    factors = ("rate_scale", "output_rate", "clip_norm", "epsilon")
    factor = "a number above 0 that 32 bits hold: from 1.18e-38 to 3.40e+38"
    rules = [
        ("dataset", known_data, f"one of {', '.join(DATASETS)}, or the path of a .npz file"),
        ("beta", is_number(p.beta) and p.beta <= 1, "a number in [0, 1]"),
        ("latent_units", is_counts(p.latent_units, 1), "a tuple of integers from 1 to 99999, such as (100, 50)"),
        ("hidden_units", nested, "a tuple of tuples of integers from 1 to 99999, such as ((200, 200), (100, 100))"),
        ("epochs", is_count(p.epochs, 10**5), "an integer from 1 to 99999"),
        ("snapshot_epochs", is_counts(p.snapshot_epochs), "a tuple of integers from 1 to 99999, such as (1, 16, 30)"),
        ("init_from", is_folder(p.init_from), "the folder of a trained run"),
        ("seed", is_number(p.seed, int, below=2**31), "an integer from 0 to 2147483647"),
        ("images", is_number(p.images, int, 2), "an integer of 2 or more"),
        *[(name, is_count(value[name]), count) for name in counts],
        *[(name, is_number(value[name], below=BELOW_1), decay) for name in decays],
        *[(name, is_number(value[name], **FLOAT32), factor) for name in factors],
        *[(name, value[name] in tuple(NAMES[name]), f"one of {', '.join(NAMES[name])}") for name in list(NAMES)[1:]],
        *[(name, isinstance(value[name], bool), "True or False; runs stand before the options") for name in SWITCHES],
        *[(name, is_folder(value[name]), "a folder") for name in ("results_dir", "datasets_dir")],
    ]
    return {
        name: f"{name} = {value[name]!r}: must be {'None or ' * (name in optional)}{legal}"
        + nearest(value[name], NAMES.get(name, ()))
        for name, fine, legal in rules
        if not (fine or name in optional and value[name] is None)
    }


def problems(p):
    """Everything that is wrong with a run's values, a line each; an empty list if nothing is."""
    bad = illegal_values(p)
    return [*bad.values(), *inconsistencies(p, lambda *names: not bad.keys() & set(names))]


def bad_file_name(dataset):
    """What is wrong with the name of a user's own file, which stands for its results and in figures."""
    name = Path(dataset).stem
    if name in DATASETS:
        return [f"dataset = {dataset!r}: the name of a data set's results: rename the file, or --dataset {name}"]
    if name.startswith("_") or "$" in name:  # of which matplotlib would make something else
        return [f"dataset = {dataset!r}: a name in figures must not begin with _ or hold $: rename the file"]
    return []


def inconsistencies(p, legal):
    """What is wrong between values that are each legal by itself, a line each. legal: a function of fields' names."""
    found = bad_file_name(p.dataset) if legal("dataset") and p.dataset not in DATASETS else []
    if legal("latent_units", "hidden_units") and len(p.latent_units) != len(p.hidden_units):
        found.append(f"latent_units = {p.latent_units}, hidden_units = {p.hidden_units}: must be of equal length")
    for name in filter(partial(legal, "objective"), ("beta", "groups", "alpha")):
        takes, value = OBJECTIVE_PARAMETERS.get(p.objective) == name, getattr(p, name)
        if takes != (value is not None):
            found.append(f"{name} = {value}: objective {p.objective!r} {'needs' if takes else 'does not take'} a value")
    for name in ("momentum", "output_rate") if p.optimizer == "adam" else ():
        if legal(name) and getattr(p, name) != (default := getattr(type(p), name)):
            found.append(f"{name} = {getattr(p, name)}: of Muon alone: --optimizer muon, or --{name} {default}")
    if p.schedule in MUON_SCHEDULES and p.optimizer == "adam" and p.rate_scale is None:
        way_out = "take the values of FAST in experiments.py, or a --rate_scale, such as 0.05, that makes them Adam's"
        found.append(f"schedule = {p.schedule!r}: its learning rates are Muon's: {way_out}")
    if legal("epochs") and p.schedule == "paper" and p.epochs and p.epochs > PAPER_EPOCHS:
        found.append(f"epochs = {p.epochs}: the paper's schedule has {PAPER_EPOCHS}")
    plan = plan_epochs(p) if legal("epochs", "schedule", "rate_scale", "k") else []
    if plan and legal("snapshot_epochs") and max(p.snapshot_epochs, default=0) > len(plan):
        kept = ",".join(str(epoch) for epoch in p.snapshot_epochs if epoch <= len(plan)) or "()"
        found.append(f"snapshot_epochs = {p.snapshot_epochs}: the run has {len(plan)}: try --snapshot_epochs {kept}")
    ks = sorted({epoch.k for epoch in plan})
    if legal("groups") and p.groups and any(k % p.groups for k in ks):
        found.append(f"groups = {p.groups}: must divide k = {', then '.join(map(str, ks))}")
    if legal("backward_samples") and p.objective == "piwae" and p.backward_samples:
        found.append("backward_samples: must be None for piwae, whose decoder and encoder ascend different bounds")
    if legal("backward_samples", "k") and p.backward_samples is not None and p.backward_samples >= p.k:
        found.append(f"backward_samples = {p.backward_samples}: must be below k = {p.k}, or None for all")
    if legal("strategy", "batch"):
        found += devices_missing(p)
    if legal("likelihood", "binarization", "dataset"):
        binarization = p.binarization or own_binarization(p.dataset)
        if (p.likelihood == "gaussian") != (binarization == "none"):
            pair = f"likelihood = {p.likelihood!r} does not go with binarization = {binarization!r}"
            way_out = "continuous data (none) take gaussian, binary data (stochastic, fixed) take bernoulli"
            found.append(f"{pair}: {way_out}")
    return found


def cluster():
    """The workers that TF_CONFIG names, {device: address}, first the one that writes, and the place of this one.

    An empty one, and 0, where it is not set. Raises ValueError where it says something else.
    """
    if not (text := os.environ.get("TF_CONFIG")):
        return {}, 0
    with reading(f"TF_CONFIG = {text}: must be as {TF_CONFIG}", ValueError):
        config, device = json.loads(text), "/job:{type}/replica:0/task:{index}"
        jobs = [(job, config["cluster"].get(job, [])) for job in ("chief", "worker")]
        workers = {
            device.format(type=job, index=index): re.fullmatch(r"\S+:\d{1,5}", address)[0]
            for job, addresses in jobs
            for index, address in enumerate(addresses)
        }
        if not all(0 < int(address.rpartition(":")[2]) < 2**16 for address in workers.values()):
            raise ValueError("ports go from 1 to 65535")
        return workers, list(workers).index(device.format(**config["task"]))


def gpus():
    """How many GPUs this machine has, as far as can be told before TensorFlow starts."""
    present, visible = len(list(Path("/dev").glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, len(visible.split(",")) if visible else 0)


def strategy_kind(p):
    """The strategy of a run: what `auto` stands for here."""
    if p.strategy != "auto":
        return p.strategy
    several = gpus() > 1 and p.batch % gpus() == 0
    return "multi_worker" if os.environ.get("TF_CONFIG") else "mirrored" if several else "none"


def is_first(p):
    """Whether this process is the one that writes: of several workers the first alone."""
    return strategy_kind(p) != "multi_worker" or cluster()[1] == 0


def devices_missing(p):
    """Why a run's strategy cannot be had here, a line each."""
    alone, kind = "or run on one device by --strategy none", strategy_kind(p)
    try:
        workers = len(cluster()[0]) if kind == "multi_worker" else 1
    except ValueError as error:
        return [f"{error}; {alone}"]
    if kind == "multi_worker" and not workers:
        return [f"strategy = 'multi_worker': needs TF_CONFIG on every worker, such as {TF_CONFIG}: set it, {alone}"]
    if kind == "multi_worker" and p.pretrained:
        return [f"pretrained: not for several workers, who would all fetch the weights: {alone[3:]}"]
    if kind == "mirrored" and gpus() < 2:
        return [f"strategy = 'mirrored': needs two GPUs or more, this machine has {gpus()}: {alone[3:]}"]
    replicas = {"none": 1, "mirrored": gpus(), "multi_worker": workers * max(1, gpus())}[kind]
    if p.batch % replicas:
        fitting = -(-p.batch // replicas) * replicas
        return [f"batch = {p.batch}: must be divisible by the {replicas} replicas: try --batch {fitting}, {alone}"]
    return []


def run_name(base, parameters):
    """The base run's name, and every field that differs from it and changes what is trained: iwae_l1_k50__epochs3."""
    name, original = base
    names = [field.name for field in dataclasses.fields(parameters) if field.name not in NOT_IN_NAME]
    changed = [field for field in names if getattr(parameters, field) != getattr(original, field)]
    return "__".join([name, *(f"{field}{in_name(getattr(parameters, field))}" for field in changed)])


def in_name(value):
    """A value in the name of a folder: (100, 50) is 100-50, ((200, 200), (100, 100)) is 200-200_100-100, a/b is b."""
    if isinstance(value, str):
        return Path(value).name.lower()
    if isinstance(value, tuple):
        return ("_" if any(isinstance(v, tuple) for v in value) else "-").join(in_name(v) for v in value)
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).lower()  # 1.0 is 1


def nearest(word, legal):
    """Words that offer the nearest of the legal ones, none where nothing is near."""
    near = difflib.get_close_matches(word, legal, 1) if isinstance(word, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def unknown(kind, word, legal):
    """A line: what word is not known, the nearest legal one, all legal ones."""
    return f"no {kind} is called {word!r}{nearest(word, legal) or ';'} legal are {', '.join(legal)}"


def leave(lines):
    """Leave with what is wrong, each line once, if there is any."""
    if lines:
        sys.exit("\n".join(f"experiments.py: {line}" for line in dict.fromkeys(lines)))


def parse(arguments, kind, description):
    """Command line -> names of runs, {field of the dataclass `kind`: value}, those of ALONE, what is wrong, the shard.

    The shard is (i, n), (1, 1) for all runs. What follows an unknown option is taken for its value.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="named runs, or objectives to train PARAMETERS with")
    for option, text in ALONE.items():
        parser.add_argument(f"--{option}", action="store_true", help=text)
    parser.add_argument("--shard", nargs="?", const="", metavar="i/n", help="the i-th of n parts of the runs")
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for field in fields:
        alone = "true" if field in SWITCHES else ""  # without a value: `problems` refuses what is empty
        parser.add_argument(f"--{field}", nargs="?", const=alone, default=argparse.SUPPRESS, metavar="VALUE")
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # else -1e5 is taken for an option
    parser.error = lambda message: sys.exit(f"experiments.py: {message}")
    options, rest = parser.parse_known_intermixed_args(arguments)
    overrides, legal = vars(options), [f"--{option}" for option in (*ALONE, "shard", *fields)]
    strange = [word for word in rest if word.startswith("-")]
    values = [after for before, after in itertools.pairwise(arguments) if before in strange]
    names = [word for word in overrides.pop("names") + rest if word not in strange + values]
    alone, shard = [option for option in ALONE if overrides.pop(option)], overrides.pop("shard")
    wrong = [unknown("option", word, legal) for word in strange]
    if alone and (names or overrides or alone[1:] or shard is not None):
        wrong.append(f"--{alone[0]} stands alone: it runs nothing")
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", "1/1" if shard is None else shard)
    i, n = map(int, found.groups()) if found else (1, 0)
    if i > n:
        wrong.append(f"--shard {shard}: must be i/n, with i from 1 to n, such as 1/3")
    overrides = {field: value_of(text, fields[field], NAMES.get(field, ())) for field, text in overrides.items()}
    return names, overrides, alone, wrong, (i, n)


def value_of(text, kind, names=()):
    """What a user means by text, for a field of that type: words as they are, else 3, 1e-4, true, none, "100, 50".

    names: legal words, of which none may be one.
    """
    if isinstance("", kind):
        return None if text.lower() == "none" and isinstance(None, kind) and "none" not in names else text
    try:
        value = ast.literal_eval(text.title() if text in ("true", "false", "none") else text)
        repr(value)  # which Python refuses of the longest integers
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
        return text  # `problems` refuses it, and names the legal values
    return (value,) if kind is tuple and not isinstance(value, tuple) else value


@contextlib.contextmanager
def quiet_start():
    """Drop TensorFlow's lines about CUDA and oneDNN, which no setting of its own reaches; all else is shown."""
    # Among workers a line on the one that is lost says what TensorFlow would say in twenty.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if os.environ.get("TF_CONFIG") else "1")
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            lines = caught.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.writelines(line for line in lines if not re.search(STARTUP_CHATTER, line))


def not_of_retracing(record):
    """Whether a record of a log is no warning that a program is traced again: each run, k and objective has its own."""
    return "triggered tf.function retracing" not in record.getMessage()


def start_tensorflow():
    """Import TensorFlow, by `quiet_start`."""
    with quiet_start():
        import tensorflow as tf

        tf.config.list_physical_devices()
    tf.get_logger().addFilter(not_of_retracing)
