"""What is done with a run: its data, its folder, training, evaluation, figures, the comparison with others."""

import importlib.metadata
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from command_line import NOT_IN_NAME, run_name
from datasets_download import Unavailable, binarize, grey, load_dataset
from run_folder import check_parameters, digest, read_log, whole_file, write_text

SAMPLE = "mnist_sample"  # ships with the project, for machines without a network
VERSIONS = ("tensorflow", "tensorflow-probability", "keras", "numpy")  # recorded with the results
EVALUATION_SEED = 2016  # of the binarised test draw and the evaluation's samples: the same for every run


def load_data(parameters):
    """The run's data set, or the sample that ships with the project where MNIST cannot be had."""
    try:
        data = load_dataset(parameters.dataset, parameters.datasets_dir, parameters.binarization)
    except Unavailable as error:
        if parameters.dataset != "mnist":
            raise
        tried = "; ".join(line.strip() for line in str(error).splitlines())
        print(f"{tried} Going on with {SAMPLE}: its likelihoods cannot be compared with the paper's.", file=sys.stderr)
        data = load_dataset(SAMPLE, binarization=parameters.binarization)
    if parameters.batch > len(data.x_train):
        sys.exit(f"experiments.py: batch = {parameters.batch}: {data.name} has {len(data.x_train)} training images")
    return data


def settings(parameters, data):
    """What parameters.json holds: every field, and the number of features that the networks read."""
    return json.loads(json.dumps(asdict(parameters) | {"features": data.x_train.shape[1]}))


def open_folder(name, parameters, data):
    """The run's folder; leaves with the difference where it holds another run, or none though none is to be trained."""
    folder = Path(parameters.results_dir) / data.name / f"{name}__seed{parameters.seed}"
    if (folder / "parameters.json").exists():
        check_parameters(folder, settings(parameters, data), NOT_IN_NAME - {"dataset", "seed"})
    if not parameters.train and not (folder / "model.weights.h5").exists():
        sys.exit(f"experiments.py: no trained model in {folder}: run the same command without --train false")
    if parameters.plot and not parameters.evaluate and not (folder / "results.json").exists():
        sys.exit(f"experiments.py: {folder} is not evaluated: run the same command without --evaluate false")
    return folder


def train_run(folder, parameters, data):
    """Train the run in its folder, or go on where it was stopped."""
    from evaluation import mean_bound
    from models import Autoencoder
    from training import objective_of, train

    if (folder / "model.weights.h5").exists():
        print(f"{folder.name}: trained already")
        return
    write_text(folder / "parameters.json", json.dumps(settings(parameters, data), indent=2) + "\n")
    shape = parameters.latent_units, parameters.hidden_units, parameters.likelihood
    model = Autoencoder(grey(data.x_train).mean(axis=0), *shape, seed=parameters.seed)
    x_validation = binarize(data.x_validation, data.binarization, EVALUATION_SEED)
    validation_bound = mean_bound(model, x_validation, objective_of(parameters), parameters.k)
    train(model, data.x_train, parameters, folder, validation_bound)


def evaluation_images(parameters, data):
    """The images of the run's split, as they are fed to the encoder: one binarisation draw, the same for every run."""
    return binarize(getattr(data, f"x_{parameters.split}"), data.binarization, EVALUATION_SEED)


def evaluate_run(folder, parameters, data):
    """Write results.json and log_likelihoods.npy of a run, unless they are of these weights and images already."""
    from models import load_run

    model, x = load_run(folder), evaluation_images(parameters, data)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    asked = (parameters.k_evaluation, EVALUATION_SEED, parameters.split, versions)
    key = digest(*model.get_weights(), x, repr(asked).encode())
    written = [folder / "log_likelihoods.npy", folder / "results.json"]
    if all(path.exists() for path in written) and read_results(folder).get("evaluation") == key:
        print(f"{folder.name}: evaluated already")
    else:
        write_results(folder, parameters, model, x, {"versions": versions, "evaluation": key})
    shutil.rmtree(folder / "evaluation", ignore_errors=True)


def write_results(folder, parameters, model, x, of):
    """Evaluate a model on images x, going on from what a killed evaluation left. of: what the results are of."""
    from evaluation import active_units, bounds, unit_variances

    title, kept = f"{folder.name} L_k", folder / "evaluation" / f"{of['evaluation']}.npz"
    log_likelihoods, elbos = bounds(model, x, parameters.k_evaluation, EVALUATION_SEED, title, kept)
    log = read_log(folder)
    results = {
        "nll": -float(np.mean(log_likelihoods, dtype=np.float64)),
        "nll_standard_error": float(np.std(log_likelihoods, ddof=1, dtype=np.float64) / np.sqrt(len(x))),
        "elbo": float(np.mean(elbos, dtype=np.float64)),
        "active_units": active_units(unit_variances(model, x, EVALUATION_SEED)),
        f"n_{parameters.split}": len(x),
        **{
            field: getattr(parameters, field)
            for field in ("k", "k_evaluation", "split", "objective", "dataset", "seed")
        },
        "epochs": len(log),
        "train_seconds": log[-1]["seconds"],
        **of,
    }
    with whole_file(folder / "log_likelihoods.npy") as partial:
        np.save(partial, log_likelihoods)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def plot_run(folder, parameters, data):
    """Draw every plot of a trained and evaluated run into figures/, with the arrays that they show."""
    from evaluation import figure_arrays
    from models import load_run
    from plotting import PLOTS

    log, x, results = read_log(folder), evaluation_images(parameters, data), read_results(folder)
    x_mean, labels = grey(getattr(data, f"x_{parameters.split}")), getattr(data, f"y_{parameters.split}")
    arrays = figure_arrays(load_run(folder), x_mean, x, labels, EVALUATION_SEED)
    arrays |= {name: np.array([r[name] for r in log]) for name in ("epoch", "bound_train", "bound_validation")}
    arrays["image_shape"] = np.array(data.image_shape)
    arrays |= {name: np.array(results[name]) for name in ("log_likelihoods", "k_evaluation")}
    with whole_file(folder / "figures" / "arrays.npz") as partial:
        np.savez_compressed(partial, **arrays)
    draw({label_of(folder): arrays}, folder / "figures", PLOTS)


def diagnose_run(folder, parameters, data, runs):
    """Measure a trained net's importance weights, and the gradient and cost of each of `runs`: arrays and figures."""
    from diagnostics import diagnostic_arrays
    from losses import TARGETS
    from models import load_run
    from plotting import DIAGNOSTICS
    from training import gradients, objective_of, step_milliseconds

    model, x = load_run(folder), evaluation_images(parameters, data)
    estimators = {run.objective: objective_of(run) for run in runs}
    arrays = diagnostic_arrays(model, gradients, estimators, TARGETS, x, parameters.batch, EVALUATION_SEED)
    labels = [run_name((run.objective, replace(run, beta=None, groups=None, alpha=None)), run) for run in runs]
    variants = [replace(run, batch=parameters.batch, binarization=parameters.binarization) for run in runs]
    arrays |= {
        "label": np.array([re.sub(r"__([a-z]+)", r" \1 ", label) for label in labels]),
        "step_k": np.array(runs[0].k),
        "step_milliseconds": step_milliseconds(model, data.x_train, variants),
    }
    with whole_file(folder / "figures" / "diagnostics.npz") as partial:
        np.savez_compressed(partial, **arrays)
    draw({label_of(folder): arrays}, folder / "figures", DIAGNOSTICS)


def label_of(folder):
    """What a run is called in figures: data set and name."""
    return f"{folder.parent.name}/{folder.name}"


def draw(runs, folder, plots):
    """Save every plot of a table, of the runs {label: arrays}, into a folder."""
    from plotting import save_figure

    for name, plot in plots.items():
        with whole_file(folder / f"{name}.png") as partial:
            save_figure(plot(runs), partial)
    print(f"figures: {folder}/")


def compare(folders):
    """Print runs of one data set side by side, and write comparison.md and its figures beside their folders."""
    from evaluation import comparison_table
    from plotting import COMPARISONS, DIAGNOSTICS, PLOTS

    place = folders[0].parent
    try:
        table = comparison_table({folder.name: read_results(folder) for folder in folders})
    except ValueError as error:
        sys.exit(f"experiments.py: {error}")
    text = f"# Runs on {place.name}\n\n{table}\n"
    print(f"\n{table}\n")
    for file, plots in (("arrays.npz", COMPARISONS | PLOTS), ("diagnostics.npz", DIAGNOSTICS)):
        if all((folder / "figures" / file).exists() for folder in folders):
            runs = {label_of(folder): np.load(folder / "figures" / file) for folder in folders}
            draw(runs, place / "comparison", plots)
            text += "".join(f"\n![{name}](comparison/{name}.png)\n" for name in plots)
    write_text(place / "comparison.md", text)
    print(f"comparison: {place}/comparison.md")


def read_results(folder):
    """What a run's evaluation left: the contents of results.json, and log_likelihoods [n]."""
    results = json.loads((folder / "results.json").read_text())
    return results | {"log_likelihoods": np.load(folder / "log_likelihoods.npy")}
