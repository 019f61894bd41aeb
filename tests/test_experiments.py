"""experiments.py as a user meets it: whole runs on tiny images, in process, and what they leave on disk."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import canvas
import command_line
import datasets_download
import diagnostics
import downloads
import evaluation
import experiments
import losses
import models
import optimizers
import posterior
import run_folder
import runs
import schedules
import training
from checkpoints import Checkpoints
from evaluation import log_likelihood
from models import load_run, save_weights
from plotting import ANIMATIONS, COMPARISONS, DIAGNOSTICS, NEEDS, PLOTS

ANY_NET = {*PLOTS} - {*NEEDS}
ROOT = Path(experiments.__file__).resolve().parent
NAME = "__k2__latent_units3__hidden_units8__epochs2__batch10__seed0"
RESULTS = ("nll", "nll_standard_error", "elbo", "active_units", "k", "k_evaluation", "n_test", "objective", "dataset")
RESULTS += ("seed", "epochs", "train_seconds", "versions")
TRAIN_ALONE = ("--evaluate", "false", "--plot", "false")
NO_PLOT = ("--plot", "false")
EXTRA = {"beta": "0.5", "groups": "2", "alpha": "0.5"}  # what some objectives need beside their name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The user's own file: 120 + 20 + 30 grey images of 6 x 6, bars at three places."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 120), ("validation", 20), ("test", 30)):
        y = arrays[f"y_{split}"] = rng.integers(0, 3, n)
        arrays[f"x_{split}"] = rng.integers(0, 60, (n, 6, 6)).astype(np.uint8)
        arrays[f"x_{split}"][np.arange(n), 2 * y] += np.uint8(190)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module", autouse=True)
def small():
    """Figures with a hundredth of their samples and cells and a tenth of their pixels; one step timed beforehand."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "STEPS_TIMED", 1)
        monkeypatch.setattr(canvas, "DPI", 50)
        for name, value in {"POOL": 200, "SIDE": 7, "WIDE_SIDE": 9, "BOUND_KS": (1, 50)}.items():
            monkeypatch.setattr(posterior, name, value)
        yield


@pytest.fixture(scope="module")
def run(tiny):
    """A function (results_dir, *arguments): experiments.main on the tiny file; the folders it then finds there."""

    def call(place, *arguments):
        tiny_run = ["--dataset", str(tiny), "--k", "2", "--latent_units", "3", "--hidden_units", "(8,),"]
        tiny_run += ["--epochs", "2", "--batch", "10", "--k_evaluation", "3", "--results_dir", str(place)]
        experiments.main([*tiny_run, *arguments])
        return sorted(folder for folder in place.glob("*/*__seed*"))

    return call


@pytest.fixture(scope="module")
def comparison(run, tmp_path_factory):
    """The default run, VAE against IWAE: the folder of the data set's results."""
    place = tmp_path_factory.mktemp("comparison")
    run(place)
    return place / "tiny"


@pytest.fixture(scope="module")
def iwae(comparison):
    return comparison / f"iwae{NAME}"


def weights(folder):
    return np.concatenate([array.ravel() for array in load_run(folder).get_weights()])


def log_of(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in log]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def same_training(folder, other):
    assert np.array_equal(weights(folder), weights(other))
    assert log_of(folder) == log_of(other)


def leaves(function, *arguments):
    """The text with which a call leaves; its exit status is not zero, for Python makes 1 of a text."""
    with pytest.raises(SystemExit) as left:
        function(*arguments)
    assert isinstance(left.value.code, str) and left.value.code
    return left.value.code


# Tables and the names that stand for them before TensorFlow is imported.


def test_legal_values_are_the_tables():
    assert command_line.OBJECTIVES == tuple(losses.OBJECTIVES)
    assert command_line.LIKELIHOODS == models.LIKELIHOODS
    assert command_line.OBJECTIVE_PARAMETERS == {name: words[0] for name in losses.OBJECTIVES if (words := needs(name))}


def needs(objective):
    """Names of the values that an objective takes beside log_w."""
    signature = inspect.signature(losses.OBJECTIVES[objective]).parameters.values()
    return [parameter.name for parameter in signature if parameter.kind is parameter.KEYWORD_ONLY]


@pytest.mark.parametrize("name", command_line.OPTIMIZERS)
def test_optimizer_is_the_one_named(name):
    model = models.Autoencoder(np.full(4, 0.5), (2,), ((3,),))
    parameters = experiments.Parameters(optimizer=name, beta_1=0.5, beta_2=0.25, epsilon=0.125, momentum=0.75)
    optimizer = optimizers.build_optimizer(parameters, model)
    assert type(optimizer).__name__.lower() == name
    config = optimizer.get_config()
    adam = {key.removeprefix("adam_"): value for key, value in config.items()}
    assert (adam["beta_1"], adam["beta_2"], config["epsilon"]) == (0.5, 0.25, 0.125)
    assert config.get("momentum", 0.75) == 0.75 and not config["use_ema"] and not config["weight_decay"]


# What ships with the project.


@pytest.mark.parametrize("name", experiments.POSTERIOR_2D)
def test_pretrained_nets_are_the_named_runs_at_three_epochs(name):
    folder = ROOT / "pretrained" / "mnist" / f"{name}__seed0"
    ours, theirs = experiments.NAMED_RUNS[name], json.loads((folder / "parameters.json").read_text())
    for field in ("objective", "k", "latent_units", "hidden_units", "schedule", "epochs", "seed"):
        assert json.loads(json.dumps(getattr(ours, field))) == theirs[field]
    assert theirs["datasets_dir"] is None and {1, 16} <= set(models.snapshots(folder))
    assert results_of(folder)["epochs"] == 30 and max(path.stat().st_size for path in folder.rglob("*.h5")) < 2.5e6
    assert not np.array_equal(*(load_run(folder, epoch).get_weights()[0] for epoch in (None, 16)))


def test_every_figure_of_the_readme_is_there():
    links = re.findall(r"!\[[^]]+\]\((docs/[^)]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 8 and all((ROOT / link).is_file() for link in links)


# The default run.


@pytest.mark.parametrize("objective", ["vae", "iwae"])
def test_a_run_leaves_every_file(comparison, objective):
    folder = comparison / f"{objective}{NAME}"
    for name in ("parameters.json", "log.jsonl", "results.json", "log_likelihoods.npy", "model.weights.h5"):
        assert (folder / name).stat().st_size > 0
    assert any((folder / "checkpoints").iterdir()) and any((folder / "tensorboard").iterdir())
    assert {path.stem for path in (folder / "figures").glob("*.png")} == ANY_NET
    assert not list(folder.rglob("partial.*"))


def test_results(iwae):
    results, values = results_of(iwae), np.load(iwae / "log_likelihoods.npy").astype(np.float64)
    assert set(RESULTS) <= set(results)
    assert values.shape == (30,) and np.isfinite(values).all() and (values < 0).all()
    assert results["nll"] == pytest.approx(-values.mean(), rel=1e-6)
    assert results["nll_standard_error"] == pytest.approx(values.std(ddof=1) / 30**0.5, rel=1e-6)
    assert results["elbo"] < -results["nll"]
    expected = {"k": 2, "k_evaluation": 3, "n_test": 30, "objective": "iwae", "seed": 0, "epochs": 2, "split": "test"}
    assert {key: results[key] for key in expected} == expected
    assert results["dataset"] == "tiny" and results["train_seconds"] >= 0
    assert results["versions"]["tensorflow"] == tf.__version__ and results["versions"]["numpy"] == np.__version__


def test_parameters_and_log(iwae):
    parameters = json.loads((iwae / "parameters.json").read_text())
    assert set(parameters) == {*experiments.Parameters.__dataclass_fields__, "features", "data", *runs.versions()}
    assert (parameters["features"], parameters["binarization"], parameters["latent_units"]) == (36, "stochastic", [3])
    log = run_folder.read_log(iwae, 2)
    assert [record["epoch"] for record in log] == [1, 2] and [record["k"] for record in log] == [2, 2]
    assert [record["learning_rate"] for record in log] == [0.0005, 0.0]
    for bound in ("bound_train", "bound_validation"):
        assert log[0][bound] < log[1][bound] < 0  # it learns


def test_comparison_page(comparison):
    text = (comparison / "comparison.md").read_text()
    (header, rule, *rows) = [line for line in text.splitlines() if line.startswith("|")]
    assert "NLL" in header and "difference" in header and set(rule) == set("| -")
    assert [row.split()[1] for row in rows] == [f"vae{NAME}", f"iwae{NAME}"]
    a, b = (np.load(comparison / f"{run}{NAME}" / "log_likelihoods.npy").astype(np.float64) for run in ("vae", "iwae"))
    assert f"{(a - b).mean():+.2f} ± {(a - b).std(ddof=1) / 30**0.5:.2f}" in rows[1]
    for row, values in zip(rows, (a, b), strict=True):
        assert f"{-values.mean():.2f} ± {values.std(ddof=1) / 30**0.5:.2f}" in row
    assert "L_3" in text and "30 test images" in text
    links = re.findall(r"!\[[\w ]+\]\(([^)]+)\)", text)
    assert links and not any(Path(link).is_absolute() for link in links)
    assert all((comparison / link).read_bytes().startswith(b"\x89PNG") for link in links)
    assert {Path(link).stem for link in links} == {*ANY_NET, *COMPARISONS}


def test_both_runs_saw_the_same_test_draw(comparison):
    """The published draw: of the evaluation's seed alone, whatever the run and its seed."""
    draws = [np.load(comparison / f"{run}{NAME}" / "figures" / "arrays.npz")["x"] for run in ("vae", "iwae")]
    assert np.array_equal(*draws) and set(np.unique(draws[0])) == {0, 1}


def test_draw_does_not_know_the_runs_seed(tiny):
    data = datasets_download.load_dataset(str(tiny))
    draws = [runs.evaluation_images(experiments.Parameters(seed=seed), data) for seed in (0, 1)]
    assert np.array_equal(*draws)
    assert np.array_equal(draws[0], datasets_download.binarize(data.x_test, "stochastic", runs.EVALUATION_SEED))


def test_load_run_gives_the_model_back(iwae, tiny):
    data = datasets_download.load_dataset(str(tiny))
    model = load_run(iwae)
    x = datasets_download.binarize(data.x_test, data.binarization, runs.EVALUATION_SEED)
    assert model.encode(x).mean().shape == (30, 3)
    for pixels, n in ((model.reconstruct(x), 30), (model.sample(4, (0, 1)), 4)):
        assert pixels.shape == (n, 36) and np.all((pixels > 0) & (pixels < 1))
    again = log_likelihood(model, x, k=3, seed=runs.EVALUATION_SEED)
    np.testing.assert_allclose(again, np.load(iwae / "log_likelihoods.npy"), rtol=1e-5)
    assert results_of(iwae)["elbo"] == pytest.approx(
        evaluation.bounds(model, x, 3, runs.EVALUATION_SEED)[1].mean(), 1e-5
    )
    other = log_likelihood(model, x, k=3, seed=1)
    assert not np.allclose(other, again, rtol=1e-5)
    variances = evaluation.unit_variances(model, x, runs.EVALUATION_SEED)
    assert results_of(iwae)["active_units"] == evaluation.active_units(variances)
    x = datasets_download.binarize(data.x_validation, data.binarization, runs.EVALUATION_SEED)
    validation = evaluation.mean_bound(model, x, losses.OBJECTIVES["iwae"], 2)()
    assert run_folder.read_log(iwae, 2)[-1]["bound_validation"] == pytest.approx(validation, rel=1e-5)


def test_units_active_leaves_the_dead_out(alone, tiny, monkeypatch):
    data = datasets_download.load_dataset(str(tiny))
    run = runs.Run(alone, alone, experiments.Parameters(units="active", binarization="stochastic"), data)
    monkeypatch.setattr(evaluation, "unit_variances", lambda *_: [np.array([0.5, 0.0, 0.5])])
    assert runs.evaluated_model(run, runs.evaluation_images(run.parameters, data)).latent_units == (2,)


def test_the_readmes_example(iwae, tiny, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    for there, here in (("pretrained/mnist/dreg_l2_k50_fast__seed0", iwae), ('"mnist"', repr(str(tiny)))):
        assert there in code
        code = code.replace(there, str(here))
    found = {}
    exec(code, found)
    assert found["means"].shape == (30, 36) and found["prior_means"].shape == (16, 36)
    assert f"seed={runs.EVALUATION_SEED})  # the tables' draw" in code
    mean, shape = re.fullmatch(r"(\S+) (\(.*\))\n", capsys.readouterr().out).groups()
    assert float(mean) < 0 and shape == "(50, 30)"


def test_second_call_trains_nothing(run, comparison, iwae, monkeypatch, capsys):
    """Nor does it evaluate, or write anything."""
    before = contents(comparison)
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    run(comparison.parent, "iwae", *NO_PLOT)
    said = capsys.readouterr().out
    assert "trained already" in said and "evaluated already" in said and contents(comparison) == before


# Train, evaluate, plot, each alone.


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """An IWAE trained and nothing more, with what the default run's seed and values give."""
    (folder,) = run(tmp_path_factory.mktemp("alone"), "iwae", *TRAIN_ALONE)
    return folder


@pytest.mark.slow
def test_each_step_alone(run, alone, iwae, monkeypatch):
    place = alone.parents[1]
    assert not (alone / "results.json").exists() and not (alone / "figures").exists()
    before = contents(alone)
    refusal = leaves(run, place, "iwae", "--train", "false", "--evaluate", "false")
    assert "is not evaluated" in refusal and "--evaluate false" in refusal and contents(alone) == before
    run(place, "iwae", "--train", "false", "--plot", "false")
    assert {path.name for path in set(contents(alone)) - set(before)} == {"results.json", "log_likelihoods.npy"}
    assert {path: contents(alone)[path] for path in before} == before
    assert results_of(alone)["nll"] == results_of(iwae)["nll"]
    before = contents(alone)
    monkeypatch.setattr(canvas, "save_figure", lambda figure, path: path.touch())
    run(place, "iwae", "--train", "false", "--evaluate", "false")
    new = set(contents(alone)) - set(before)
    assert {path.name for path in new} == {"arrays.npz", *(f"{name}.png" for name in ANY_NET)}
    assert {path: contents(alone)[path] for path in before} == before


@pytest.mark.parametrize("steps", [(), ("--evaluate", "false"), ("--plot", "false")])
def test_nothing_trained_is_refused(run, tmp_path, steps):
    line = leaves(run, tmp_path, "iwae", "--train", "false", *steps)
    assert f"no trained model in {tmp_path / 'tiny'}" in line and "--train false" in line
    assert not any(tmp_path.iterdir())


def test_figures_without_evaluation_are_refused_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained, only to be refused afterwards"))
    assert "is not evaluated" in leaves(run, tmp_path, "iwae", "--evaluate", "false")


def test_several_runs_are_trained_alone(run, tmp_path, monkeypatch):
    """Nothing is there to compare yet, and nothing is wrong with that."""
    trained = []
    monkeypatch.setattr(experiments, "train_run", lambda run: trained.append(run.folder.name))
    run(tmp_path, *TRAIN_ALONE)
    assert trained == [f"vae{NAME}", f"iwae{NAME}"]


def test_results_of_other_images_are_not_compared(comparison, iwae, tmp_path):
    """Results on disk that were evaluated in another way cannot stand in one table: one line says so."""
    shutil.copytree(comparison, tmp_path / "tiny")
    pair = [runs.Run(place, place, None, None) for place in (tmp_path / "tiny").glob("*__seed0")]
    folder = pair[0].folder
    edited = results_of(folder) | {"dataset": "elsewhere.npz"}
    edited = runs.sealed(edited, (folder / "log_likelihoods.npy").read_bytes())
    (folder / "results.json").write_text(json.dumps(edited))
    line = leaves(experiments.compare, pair)
    assert line.startswith("experiments.py: ") and "different ways" in line and "\n" not in line


def test_figures_of_another_evaluation_are_not_compared(run, comparison, tmp_path, capsys):
    """They would contradict the table above them."""
    place = shutil.copytree(comparison, tmp_path / "tiny")
    for path in [*place.glob("*/results.json"), *place.glob("*/log_likelihoods.npy")]:
        path.unlink()
    run(tmp_path, "--k_evaluation", "4", *NO_PLOT)
    page = (place / "comparison.md").read_text()
    assert "L_4 " in page and "![" not in page and "--plot true" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field, value, told",
    [
        ("k", 7, ["k", "7", "2"]),
        ("data", "other", ["data", "'other'"]),
        ("of_another_version", 3, ["of_another_version", "3", "None"]),
    ],
)
def test_another_run_in_the_folder_is_refused(run, alone, tmp_path, field, value, told):
    folder = tmp_path / "tiny" / alone.name
    folder.mkdir(parents=True)
    parameters = json.loads((alone / "parameters.json").read_text())
    (folder / "parameters.json").write_text(json.dumps(parameters | {field: value}))
    (folder / "log.jsonl").write_text("precious")
    before = contents(folder)
    said = leaves(run, tmp_path, "iwae", *TRAIN_ALONE)
    first, header, row, last = said.splitlines()
    assert first == f"experiments.py: {folder} holds another run:" and header.split() == ["field", "there", "here"]
    assert row.split()[: len(told)] == told and last.startswith("Way out: ") and "--results_dir" in last
    assert contents(folder) == before


def test_a_file_of_the_users_is_the_same_data_set_by_whatever_path(run, alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "tiny" / alone.name)
    parameters = json.loads((folder / "parameters.json").read_text())
    (folder / "parameters.json").write_text(json.dumps(parameters | {"dataset": "elsewhere/tiny.npz"}))
    assert run(tmp_path, "iwae", *TRAIN_ALONE) == [folder]


@pytest.mark.parametrize("by_name", [False, True])
def test_training_starts_from_the_weights_of_another_run(run, alone, tmp_path, monkeypatch, uncompiled, by_name):
    """With a rate of 0 they stay as they are; the run's folder is named for them."""
    monkeypatch.setitem(schedules.SCHEDULES, "quick", [schedules.Stage(2, 0.0, 0.0)])
    monkeypatch.setattr(runs, "RELEASED", alone.parents[1])
    first = alone.name.removesuffix("__seed0") if by_name else str(alone)
    (folder,) = run(tmp_path, "vae", "--init_from", first, "--batch", "60", *TRAIN_ALONE)
    name = f"vae{NAME}".replace("batch10", "batch60").replace("__seed0", f"__init_from{Path(first).name}__seed0")
    assert folder.name == name
    for ours, theirs in zip(load_run(folder).get_weights(), load_run(alone).get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_starts_from_one_that_the_same_command_trains_before_it(tmp_path, monkeypatch):
    """Not from the released one, which was there when the command began."""
    name = "vae_l1_k1_fast__seed0"
    shutil.copytree(runs.RELEASED / "mnist" / name, tmp_path / "released" / "mnist_sample" / name)
    monkeypatch.setattr(runs, "RELEASED", tmp_path / "released")
    initial = []

    def train(run):
        initial.append(run.initial)
        run.folder.mkdir(exist_ok=True)
        (run.folder / "model.weights.h5").touch()

    monkeypatch.setattr(experiments, "train_run", train)
    options = ["--dataset", "mnist_sample", "--results_dir", str(tmp_path), *TRAIN_ALONE]
    experiments.main(["vae_l1_k1_fast", "vae_to_iwae_fast", *options])
    assert initial == [None, tmp_path / "mnist_sample" / name]


def test_weights_of_another_net_or_of_none_are_refused(run, alone, tmp_path):
    with pytest.raises(SystemExit, match=r"its net is .*\[3\].*, that of this run .*\[4\]"):
        run(tmp_path, "vae", "--init_from", str(alone), "--latent_units", "4")
    with pytest.raises(SystemExit, match="init_from = .*: it has no model.weights.h5: train that run first"):
        run(tmp_path, "vae", "--init_from", str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_that_started_from_anothers_weights_does_not_need_them_any_more(run, alone, tmp_path, uncompiled):
    first = shutil.copytree(alone, tmp_path / "first" / alone.name)
    damaged = first / "model.weights.h5"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:3000])
    options = ("vae", "--init_from", str(first), "--batch", "60")
    with pytest.raises(OSError, match="model.weights.h5 is damaged .* run its own command again, or name another"):
        run(tmp_path / "results", *options, *TRAIN_ALONE)
    damaged.write_bytes(good)
    (folder,) = run(tmp_path / "results", *options, *TRAIN_ALONE)
    (folder / "model.weights.h5").unlink()
    (folder / "initial.weights.h5").write_bytes(good[:3000])
    with pytest.raises(OSError, match="initial.weights.h5 is damaged .* delete it, and the same command copies it"):
        run(tmp_path / "results", *options, *TRAIN_ALONE)
    (folder / "initial.weights.h5").unlink()
    run(tmp_path / "results", *options, *TRAIN_ALONE)
    shutil.rmtree(first)
    run(tmp_path / "results", *options, *NO_PLOT)
    undisturbed = weights(folder)
    (folder / "model.weights.h5").unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()  # as a first save leaves it that is killed
    run(tmp_path / "results", *options, *TRAIN_ALONE)
    np.testing.assert_array_equal(weights(folder), undisturbed)


def test_an_evaluation_killed_between_its_two_files_is_done_again(run, alone, tmp_path, uncompiled):
    """That of other images, say: likelihoods of the new, results of the old."""
    place = shutil.copytree(alone.parents[1], tmp_path / "results", ignore=shutil.ignore_patterns("results.json"))
    (folder,) = run(place, "iwae", "--train", "false", *NO_PLOT)
    results = results_of(folder)
    (folder / "results.json").write_text(json.dumps(results | {"evaluation": "another", "digest": "another"}))
    run(place, "iwae", "--train", "false", *NO_PLOT)
    assert results_of(folder) == results


def test_other_weights_are_evaluated_again(run, alone, tmp_path, uncompiled):
    place = shutil.copytree(alone.parents[1], tmp_path / "results", ignore=shutil.ignore_patterns("results.json"))
    (folder,) = run(place, "iwae", "--train", "false", *NO_PLOT)
    before, model = results_of(folder), load_run(folder)
    model.decoder[0].head.bias.assign_add(np.ones(36))
    save_weights(model, folder / "model.weights.h5")
    run(place, "iwae", "--train", "false", *NO_PLOT)
    after = results_of(folder)
    assert after["nll"] != before["nll"] and after["evaluation"] != before["evaluation"]


def test_a_killed_evaluation_goes_on_though_another_has_ended_since(run, alone, tmp_path, monkeypatch, uncompiled):
    """Whose folder its results are to lie in is known only then; its blocks wait in the run's folder."""
    place = shutil.copytree(alone.parents[1], tmp_path / "results", ignore=shutil.ignore_patterns("results.json"))
    bounds, kept = evaluation.bounds, []

    def killed(model, x, k, seed, title, path):
        kept.append(path)
        if k == 4 and len(kept) == 1:
            path.parent.mkdir()
            path.touch()
            raise KeyboardInterrupt
        return bounds(model, x, k, seed, title, None)

    monkeypatch.setattr(evaluation, "bounds", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place, "iwae", "--train", "false", "--k_evaluation", "4", *NO_PLOT)
    run(place, "iwae", "--train", "false", *NO_PLOT)
    assert kept[0].exists()
    (folder,) = run(place, "iwae", "--train", "false", "--k_evaluation", "4", *NO_PLOT)
    assert kept[0] == kept[2] != kept[1] and not kept[0].parent.exists()
    assert (folder / "k_evaluation4" / "results.json").exists()


def test_fields_that_do_not_train_meet_the_same_run(run, alone, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    place = alone.parents[1]
    for option in (["--k_evaluation", "4"], ["--split", "validation"], ["--snapshot_epochs", "1"]):
        assert run(place, "iwae", *option, *TRAIN_ALONE) == [alone]
        said = capsys.readouterr().out
        assert ("weights of epochs 1 were not kept" in said and "--results_dir" in said) == ("snapshot" in option[0])


def test_batch_above_the_training_set_is_refused(run, tmp_path):
    line = leaves(run, tmp_path, "iwae", "--batch", "121")
    assert "batch = 121" in line and "120 train images" in line and not any(tmp_path.iterdir())


# Training: seeds, resume, faults.


def test_same_seed_same_run(alone, iwae):
    same_training(alone, iwae)


@pytest.mark.slow
def test_other_seed_other_run(run, tmp_path, iwae, uncompiled):
    (folder,) = run(tmp_path, "iwae", "--seed", "1", *TRAIN_ALONE)
    assert folder.name == iwae.name.replace("seed0", "seed1")
    assert np.abs(weights(folder) - weights(iwae)).mean() > 0.05  # another start, not other roundings
    assert log_of(folder)[-1]["bound_train"] != pytest.approx(log_of(iwae)[-1]["bound_train"], rel=1e-4)


def stop_in_epoch_2(monkeypatch):
    whole = training.run_stretch

    def run_stretch(stretch, inputs, done, variables, bar):
        if done.epochs == 1:
            stretch(*inputs, 0, 3)  # some steps are taken, and lost
            raise KeyboardInterrupt
        return whole(stretch, inputs, done, variables, bar)

    monkeypatch.setattr(training, "run_stretch", run_stretch)
    return KeyboardInterrupt


def die_between_log_and_checkpoint(monkeypatch):
    save = Checkpoints.save

    def save_once(checkpoints, name):
        if name == "00002-0":
            raise KeyboardInterrupt
        return save(checkpoints, name)

    monkeypatch.setattr(Checkpoints, "save", save_once)
    return KeyboardInterrupt


def diverge_in_epoch_2(monkeypatch):
    whole = training.epoch_inputs

    def epoch_inputs(epoch, n, parameters):
        order, rates, seed = whole(epoch, n, parameters)
        return order, rates * np.float32("nan" if epoch.number == 2 else 1), seed

    monkeypatch.setattr(training, "epoch_inputs", epoch_inputs)
    return FloatingPointError


AVERAGED = ("iwae", "--ema", "0.9", "--snapshot_epochs", "1,2")


@pytest.fixture(scope="module")
def averaged(run, tmp_path_factory):
    """A run with averaged weights and snapshots, never stopped, and evaluated."""
    (folder,) = run(tmp_path_factory.mktemp("averaged"), *AVERAGED, *NO_PLOT)
    return folder


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_never_stopped(run, tmp_path, averaged):
    """However it is stopped: every weight to the last bit, and the log. No model is left half trained."""
    folder = tmp_path / "tiny" / averaged.name
    for stop in (stop_in_epoch_2, diverge_in_epoch_2, die_between_log_and_checkpoint):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CHECKPOINTS", 0)
            with pytest.raises(stop(monkeypatch), match="epoch 2" if stop is diverge_in_epoch_2 else None):
                run(tmp_path, *AVERAGED, *TRAIN_ALONE)
        assert not (folder / "model.weights.h5").exists()
        newest = max(path.name for path in (folder / "checkpoints").iterdir())
        assert newest == ("00001-4" if stop is die_between_log_and_checkpoint else "00001-0")
        assert log_of(folder)[:1] == log_of(averaged)[:1]
        assert len(log_of(folder)) == (2 if stop is die_between_log_and_checkpoint else 1)
    assert run(tmp_path, *AVERAGED, *TRAIN_ALONE) == [folder]
    same_training(folder, averaged)


def test_averaged_weights_are_saved_and_evaluated(averaged, iwae):
    """Beside the same run without `ema`: validation in between leaves no trace in the training, see bound_train."""
    assert not np.array_equal(weights(averaged), weights(iwae))
    assert np.abs(weights(averaged) - weights(iwae)).max() < 0.1  # an average of the same path
    assert results_of(averaged)["nll"] != results_of(iwae)["nll"]
    assert [r["bound_train"] for r in log_of(averaged)] == [r["bound_train"] for r in log_of(iwae)]
    assert [r["bound_validation"] for r in log_of(averaged)] != [r["bound_validation"] for r in log_of(iwae)]


def test_snapshots(averaged):
    names = sorted(path.name for path in (averaged / "snapshots").iterdir())
    assert names == ["epoch0001.weights.h5", "epoch0002.weights.h5"]
    first, second = (np.concatenate([a.ravel() for a in load_run(averaged, epoch).get_weights()]) for epoch in (1, 2))
    assert not np.array_equal(first, second)
    assert np.array_equal(second, weights(averaged))  # what is validated and saved at the end
    with pytest.raises(FileNotFoundError, match="epoch 3 was not kept. Kept: 1, 2"):
        load_run(averaged, epoch=3)


def test_tensorboard_shows_scalars_and_images(iwae):
    """Ten validation images above their reconstructions, and four rows of ten samples, after epochs 1 and 2."""
    sizes = {}
    for path in (iwae / "tensorboard").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                sizes.setdefault(value.tag, []).append(tuple(int(n) for n in value.tensor.string_val[:2]))
    assert sizes["reconstructions"] == [(60, 12)] * 2 and sizes["prior samples"] == [(60, 24)] * 2  # width, height
    assert {"bound_train", "bound_validation"} < set(sizes)


@pytest.mark.slow
def test_two_latent_units_with_snapshots_have_every_figure(run, tmp_path, uncompiled):
    (folder,) = run(tmp_path, "iwae", "--latent_units", "2", "--snapshot_epochs", "1")
    expected = {f"{name}.png" for name in PLOTS} | {f"{name}.gif" for name in ANIMATIONS} | {"arrays.npz"}
    assert {path.name for path in (folder / "figures").iterdir()} == expected
    assert list(np.load(folder / "figures" / "arrays.npz")["snapshot_epoch"]) == [1, 2]


@pytest.mark.slow
def test_diagnose_alone(run, alone, monkeypatch, uncompiled):
    """By its switch, on a run that is trained and no more; nothing else on disk changes. Four estimators, for time."""
    estimators = [
        run for run in experiments.GROUPS["estimators"] if run.objective in ("iwae", "dreg", "ciwae", "piwae")
    ]
    monkeypatch.setitem(experiments.GROUPS, "estimators", estimators)
    for name, value in {"WEIGHT_KS": (2,), "GRADIENT_KS": (2,), "GRADIENT_IMAGES": 2, "REPLICATES": 2}.items():
        monkeypatch.setattr(diagnostics, name, value)
    monkeypatch.setattr(training, "STEPS_TIMED", 1)
    before = contents(alone)
    run(alone.parents[1], "iwae", "--train", "false", "--evaluate", "false", *NO_PLOT, "--diagnose", "true")
    new = {path.name for path in set(contents(alone)) - set(before)}
    assert {"diagnostics.npz", *(f"{name}.png" for name in DIAGNOSTICS)} == new
    assert {path: contents(alone)[path] for path in before} == before
    arrays = np.load(alone / "figures" / "diagnostics.npz")
    assert list(arrays["label"]) == ["iwae", "dreg", "ciwae beta 0.5", "piwae groups 2"]
    assert list(arrays["target"]) == [0, 0, 2, 3] and arrays["gradient_snr"].shape == (4, 2, 1)
    assert np.all(arrays["step_milliseconds"] > 0) and arrays["step_k"] == 8


def test_a_run_that_diverges_does_not_keep_the_others_from_being_trained(run, tmp_path, monkeypatch, capsys):
    trained = []

    def train(run):
        if run.parameters.objective == "vae":
            raise FloatingPointError("not finite in epoch 1")
        trained.append(run.label)

    monkeypatch.setattr(experiments, "train_run", train)
    with pytest.raises(FloatingPointError, match=f"^not done, see above: tiny/vae{NAME}$"):
        run(tmp_path, *TRAIN_ALONE)
    assert trained == [f"tiny/iwae{NAME}"] and "experiments.py: not finite in epoch 1" in capsys.readouterr().err
    with pytest.raises(FloatingPointError, match="^not finite in epoch 1$"):
        run(tmp_path, "vae", *TRAIN_ALONE)


@pytest.mark.parametrize("started", [True, pytest.param(False, marks=pytest.mark.xfail(strict=True))])
def test_programs_of_many_objectives_are_no_warning(started):
    code = "import tensorflow as tf\n" + "import command_line; command_line.start_tensorflow()\n" * started
    code += "def program(i): return tf.function(lambda x: x + i)\n[program(i)(tf.constant(1)) for i in range(12)]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "retracing" not in done.stderr


def test_a_path_that_tensorflow_takes_for_a_pattern_is_refused(run, tmp_path):
    assert "TensorFlow reads no checkpoint under [ or \\" in leaves(run, tmp_path / "res[1]", "iwae", *TRAIN_ALONE)
    assert not list(tmp_path.iterdir())


def test_estimators_are_trained_and_compared_with_iwae(run, tmp_path, monkeypatch, uncompiled):
    """Two of the group, for time's sake."""
    monkeypatch.setitem(experiments.GROUPS, "estimators", experiments.GROUPS["estimators"][:4:3])
    folders = run(tmp_path, "estimators", "--epochs", "1", *NO_PLOT)
    assert [json.loads((folder / "parameters.json").read_text())["objective"] for folder in folders] == ["dreg", "iwae"]
    rows = [line for line in (tmp_path / "tiny" / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["iwae", "dreg"]


# Every kind of run.


def options_of(objective):
    return [objective, *(word for name in needs(objective) for word in (f"--{name}", EXTRA[name]))]


def check_objective(run, place, objective):
    (folder,) = run(place, *options_of(objective), "--epochs", "1", "--batch", "40", *TRAIN_ALONE)
    (record,) = log_of(folder)
    assert -100 < record["bound_train"] < 0 and -100 < record["bound_validation"] < 0
    assert np.isfinite(weights(folder)).all()


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
def test_every_objective_trains(run, tmp_path, objective, uncompiled):
    check_objective(run, tmp_path, objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", losses.OBJECTIVES)
def test_every_objective_trains_compiled(run, tmp_path, objective):
    check_objective(run, tmp_path, objective)


@pytest.mark.slow
def test_two_layers(run, tmp_path):
    (folder,) = run(
        tmp_path, "iwae", "--latent_units", "3,2", "--hidden_units", "((8,),(6,))", "--epochs", "40", *NO_PLOT
    )
    assert "__latent_units3-2__hidden_units8_6__" in folder.name
    assert len(results_of(folder)["active_units"]) == 2
    assert load_run(folder).latent_units == (3, 2)
    bounds = [record["bound_train"] for record in log_of(folder)]
    assert np.mean(bounds[:10]) + 0.5 < np.mean(bounds[-10:])  # with four seeds 1.5 to 3.0 nats


@pytest.mark.parametrize(
    "options",
    [("--optimizer", "muon"), ("--k", "4", "--backward_samples", "2"), ("--binarization", "fixed"), ("--k", "3")],
    ids=lambda options: options[-2].strip("-"),
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_option_changes_the_training(run, tmp_path, options, compiled, iwae, tiny, request):
    if not compiled:
        request.getfixturevalue("uncompiled")
    if "fixed" in options:
        with np.load(tiny) as arrays:
            black = {k: a if k[0] == "y" else np.uint8(255) * (a > 127) for k, a in arrays.items()}
        np.savez(tmp_path / "tiny.npz", **black)
        options += ("--dataset", str(tmp_path / "tiny.npz"))
    (folder,) = run(tmp_path, "iwae", *options, *TRAIN_ALONE)
    first, last = log_of(folder)
    assert -40 < first["bound_train"] < 0 and first["bound_validation"] - 1 < last["bound_validation"] < 0
    assert [first, last] != log_of(iwae) and not np.allclose(weights(folder), weights(iwae), atol=1e-3)


@pytest.mark.slow
def test_continuous_data_without_labels(run, tmp_path, tiny, uncompiled):
    """Grey images as they are, a Gaussian likelihood whose standard deviation is learned; plots of it too."""
    with np.load(tiny) as arrays:
        np.savez(tmp_path / "bare.npz", **{key: arrays[key] for key in datasets_download.X_KEYS})
    options = ("--likelihood", "gaussian", "--binarization", "none", "--dataset", str(tmp_path / "bare.npz"))
    (folder,) = run(tmp_path, "iwae", *options)
    assert folder.parent.name == "bare"
    assert "__binarizationnone__" in folder.name and "__likelihoodgaussian__" in folder.name
    assert load_run(folder).decoder[0].log_std.numpy() < 0
    arrays = np.load(folder / "figures" / "arrays.npz")
    assert np.array_equal(arrays["x"], arrays["x_mean"]) and len(np.unique(arrays["x"])) > 20
    assert {path.stem for path in (folder / "figures").glob("*.png")} == ANY_NET


def test_a_released_run_is_taken_in_place_of_training(run, alone, tmp_path, monkeypatch, uncompiled):
    """Copied to the results, where it is evaluated and drawn as any other; what was not released is refused."""
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(runs, "RELEASED", alone.parents[1])
    before = contents(alone)
    (folder,) = run(tmp_path, "iwae", "--pretrained", *NO_PLOT)
    assert contents(alone) == before
    for path, content in before.items():
        assert contents(folder)[folder / path.relative_to(alone)] == content
    with pytest.raises(SystemExit, match=f"--pretrained: tiny/vae.* was not released; there are: tiny/{alone.name}"):
        run(tmp_path, "vae", "--pretrained", *NO_PLOT)
    assert run(tmp_path, "iwae", *NO_PLOT) == [folder]


def test_figures_of_other_images_than_were_evaluated_are_refused(iwae, tiny, tmp_path):
    """The data digest of a run's folder is of the images that it is trained with."""
    folder = shutil.copytree(iwae, tmp_path / "tiny" / iwae.name)
    with np.load(tiny) as file:
        np.savez(tmp_path / "tiny.npz", **dict(file, x_test=file["x_test"][:20], y_test=file["y_test"][:20]))
    before = contents(folder)
    arguments = ["iwae", "--dataset", str(tmp_path / "tiny.npz"), "--k", "2", "--latent_units", "3"]
    arguments += ["--hidden_units", "(8,),", "--epochs", "2", "--batch", "10", "--k_evaluation", "3"]
    left = leaves(experiments.main, [*arguments, "--results_dir", str(tmp_path), "--evaluate", "false"])
    assert "was evaluated on other images" in left and contents(folder) == before


@pytest.mark.slow
def test_no_evaluation_replaces_another(run, alone, tmp_path, uncompiled):
    """The first lies in the run's folder; with other images or another k it has a folder of its own, and figures."""
    evaluated = shutil.ignore_patterns("results.json", "log_likelihoods.npy", "figures")
    folder = shutil.copytree(alone, tmp_path / "tiny" / alone.name, ignore=evaluated)
    first = ("--split", "validation")
    for options, place, n in [
        ((*first, *NO_PLOT), ".", 20),
        (("--k_evaluation", "4", *NO_PLOT), "k_evaluation4__splittest", 30),
        ((*first, "--k_evaluation", "4", *NO_PLOT), "k_evaluation4", 20),
        (("--split", "train", "--images", "50", "--units", "active"), "splittrain__images50__unitsactive", 50),
        ((*first, *NO_PLOT), ".", 20),
    ]:
        before = contents(folder)
        run(tmp_path, "iwae", "--train", "false", *options)
        results = results_of(folder / place)
        assert results[f"n_{results['split']}"] == n and np.load(folder / place / "log_likelihoods.npy").shape == (n,)
        assert {path: contents(folder)[path] for path in before} == before
    (drawn,) = folder.glob("*/figures/arrays.npz")
    assert drawn.parts[-3] == "splittrain__images50__unitsactive" and str(np.load(drawn)["split"]) == "train"


def test_unreachable_mnist_goes_on_with_the_sample(run, tiny, tmp_path, monkeypatch, capsys, uncompiled):
    """One line says what was tried and what it costs; folder, results and page bear the sample's name."""

    def load(name, datasets_dir=None, binarization=None):
        if name == "mnist":
            raise downloads.Unavailable("mnist could not be had from any source:\n  https://a: gone\nWay out.")
        return datasets_download.load_dataset(str(tiny), datasets_dir, binarization)._replace(name=name)

    monkeypatch.setattr(runs, "load_dataset", load)
    folders = run(tmp_path, "--dataset", "mnist", "--batch", "60", "vae", "iwae", *NO_PLOT)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Going on" in line]
    for words in ("mnist could not be had", "https://a: gone", "mnist_sample", "cannot be compared"):
        assert words in line
    assert {folder.parent for folder in folders} == {tmp_path / "mnist_sample"} and len(folders) == 2
    for folder in folders:
        assert results_of(folder)["dataset"] == "mnist_sample"
        assert json.loads((folder / "parameters.json").read_text())["dataset"] == "mnist_sample"
    assert (tmp_path / "mnist_sample" / "comparison.md").read_text().startswith("# Runs on mnist_sample")


@pytest.mark.slow
def test_program_is_quiet(tiny, tmp_path):
    """The command itself: exit status 0, no line of TensorFlow's about CUDA or oneDNN, nothing but the bar."""
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    arguments = ["iwae", "--dataset", tiny, "--latent_units", "3", "--hidden_units", "(8,),", "--epochs", "1", *NO_PLOT]
    command = [sys.executable, "experiments.py", *map(str, arguments), "--results_dir", str(tmp_path), "--k", "1"]
    done = subprocess.run(
        [*command, "--k_evaluation", "2"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(command_line.STARTUP_CHATTER, done.stderr + done.stdout)
    noise = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and "%|" not in line]
    assert noise == []
    assert re.search(r"quick schedule, k = 1, 1 epoch: about \d+ \w+ on this machine", done.stdout)


def test_weights_that_give_no_likelihood_are_told_and_nothing_is_written(run, alone, tmp_path, uncompiled):
    folder = shutil.copytree(alone, tmp_path / "tiny" / alone.name, ignore=shutil.ignore_patterns("results.json"))
    model = load_run(folder)
    model.theta[0].assign(model.theta[0] * float("nan"))
    save_weights(model, folder / "model.weights.h5")
    with pytest.raises(
        FloatingPointError, match=r"log-likelihood or ELBO of images \[0, 1, .* not finite: are the weights"
    ):
        run(tmp_path, "iwae", *NO_PLOT)
    assert not (folder / "results.json").exists()
