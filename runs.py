"""What is done with a run: its data, its folder, training, evaluation, figures."""

import contextlib
import functools
import importlib.metadata
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from command_line import EVALUATION, NOT_IN_NAME, OBJECTIVE_PARAMETERS, leave
from datasets_download import Dataset, binarize, grey, load_dataset
from downloads import Unavailable
from run_folder import (
    check_parameters,
    digest,
    lock,
    read_log,
    reading_file,
    weights_digest,
    whole_file,
    write_text,
)
from schedules import plan_epochs

RELEASED = Path(__file__).resolve().parent / "pretrained"
SAMPLE = "mnist_sample"  # ships with the project, for machines without a network
PACKAGES = ("tensorflow", "tensorflow-probability", "keras", "numpy")  # whose versions are recorded
GENERATOR = "threefry"  # of random numbers, which models.py draws by
RESULTS = ("nll", "nll_standard_error", "elbo", "active_units", "train_seconds")  # what is read of results.json
RESULTS += ("k", "objective", "dataset", "k_evaluation", "split", "images", "units", "evaluated", "epochs", "digest")
LONGEST = 200  # characters in the name of a run: file systems take 255
NET = ("features", "latent_units", "hidden_units", "likelihood")  # what weights have to fit
SHOWN = 10  # validation images, with their reconstructions, and a fourth of the samples, in TensorBoard
EXTREMES = 8  # images of lowest, and of highest, likelihood that are shown
EVALUATION_SEED = 2016  # of the binarised test draw and the evaluation's samples: the same for every run


def load_data(parameters):
    """The run's data set, or the sample that ships with the project where MNIST cannot be had."""
    try:
        return load_dataset(parameters.dataset, parameters.datasets_dir, parameters.binarization)
    except Unavailable as error:
        if parameters.dataset != "mnist":
            raise
        tried = "; ".join(line.strip() for line in str(error).splitlines())
        print(f"{tried} Going on with {SAMPLE}: its likelihoods cannot be compared with the paper's.", file=sys.stderr)
        return load_dataset(SAMPLE, binarization=parameters.binarization)


def versions():
    """{package: version} of those that results depend on, and the generator of random numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {"random_numbers": GENERATOR}


def settings(parameters, data):
    """What parameters.json holds: every field, the features that the networks read, a digest of the data, versions."""
    read = {"features": data.x_train.shape[1], "data": digest(data.x_train, data.x_validation)}
    return json.loads(json.dumps(asdict(parameters) | read | versions()))


def initial_folder(folder, parameters):
    """The folder that `init_from` means: a path, or the run of that name and this seed, beside `folder` or released."""
    if not parameters.init_from:
        return None
    run = f"{parameters.init_from}__seed{parameters.seed}"
    places = [Path(parameters.init_from).expanduser(), folder.parent / run, RELEASED / folder.parent.name / run]
    missing = places[0] if places[0].exists() else places[1]
    return next((place for place in places if (place / "model.weights.h5").exists()), missing)


def check_initial(folder, parameters, features):
    """Leave where the run that `init_from` names, in a folder, is not trained, or is another net."""
    ours = asdict(parameters) | {"features": features}
    if not (folder / "model.weights.h5").exists():
        sys.exit(f"experiments.py: init_from = {folder}: it has no model.weights.h5: train that run first")
    with reading_file(folder / "parameters.json", "name another run by --init_from"):
        theirs = json.loads((folder / "parameters.json").read_text())
        nets = [json.dumps({name: net[name] for name in NET}) for net in (theirs, ours)]
    if nets[0] != nets[1]:
        sys.exit(f"experiments.py: init_from = {folder}: its net is {nets[0]}, that of this run {nets[1]}")


class Run(NamedTuple):
    """A run: what was asked for, its data, and where it keeps what it makes."""

    folder: Path  # what is trained
    results: Path  # what is evaluated and drawn: see `results_folder`
    parameters: object  # experiments.Parameters
    data: Dataset
    initial: Path | None = None  # the run of `init_from`, once those before it are done

    @property
    def label(self):
        """What figures call it: data set, folder, and the folder in it where there is one."""
        return str(self.results.relative_to(self.folder.parents[1]))


def open_run(name, parameters, data):
    """The Run; leaves with the difference where its folder holds another, or none though none is to be trained."""
    lines = [
        f"{field} = {asked}: {data.name} has {n} {split} images"
        for field, split in (("batch", "train"), ("images", parameters.split))
        if (asked := getattr(parameters, field) or 0) > (n := len(getattr(data, f"x_{split}")))
    ]
    features = data.x_train.shape[1]
    if parameters.k * parameters.batch * features >= 2**31:
        product = f"k = {parameters.k}, batch = {parameters.batch}, {features} features of {data.name}"
        lines.append(f"{product}: the three multiplied must stay below 2147483648")
    leave(lines)
    folder = Path(parameters.results_dir).expanduser() / data.name / f"{name}__seed{parameters.seed}"
    if parameters.pretrained and not any((folder / name).exists() for name in ("model.weights.h5", "checkpoints")):
        take_released(folder)
    if len(folder.name) > LONGEST:
        way_out = "enter it in NAMED_RUNS of experiments.py, whose names stand for all their fields"
        sys.exit(f"experiments.py: {folder.name[:40]}..: {len(folder.name)} characters, {LONGEST} may be: {way_out}")
    if {"[", "\\"} & set(str(folder)):  # it takes a checkpoint's path for a pattern
        sys.exit(
            f"experiments.py: {folder}: TensorFlow reads no checkpoint under [ or \\: choose another name or place"
        )
    results = results_folder(folder, parameters)
    trained = (folder / "model.weights.h5").exists()
    if trained or any((folder / name).exists() for name in ("parameters.json", "checkpoints")):
        ignored = NOT_IN_NAME - {"seed"} | (set(versions()) if trained else set())  # of data the digest tells
        check_parameters(folder, settings(parameters, data), ignored)
    elif parameters.init_from:
        check_initial(initial_folder(folder, parameters), parameters, features)
    if not trained and (parameters.pretrained or not parameters.train):
        way_out = f"run the same command without --{'pretrained' if parameters.pretrained else 'train false'}"
        sys.exit(f"experiments.py: no trained model in {folder}: {way_out}")
    if parameters.plot and not parameters.evaluate and not (results / "results.json").exists():
        sys.exit(f"experiments.py: {results} is not evaluated: run the same command without --evaluate false")
    return Run(folder, results, parameters, data)


def take_released(folder):
    """Copy the run of that name from pretrained/ to its folder, the weights last; leaves where none was released."""
    source = RELEASED / folder.parent.name / folder.name
    if not source.is_dir():
        released = ", ".join(sorted(f"{path.parent.name}/{path.name}" for path in RELEASED.glob("*/*")))
        run = f"{folder.parent.name}/{folder.name}"
        sys.exit(f"experiments.py: --pretrained: {run} was not released; there are: {released}")
    files = [path for path in source.rglob("*") if path.is_file() and path.name != ".lock"]
    with lock(folder):
        for file in sorted(files, key=lambda path: path.name == "model.weights.h5"):
            with whole_file(folder / file.relative_to(source)) as partial:
                shutil.copyfile(file, partial)


def results_folder(folder, parameters):
    """Where an evaluation belongs: the first in the run's folder, any other (see EVALUATION) in one of its own.

    So no evaluation replaces another. That of L_5000 after that of L_500 is in <folder>/k_evaluation5000.
    """
    path, asked = folder / "results.json", {field: getattr(parameters, field) for field in EVALUATION}
    first = read_json(folder) if path.exists() else asked
    return folder / "__".join(f"{field}{value}" for field, value in asked.items() if first[field] != value)


def train_run(run):
    """Train the run in its folder, or go on where it was stopped."""
    from evaluation import mean_bound
    from models import Autoencoder, load_weights, save_weights
    from training import objective_of, tell_lost, train

    folder, _, parameters, data, _ = run
    if (folder / "model.weights.h5").exists():
        print(f"{folder.name}: trained already")
        if not parameters.pretrained:  # of those some were not released
            tell_lost(folder, parameters, len(plan_epochs(parameters)))
        return
    write_text(folder / "parameters.json", json.dumps(settings(parameters, data), indent=2) + "\n")
    initial = folder / "initial.weights.h5"  # a copy: the run of `init_from` may change, or go
    if run.initial and not initial.exists():
        print(f"{folder.name}: starts from {run.initial}")
        save_weights(load_model(run.initial, "run its own command again, or name another run by --init_from"), initial)
    shape = parameters.latent_units, parameters.hidden_units, parameters.likelihood
    model = Autoencoder(grey(data.x_train).mean(axis=0), *shape, seed=parameters.seed)
    if run.initial:
        with reading_file(initial, "delete it, and the same command copies it again"):
            load_weights(model, initial)
    x_validation = binarize(data.x_validation, data.binarization, EVALUATION_SEED)
    validation_bound = mean_bound(model, x_validation, objective_of(parameters), parameters.k)
    images = functools.partial(tensorboard_images, model, x_validation[:SHOWN], data.image_shape)
    train(model, data.x_train, parameters, folder, validation_bound, images)


def tensorboard_images(model, x, image_shape):
    """Images x above their reconstructions, and four rows of prior samples: {name: [rows, columns]}."""
    both = {"reconstructions": np.concatenate([x, model.reconstruct(x)])}
    both["prior samples"] = model.sample(4 * len(x), (EVALUATION_SEED, 0)).numpy()
    return {name: tiled(images, len(x), image_shape) for name, images in both.items()}


def tiled(x, columns, image_shape):
    """Images [n, features] as one [rows, columns], with so many of them, a divisor of n, in a row."""
    height, width = image_shape
    return x.reshape(-1, columns, height, width).swapaxes(1, 2).reshape(-1, columns * width)


def evaluation_images(parameters, data):
    """The images of a run's split, as they are fed to the encoder: one binarisation draw, the same for every run."""
    return binarize(getattr(data, f"x_{parameters.split}")[: parameters.images], data.binarization, EVALUATION_SEED)


def load_model(folder, way_out=None):
    """The trained model of a folder; raises OSError where its file is damaged."""
    from models import load_run

    if not way_out and (folder / "checkpoints").exists():
        way_out = "delete it, and the command that trained it makes it of the last checkpoint"
    elif not way_out:  # it came from pretrained/
        way_out = f"delete {folder}, and take it by --pretrained, or train it, again"
    with reading_file(folder / "model.weights.h5", way_out):
        return load_run(folder)


def evaluated_model(run, x):
    """The trained model of a run; with `units` = active, what is left of it without the units dead on images x."""
    from evaluation import ACTIVE_THRESHOLD, unit_variances
    from models import keep_units

    model = load_model(run.folder)
    if run.parameters.units == "all":
        return model
    active = [layer > ACTIVE_THRESHOLD for layer in unit_variances(model, x, EVALUATION_SEED)]
    if not all(layer.any() for layer in active):
        sys.exit(f"experiments.py: {run.folder.name}: a layer without any active unit: nothing would be left of it")
    return keep_units(model, active)


def evaluate_run(run):
    """Write results.json and log_likelihoods.npy of a run, unless they are of these weights and images already."""
    parameters, x = run.parameters, evaluation_images(run.parameters, run.data)
    model, asked = evaluated_model(run, x), (parameters.k_evaluation, EVALUATION_SEED, parameters.split, versions())
    key = digest(*model.get_weights(), x, repr(asked).encode())
    written = [run.results / "log_likelihoods.npy", run.results / "results.json"]
    kept = run.folder / "evaluation" / f"{key}.npz"  # its blocks, wherever its results will lie
    same = all(path.exists() for path in written) and read_json(run.results).get("evaluation") == key
    if same and read_results(run.results):
        print(f"{run.label}: evaluated already")
    else:
        of = {"versions": versions(), "weights": weights_digest(run.folder), "evaluated": digest(x), "evaluation": key}
        write_results(run, model, x, kept, of)
    kept.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or another evaluation was stopped
        kept.parent.rmdir()


def write_results(run, model, x, kept, of):
    """Evaluate a model on images x, going on from what a killed evaluation kept. of: what the results are of."""
    from evaluation import active_units, bounds, unit_variances

    parameters, log = run.parameters, read_log(run.folder, len(plan_epochs(run.parameters)))
    log_likelihoods, elbos = bounds(model, x, parameters.k_evaluation, EVALUATION_SEED, f"{run.folder.name} L_k", kept)
    lost = np.flatnonzero(~np.isfinite(log_likelihoods + elbos))
    if len(lost):
        raise FloatingPointError(
            f"{run.label}: log-likelihood or ELBO of images {lost[:10].tolist()} not finite: are the weights damaged? "
            "Delete model.weights.h5, and the command that trained it makes it of the last checkpoint"
        )
    results = {
        "nll": -float(np.mean(log_likelihoods, dtype=np.float64)),
        "nll_standard_error": float(np.std(log_likelihoods, ddof=1, dtype=np.float64) / np.sqrt(len(x))),
        "elbo": float(np.mean(elbos, dtype=np.float64)),
        "active_units": active_units(unit_variances(model, x, EVALUATION_SEED)),
        f"n_{parameters.split}": len(x),
        **{field: getattr(parameters, field) for field in (*EVALUATION, "k", "objective", "seed")},
        "dataset": run.data.name,
        "epochs": len(log),
        "train_seconds": log[-1]["seconds"],
        **of,
    }
    with whole_file(run.results / "log_likelihoods.npy") as partial:
        np.save(partial, log_likelihoods)
        results = sealed(results, partial.read_bytes())
    write_text(run.results / "results.json", json.dumps(results, indent=2) + "\n")


def sealed(results, likelihoods):
    """Contents of results.json with a digest of all the others, and of the bytes of log_likelihoods.npy."""
    said = {name: value for name, value in results.items() if name != "digest"}
    return said | {"digest": digest(json.dumps(said).encode(), likelihoods)}


def plot_run(run):
    """Draw every plot of a trained and evaluated run into figures/, with the arrays that they show."""
    from evaluation import figure_arrays
    from models import snapshots
    from plotting import ANIMATIONS, PLOTS
    from posterior import posterior_arrays, snapshot_arrays

    _, place, parameters, data, _ = run
    log, results = read_log(run.folder, len(plan_epochs(parameters))), read_results(place)
    x = evaluation_images(parameters, data)
    if results["evaluated"] != digest(x):
        sys.exit(f"experiments.py: {place} was evaluated on other images: run the command without --evaluate false")
    x_mean, labels = grey(getattr(data, f"x_{parameters.split}")[: len(x)]), getattr(data, f"y_{parameters.split}")
    labels = None if labels is None else labels[: len(x)]
    model, kept = evaluated_model(run, x), snapshots(run.folder) if parameters.units == "all" else {}
    arrays = figure_arrays(model, x_mean, x, labels, EVALUATION_SEED)
    arrays |= posterior_arrays(model, x, labels, EVALUATION_SEED)
    if kept:
        kept[len(log)] = run.folder / "model.weights.h5"
        arrays |= snapshot_arrays(model, kept, x, labels, EVALUATION_SEED)
    arrays |= {name: np.array([r[name] for r in log]) for name in ("epoch", "bound_train", "bound_validation")}
    arrays["image_shape"] = np.array(data.image_shape)
    arrays |= {name: np.array(results[name]) for name in ("log_likelihoods", "k_evaluation", "split")}
    order = np.argsort(results["log_likelihoods"])
    arrays["extreme_x_mean"] = x_mean[[*order[:EXTREMES], *order[-EXTREMES:]]]
    with whole_file(place / "figures" / "arrays.npz") as partial:
        np.savez_compressed(partial, **arrays)
    draw({run.label: arrays}, place / "figures", PLOTS | ANIMATIONS)


def diagnose_run(run, others):
    """Measure a trained net's importance weights, and the gradient and cost of other runs on it: arrays and figures.

    others: [Parameters], of which objective and k count.
    """
    from diagnostics import diagnostic_arrays
    from plotting import DIAGNOSTICS
    from training import objective_of, step_milliseconds

    folder, place, parameters, data, _ = run
    x = evaluation_images(parameters, data)
    model, estimators = evaluated_model(run, x), {other.objective: objective_of(other) for other in others}
    arrays = diagnostic_arrays(model, estimators, x, EVALUATION_SEED)
    own = [OBJECTIVE_PARAMETERS.get(other.objective) for other in others]
    pairs = zip(others, own, strict=True)
    labels = [f"{other.objective} {name} {getattr(other, name)}" if name else other.objective for other, name in pairs]
    variants = [replace(other, batch=parameters.batch, binarization=parameters.binarization) for other in others]
    arrays |= {
        "label": np.array(labels),
        "step_k": np.array(others[0].k),
        "step_milliseconds": step_milliseconds(model, data.x_train, variants),
    }
    with whole_file(place / "figures" / "diagnostics.npz") as partial:
        np.savez_compressed(partial, **arrays)
    draw({run.label: arrays}, place / "figures", DIAGNOSTICS)


def draw(runs, folder, plots):
    """Save what the runs {label: arrays} have arrays for of a table of plots and animations; the files' names."""
    from canvas import save_animation, save_figure
    from plotting import applicable

    made = []
    for name, plot in applicable(plots, runs).items():
        drawn = plot(runs)
        ending, save = ("gif", save_animation) if isinstance(drawn, list) else ("png", save_figure)
        made.append(f"{name}.{ending}")
        with whole_file(folder / made[-1]) as partial:
            save(drawn, partial)
    print(f"figures: {folder}/")
    return made


def read_json(place):
    """The contents of results.json. Raises OSError where it is damaged, as do those that follow."""
    with reading_file(place / "results.json", "delete it, and evaluate again"):
        results = json.loads((place / "results.json").read_text())
        return results | {field: results[field] for field in RESULTS}


def read_results(place):
    """What an evaluation left: the contents of results.json, and log_likelihoods [n]."""
    results, path, way_out = read_json(place), place / "log_likelihoods.npy", "evaluate again"
    with reading_file(path, f"delete it, and {way_out}"):
        likelihoods, data = np.load(path), path.read_bytes()
    with reading_file(f"{place / 'results.json'} or {path}", f"delete both, and {way_out}"):
        if sealed(results, data) != results:
            raise ValueError("they are not what was written together")
    return results | {"log_likelihoods": likelihoods}


def read_released():
    """Every evaluation of MNIST in pretrained/: {folder of the run, or one in it: as of `read_results`}.

    Each with the generator of random numbers that the run was trained by.
    """
    found, place = {}, RELEASED / "mnist"
    for folder in sorted(path.parent for path in place.glob("*/model.weights.h5")):
        with reading_file(folder / "parameters.json", "take it again from where it was released"):
            generator = json.loads((folder / "parameters.json").read_text()).get("random_numbers", "philox")
        for path in (folder, *sorted(path.parent for path in folder.glob("*/results.json"))):
            found[path.relative_to(place).as_posix()] = read_results(path) | {"generator": generator}
    return found


def read_arrays(path):
    """The arrays of figures, {name: array}."""
    with reading_file(path, "delete it, and draw it again"), np.load(path) as archive:
        return dict(archive)
