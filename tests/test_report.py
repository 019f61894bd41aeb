"""report.py, docs/release.py and pretrained/: the README's tables are of the files there, the files of the nets."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from matplotlib.image import imread

import experiments
import report
import runs
from command_line import NOT_IN_NAME
from datasets_download import binarize, load_dataset
from docs.release import release
from report import BEST, BY_SCHEDULE, EVALUATIONS, PAPER, rewritten, schedules_figure, table_1, table_2
from run_folder import read_log
from schedules import plan_epochs

RELEASED_RUNS = sorted(path.parent for path in runs.RELEASED.glob("*/*/model.weights.h5"))
RECOMPUTED = ("iwae_l1_k50_fast__seed0", "iwae_l2_k50_fast__seed0")  # in the fast suite
REPORT = """
import pathlib, sys, experiments, report
report.README = pathlib.Path(sys.argv[1])
experiments.main(["--report"])
assert "tensorflow" not in sys.modules
"""


def evaluated(folder, nll, active=(22,), generator=runs.GENERATOR, **fields):
    """Write what an evaluation of two images leaves, and the training before it, its weights empty."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.parent.name == "mnist":
        (folder / "model.weights.h5").touch()
    if folder.parent.name == "mnist" and not (folder / "parameters.json").exists():
        (folder / "parameters.json").write_text(json.dumps({"random_numbers": generator}))
    log_likelihoods = np.float32([-nll - 0.25, -nll + 0.25])
    np.save(folder / "log_likelihoods.npy", log_likelihoods)
    results = {"nll": nll, "nll_standard_error": 0.25, "elbo": -100.0, "active_units": active, "train_seconds": 600.0}
    results |= {"k": 5, "objective": "iwae", "seed": 0, "dataset": "mnist", "k_evaluation": 5000, "split": "test"}
    results |= {"images": None, "units": "all", "evaluated": "test", "epochs": 130} | fields
    results = runs.sealed(results, (folder / "log_likelihoods.npy").read_bytes())
    (folder / "results.json").write_text(json.dumps(results))


def cells(table):
    """The rows of a Markdown table: {first cell: the others}."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {first: others for first, *others in rows}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A pretrained/ of two seeds of two cells, one of a net of two layers and one whose objective was switched."""
    monkeypatch.setattr(runs, "RELEASED", tmp_path)
    for seed, nll, generator in ((0, 85.0, "philox"), (1, 85.5, runs.GENERATOR)):
        folder = tmp_path / "mnist" / f"iwae_l1_k5_fast__seed{seed}"
        evaluated(folder, nll, [22 + seed], generator, train_seconds=600.0 + 1200 * seed)
        evaluated(folder / "splittrain__images10000", nll - 1, split="train", images=10000, evaluated="train")
        evaluated(folder / "unitsactive", nll + 0.125, units="active")
    evaluated(tmp_path / "mnist" / "iwae_l2_k50_fast__seed0", 82.25, [30, 8])
    for seed in range(3):
        evaluated(tmp_path / "mnist" / f"vae_l1_k1_fast__seed{seed}", 86.5 + seed, [19])
    evaluated(tmp_path / "mnist" / "vae_to_iwae_fast__seed0", 84.75, [21])
    return runs.read_released()


def test_report_gives_the_readmes_tables_byte_for_byte(tmp_path):
    """From a README whose tables are empty; without TensorFlow."""
    readme, copy = report.README.read_text(), tmp_path / "README.md"
    names = re.findall("<!-- report: (.+) -->", readme)
    copy.write_text(readme)
    copy.write_text(rewritten(copy, dict.fromkeys(names, "")))
    assert (
        names == ["posterior_2d", "table 1", "objectives", "table 2", "passes", "schedules"]
        and len(copy.read_text()) < len(readme) - 3000
    )
    subprocess.run([sys.executable, "-c", REPORT, str(copy)], check=True, cwd=report.README.parent)
    assert copy.read_bytes() == report.README.read_bytes()
    for name in ("schedules", "minutes"):
        drawn, ours = (imread(page.parent / "docs" / f"{name}.png") for page in (copy, report.README))
        assert drawn.shape == ours.shape and (np.abs(drawn - ours).max(axis=-1) > 0.2).sum() < 100


def test_table_1(made_up):
    rows = cells(table_1(made_up))
    assert set(rows) >= {f"{name}_fast" for name in PAPER | BEST} and len(rows) == 2 + 14
    ours, theirs = ["85.25 ± 0.25", "85.54", "22, 23", "22", "-0.29"], "85.41 Li"
    others = ["2: 85.00 and 85.50", "84.00 (-1.00)", "85.12 (+0.12 ± 0.00)", "10 to 30 min, Philox and Threefry"]
    assert rows["iwae_l1_k5_fast"] == [*ours, theirs, *others]
    assert rows["vae_l1_k1_fast"][6] == "3, ± 1.00"
    assert rows["iwae_l2_k50_fast"][:5] == ["82.25 ± 0.25", "82.90", "30+8", "26+7", "-0.65"]
    assert rows["iwae_l2_k50_fast"][6:] == ["1", "", "", "10 min"]
    assert rows["dreg_l1_k5_fast"] == ["not trained yet", "", "", "", "", "", "0", "", "", ""]


def test_objectives_are_compared_in_pairs(made_up):
    """The second less the first, in nats of NLL, of each seed that both have, ± the standard error over images."""
    made = made_up["iwae_l1_k5_fast__seed0"]
    vae = {f"vae_l1_k5_fast__seed{i}": made | {"log_likelihoods": np.float32([-86, -86])} for i in (0, 1, 2)}
    rows = cells(report.objectives_table(made_up | vae))
    assert rows["1 layer, k = 5"] == ["-1.00, -0.50 ± 0.25", "-0.93", "not trained yet"]
    assert rows["2 layers, k = 50"] == ["not trained yet", "-1.88", "not trained yet"] and len(rows) == 2 + 4


def test_table_2(made_up, tmp_path):
    """Before the switch: the NLL of the seed that was switched, alone. After it: less the net not switched."""
    evaluated(tmp_path / "mnist" / "iwae_to_iwae_fast__seed0", 84.5, [23])
    rows = cells(table_2(runs.read_released()))
    switched = ["86.50 ± 0.25", "86.76", "19", "19", "84.75 ± 0.25", "84.88", "21", "22", "+0.25 ± 0.00", "10 min"]
    assert rows["vae_to_iwae_fast"] == switched
    assert rows["iwae_to_iwae_fast"][4:] == ["84.50 ± 0.25", "", "23", "", "", "10 min"]
    before, after = ("not trained yet", "84.78", "", "25"), ("not trained yet", "86.02", "", "23")
    assert rows["iwae_to_vae_fast"] == [*before, *after, "not trained yet", ""]


LOG = [{"epoch": i, "seconds": 120.0 * i, "bound_train": -90.0, "bound_validation": -90 - 10 / i} for i in range(1, 21)]


ALL_BY_SCHEDULE = list(itertools.chain(*BY_SCHEDULE))


def test_passes_table(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RELEASED", tmp_path)
    for name, nll, epochs in (("", 84.5, 130), ("__epochs78", 85.0, 78), ("__epochs200", 84.0, 200)):
        evaluated(tmp_path / "mnist" / f"dreg_l1_k50_fast{name}__seed0", nll, epochs=epochs)
    rows = cells(report.passes_table(runs.read_released()))
    assert list(rows)[2:] == [f"dreg_l1_k50_fast{epochs}" for epochs in (" --epochs 78", "", " --epochs 200")]
    assert rows["dreg_l1_k50_fast --epochs 78"] == ["78", "85.00 ± 0.25", "+0.50 ± 0.00", "10 min"]
    assert rows["dreg_l1_k50_fast"] == ["130", "84.50 ± 0.25", "", "10 min"]


def test_schedules_table(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RELEASED", tmp_path)
    for i, run in enumerate(ALL_BY_SCHEDULE):
        evaluated(tmp_path / "mnist" / run, 89.5 - 3.5 * i)
    rows = cells(report.schedules_table(runs.read_released()))
    assert len(rows) == 2 + len(BY_SCHEDULE)
    fast = ["vae_l1_k1_fast --seed 1", "86.00 ± 0.25", "10 min"]
    assert rows["vae_l1_k1 --epochs 121"] == ["89.50 ± 0.25", "10 min", *fast, "-3.50 ± 0.00"]


@pytest.mark.parametrize("runs", [ALL_BY_SCHEDULE, ALL_BY_SCHEDULE[4:6]])
def test_schedules_are_drawn_against_passes_and_minutes(runs):
    panels = schedules_figure(dict.fromkeys(runs, LOG), {run: 85.0 + i for i, run in enumerate(runs)}).axes
    assert len(panels) == 2 * len({run.split("_")[1] for run in runs})
    for i, axes in enumerate(panels):
        first, depth = i % 2 + 1, i // 2
        labels = [f"{run}: NLL {85 + j}.00" for j, run in enumerate(runs)][4 * depth : 4 * depth + 4]
        assert [line.get_label() for line in axes.lines] == labels
        assert axes.lines[0].get_xydata()[[0, 19]].tolist() == [[first, -100], [20 * first, -90.5]]
        assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(axes.lines)
        ends = [[20 * first, -85.0 - j] for j in range(len(runs))][4 * depth : 4 * depth + 4]
        assert [dot.get_offsets().tolist()[0] for dot in axes.collections] == ends


def test_nll_is_drawn_against_minutes_for_each_depth(made_up, tmp_path):
    """One dot and label for each cell, hollow by the paper's schedule; the paper's NLL of k = 50 as lines."""
    evaluated(tmp_path / "mnist" / "iwae_l1_k50__epochs121__seed0", 88.0, train_seconds=1200.0)
    panels = report.minutes_figure(runs.read_released()).axes
    texts = [[text.get_text() for text in axes.texts] for axes in panels]
    assert texts == [["1", "50 (121 passes)", "5"], ["50"]]
    dots = [line for line in panels[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [line.get_xydata().tolist()[0] for line in dots] == [[10.0, 87.5], [20.0, 88.0], [30.0, 85.5]]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [False, True, False]
    lines = [[line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] for axes in panels]
    assert lines == [[86.35, 84.78], [84.78, 82.90]]


@pytest.mark.parametrize("run", ["vae_2d_k5__seed0", "dreg_l1_k50_fast__seed0", ALL_BY_SCHEDULE[0]])
def test_report_needs_the_runs_that_others_are_compared_with(tmp_path, monkeypatch, run):
    released = shutil.copytree(runs.RELEASED, tmp_path / "pretrained", ignore=shutil.ignore_patterns("snapshots", run))
    for module in (runs, report):
        monkeypatch.setattr(module, "RELEASED", released)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    with pytest.raises(SystemExit, match=f"--report: .*{run} is missing"):
        experiments.main(["--report"])
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained"]


@pytest.mark.parametrize("field, value", [("k_evaluation", 500), ("units", "active"), ("evaluated", "others")])
def test_report_refuses_another_evaluation(made_up, tmp_path, field, value):
    """Else it would stand in a mean, or be paired, with those of other images or of another k."""
    report.check_evaluations(made_up, experiments.NAMED_RUNS)
    evaluated(tmp_path / "mnist" / "iwae_l2_k50_fast__seed0", 82.0, **{field: value})
    with pytest.raises(SystemExit, match=f"iwae_l2_k50_fast__seed0: {field} = {value}, must be"):
        report.check_evaluations(runs.read_released(), experiments.NAMED_RUNS)


def test_report_asks_of_a_run_what_its_release_asked(made_up, tmp_path, monkeypatch):
    monkeypatch.setitem(experiments.NAMED_RUNS, "mine", experiments.Parameters(k_evaluation=7))
    evaluated(tmp_path / "mnist" / "mine__seed0", 90.0, k_evaluation=7)
    report.check_evaluations(runs.read_released(), experiments.NAMED_RUNS)


def test_report_reads_no_run_without_its_files(made_up, tmp_path):
    for name in ("parameters.json", "results.json"):
        shutil.copytree(tmp_path / "mnist" / "iwae_l1_k5_fast__seed1", tmp_path / "mnist" / "vae_l1_k5_fast__seed1")
        (tmp_path / "mnist" / "vae_l1_k5_fast__seed1" / name).unlink()
        with pytest.raises(OSError, match=f"vae_l1_k5_fast__seed1/{name} is damaged or missing"):
            runs.read_released()
        shutil.rmtree(tmp_path / "mnist" / "vae_l1_k5_fast__seed1")


@pytest.mark.parametrize("mark", ["<!-- report: passes -->", "<!-- end -->"])
def test_report_says_which_table_has_no_place_and_writes_nothing(tmp_path, monkeypatch, mark):
    """A table without its end would take all with it that stands before the next one's."""
    before, table = report.README.read_text().split("<!-- report: passes -->")
    page = before + ("<!-- report: passes -->" + table).replace(mark, "", 1)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(page)
    with pytest.raises(
        SystemExit, match="README.md: the line <!-- report: passes -->, or its <!-- end -->, is missing"
    ):
        experiments.main(["--report"])
    assert report.README.read_text() == page and not (tmp_path / "docs").exists()


def test_only_what_lies_between_markers_is_rewritten(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- report: b -->\nold\n<!-- end -->\nc\n<!-- end -->\n")
    assert rewritten(page, {"b": r"\1"}) == "a\n<!-- report: b -->\n\n\\1\n\n<!-- end -->\nc\n<!-- end -->\n"


# Releasing.

LIKELIHOODS = "log_likelihoods.npy"
TRAINED = {"objective": "iwae", "k": 5, "seed": 0}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run's folder as experiments.py leaves it, evaluated in three ways; pretrained/ is an empty place."""
    monkeypatch.setattr(runs, "RELEASED", tmp_path / "pretrained")
    folder = tmp_path / "elsewhere" / "mnist" / "iwae_l1_k5_fast__seed0"
    for place, fields in EVALUATIONS.items():
        evaluated(folder / place, 85.0, weights="ours", **fields)
    others = ("checkpoints/one", "tensorboard/one", "figures/one.png", ".lock")
    with h5py.File(folder / "model.weights.h5", "w") as file:
        file.attrs["digest"] = "ours"
    for name in ("snapshots/epoch0001.weights.h5", *others):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "log.jsonl").write_text("".join(json.dumps(LOG[0] | {"epoch": i}) + "\n" for i in range(1, 131)))
    parameters = {"results_dir": str(tmp_path), "datasets_dir": "/d"} | TRAINED
    (folder / "parameters.json").write_text(json.dumps(parameters))
    return folder


@pytest.mark.parametrize("evaluations", [1, 3])
@pytest.mark.parametrize("same", [True, False])
def test_a_finished_run_is_released(finished, evaluations, same):
    """With as many evaluations as it has, that of the test images is one of them; of other weights nothing stays."""
    snapshot = Path("snapshots", "epoch0001.weights.h5")
    (finished / snapshot).with_name("epoch0002.weights.h5").touch()
    release(finished)
    (finished / snapshot).with_name("epoch0002.weights.h5").unlink()
    for place in list(EVALUATIONS)[evaluations:]:
        shutil.rmtree(finished / place)
    if not same:
        with h5py.File(finished / "model.weights.h5", "a") as file:
            file.attrs["other"] = 1
    release(finished)
    target = runs.RELEASED / "mnist" / finished.name
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    new = {"model.weights.h5", "log.jsonl", snapshot.as_posix()}
    evaluated_in = [(Path(place) / name).as_posix() for place in EVALUATIONS for name in (LIKELIHOODS, "results.json")]
    new |= set(evaluated_in[: 2 * evaluations])
    old = {*evaluated_in, snapshot.with_name("epoch0002.weights.h5").as_posix()} if same else set()
    assert files == new | old | {"parameters.json"}
    assert all((target / name).read_bytes() == (finished / name).read_bytes() for name in new)
    parameters = json.loads((target / "parameters.json").read_text())
    assert parameters == {"results_dir": "results", "datasets_dir": None} | TRAINED
    assert len(runs.read_released()) == (3 if same else evaluations)


def change(folder, **fields):
    """Give parameters.json other fields."""
    (folder / "parameters.json").write_text(json.dumps(json.loads((folder / "parameters.json").read_text()) | fields))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda folder: (folder / "model.weights.h5").unlink(), "has no model.weights.h5"),
        (lambda folder: (folder / "results.json").unlink(), "has no results.json"),
        (lambda folder: evaluated(folder / "unitsactive", 85.0), "unitsactive: another evaluation than"),
        (lambda folder: evaluated(folder, 85.0, k_evaluation=500), "seed0: another evaluation than .*way out: delete"),
        (lambda folder: evaluated(folder / "unitsactive", 85.0, units="active", seed=1), "another evaluation than"),
        (lambda folder: evaluated(folder, 85.0, weights="theirs"), "seed0: another evaluation than"),
        (lambda folder: change(folder, k=50), "by its name another run"),
        (lambda folder: change(folder, seed=1), "by its name another run"),
        (lambda folder: (folder / "log.jsonl").write_text("{}\n"), "log.jsonl is damaged"),
        (lambda folder: (folder / "parameters.json").write_text("{}"), "parameters.json is damaged"),
        (lambda folder: (folder / LIKELIHOODS).unlink(), "log_likelihoods.npy is damaged or missing"),
    ],
)
def test_an_unfinished_run_is_not_released(finished, damage, told):
    damage(finished)
    with pytest.raises((SystemExit, OSError), match=told):
        release(finished)
    assert not runs.RELEASED.exists()


# What is in pretrained/.


def test_released_results_are_of_their_likelihoods_and_name_no_machine():
    assert len(runs.read_released()) >= len(RELEASED_RUNS) > 0
    for results in runs.read_released().values():
        assert results["nll"] == pytest.approx(-results["log_likelihoods"].mean(dtype=np.float64), abs=1e-3)
    for folder in RELEASED_RUNS:
        parameters = json.loads((folder / "parameters.json").read_text())
        assert parameters["results_dir"] == "results" and parameters["datasets_dir"] is None
        assert not Path(parameters.get("init_from") or "").is_absolute()


@pytest.mark.parametrize("folder", RELEASED_RUNS, ids=lambda folder: folder.name)
def test_released_runs_are_what_their_commands_train(folder):
    """Parameters, passes, k and learning rates are those of the named run today."""
    given = json.loads((folder / "parameters.json").read_text())
    name, *changes = folder.name.partition("__seed")[0].split("__epochs")
    ours = replace(experiments.NAMED_RUNS[name], seed=given["seed"], **({"epochs": int(changes[0])} if changes else {}))
    asked = json.loads(json.dumps(asdict(ours)))
    trained = asked.keys() - NOT_IN_NAME - {"binarization"}  # None there is the data set's own
    assert {field: given.get(field) for field in trained} == {field: asked[field] for field in trained}
    log = read_log(folder, len(plan_epochs(ours)))
    assert [(r["epoch"], r["k"], r["learning_rate"]) for r in log] == [
        (epoch.number, epoch.k, epoch.rate_to) for epoch in plan_epochs(ours)
    ]


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] * (folder.name not in RECOMPUTED))
        for folder in RELEASED_RUNS
    ],
)
def test_released_likelihoods_are_those_of_the_released_weights(folder):
    """L_k of 100 test images, one block of the evaluation, by the same random numbers: only rounding may differ.

    It did by 0.00014 nats; 0.0001 more in each weight of one layer moves an image by 0.2. The shipped sample begins
    with these images, and so does its binarisation draw.
    """
    from evaluation import IMAGES_AT_ONCE, log_likelihood
    from models import load_run

    results = runs.read_results(folder)
    assert (results["dataset"], results["split"], results["units"]) == ("mnist", "test", "all")
    x = binarize(load_dataset("mnist_sample").x_test[:IMAGES_AT_ONCE], "stochastic", runs.EVALUATION_SEED)
    found = log_likelihood(load_run(folder), x, results["k_evaluation"], runs.EVALUATION_SEED)
    np.testing.assert_allclose(found, results["log_likelihoods"][: len(x)], rtol=0, atol=2e-3)
