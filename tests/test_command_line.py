"""What the command line and PARAMETERS may ask for: parsing, refusals, names of runs. No TensorFlow in here."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import experiments
import runs
from command_line import (
    ALONE,
    LIKELIHOODS,
    NOT_IN_NAME,
    OBJECTIVES,
    OPTIMIZERS,
    SCHEDULES,
    SPLITS,
    parse,
    problems,
    quiet_start,
    run_name,
    unknown,
)
from datasets_download import BINARIZATIONS, DATASETS, Dataset, DatasetError
from downloads import Unavailable
from experiments import (
    ALIASES,
    COMPARE,
    GROUPS,
    NAMED_RUNS,
    PAPER,
    PARAMETERS,
    POSTERIOR_2D,
    SWITCHED,
    Parameters,
    load_data,
    resolve,
)
from schedules import plan_epochs

ROOT = Path(experiments.__file__).resolve().parent
FIELDS = [field.name for field in fields(Parameters)]
BASE = Parameters()


def parsed(*arguments):
    """Names, overrides and what stands alone; of what is wrong, `experiments.main` is asked."""
    return parse(arguments, Parameters, "description")[:3]


def leaves(function, *arguments):
    """The line with which a call leaves; its exit status is not zero, for Python makes 1 of a text."""
    with pytest.raises(SystemExit) as left:
        function(*arguments)
    assert isinstance(left.value.code, str) and left.value.code
    return left.value.code


# Parsing.


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("dataset", "omniglot", "omniglot"),
        ("dataset", "1.npz", "1.npz"),
        ("results_dir", "2016", "2016"),
        ("results_dir", "none", "none"),
        ("datasets_dir", "/data/5", "/data/5"),
        ("datasets_dir", "none", None),
        ("init_from", "None", None),
        ("binarization", "none", "none"),  # a kind of data here, not None
        ("objective", "dreg", "dreg"),
        ("k", "50", 50),
        ("k", "-1", -1),
        ("k", "many", "many"),
        ("k", "2.5", 2.5),
        ("k", "{[]: 1}", "{[]: 1}"),
        ("k", "(" * 3, "((("),
        ("epsilon", "1e-4", 1e-4),
        ("ema", "0.999", 0.999),
        ("epochs", "none", None),
        ("epochs", "None", None),
        ("epochs", "3", 3),
        ("backward_samples", "none", None),
        ("train", "false", False),
        ("train", "False", False),
        ("plot", "true", True),
        ("plot", "yes", "yes"),
        ("latent_units", "100, 50", (100, 50)),
        ("latent_units", "(100, 50)", (100, 50)),
        ("latent_units", "100,50", (100, 50)),
        ("latent_units", "50", (50,)),
        ("hidden_units", "((200, 200), (100, 100))", ((200, 200), (100, 100))),
        ("hidden_units", "(200, 200),", ((200, 200),)),
        ("snapshot_epochs", "1, 16", (1, 16)),
        ("snapshot_epochs", "()", ()),
    ],
)
def test_value(field, text, value):
    names, overrides, alone = parsed(f"--{field}", text)
    assert (names, overrides, alone) == ([], {field: value}, [])
    assert type(overrides[field]) is type(value)
    assert parsed(f"--{field}={text}") == (names, overrides, alone)


def test_a_value_too_deep_for_python_is_a_text():
    deep = "-" * 3000 + "1"
    assert parsed(f"--k={deep}")[1] == {"k": deep}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_an_option_and_a_default_survives_it(field):
    value = getattr(PARAMETERS, field)
    if field == "binarization":
        return  # where "none" is a word
    assert parsed(f"--{field}", str(value))[1] == {field: value}


@pytest.mark.parametrize(
    "arguments",
    ["iwae vae_l1_k5 --k 3 --seed 2", "--k 3 --seed 2 iwae vae_l1_k5", "iwae --k 3 vae_l1_k5 --seed 2"],
)
def test_names_stand_anywhere(arguments):
    assert parsed(*arguments.split()) == (["iwae", "vae_l1_k5"], {"k": 3, "seed": 2}, [])


def test_nothing_asked():
    assert parsed() == ([], {}, [])
    for option in ALONE:
        assert parsed(f"--{option}") == ([], {}, [option])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            "--epoch 3",
            r"'--epoch'; did you mean --epochs\? legal are --list, --report, --shard, .*--datasets_dir$",
        ),
        ("--kevaluation 3", r"'--kevaluation'; did you mean --k_evaluation\?"),
        ("--lis", r"'--lis'; did you mean --list\?"),
        ("-k 3", r"'-k'; did you mean --k\?"),
        ("iwae --zzzzzz=3", r"'--zzzzzz=3'; legal are --list"),
        ("iwae --k", r"k = '': must be an integer"),
        ("iwae --k -1e5", r"k = -100000.0: must be an integer"),
        (f"iwae --k 0x{5000 * 'f'}", r"k = '0xf+': must be an integer"),
        ("iwae --datasets_dir", r"datasets_dir = '': must be None or a folder"),
        ("--list iwae", r"--list stands alone: it runs nothing$"),
        ("--list --k 3", r"--list stands alone"),
        ("--list --shard 1/3", r"--list stands alone"),
        ("iwae --shard", r"--shard : must be i/n, with i from 1 to n, such as 1/3"),
        ("--report --list", r"--list stands alone"),
        ("--report iwae", r"--report stands alone"),
    ],
)
def test_unknown_option(arguments, expected):
    line = leaves(experiments.main, arguments.split())
    assert line.startswith("experiments.py: ") and "\n" not in line
    assert re.search(expected, line)


@pytest.mark.parametrize(
    "name, near",
    [("iwea", "iwae"), ("iwae_l1_50", "iwae_l1_k50"), ("vae_l2_k500", "vae_l2_k50"), ("IWAE", None), ("xyz", None)],
)
def test_unknown_run(name, near):
    line = leaves(resolve, [name], {})
    assert line.startswith(f"experiments.py: no run is called {name!r}") and "\n" not in line
    assert (f"did you mean {near}?" in line) if near else ("did you mean" not in line)
    assert line.endswith("legal are " + ", ".join([*NAMED_RUNS, *ALIASES, *GROUPS, *OBJECTIVES]))


def test_nothing_is_named_where_nothing_is_near():
    assert unknown("cheese", "brie", ["a", "b"]) == "no cheese is called 'brie'; legal are a, b"


def test_wrong_words_and_values_are_reported_at_once():
    """Each once; and no complaint that may only come of a word that is not known: here that ciwae lacks its beta."""
    lines = leaves(experiments.main, "ciwae iwea --bata 0.5 vea --k 0 --batch=x --sede 1 iwea".split()).splitlines()
    words = ["'--bata'; did you mean --beta?", "'--sede'; did you mean --seed?", "'iwea'; did you mean iwae?"]
    words += ["'vea'; did you mean vae?", "k = 0: must be", "batch = 'x': must be"]
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    lines = leaves(experiments.main, "ciwae miwae iwae_l1_k1 --k 3 --objective iwea".split()).splitlines()
    words = ["iwae_l1_k1 is vae_l1_k1 at k = 1 alone", "objective = 'iwea': must be", "k_evaluation = "]
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))


# Legal values.

COUNT = "an integer from 1 to 2147483647"
DECAY = "a number in [0, 1)"
POSITIVE = "a number above 0"
NONE_COUNT = f"None or {COUNT}"
UNITS = "a tuple of integers from 1 to 99999, such as"
NESTED = "a tuple of tuples of integers from 1 to 99999, such as ((200, 200), (100, 100))"
NAN, INF = float("nan"), float("inf")
BAD = {
    "dataset": ("one of mnist, ", ["mnits", "file.csv", 3, None, ("mnist",)]),
    "binarization": ("None or one of stochastic, fixed, none", ["static", 1, True, []]),
    "objective": ("one of vae, iwae, stl, dreg", ["iwea", 1, None, ["vae"]]),
    "beta": ("None or a number in [0, 1]", [-0.1, 1.1, True, "0.5", NAN]),
    "groups": (NONE_COUNT, [0, -1, 2.0, True, "2"]),
    "alpha": ("None or a number in [0, 1)", [1, 1.0, -0.1, True, "0.5", NAN]),
    "k": (COUNT, [0, -1, 2.0, True, "5", None, INF, 2**31, 10**22]),
    "latent_units": (UNITS, [(10**11,), (), (0,), (50.0,), (True,), 50, [50], "50", ((50,),), None]),
    "hidden_units": (NESTED, [(200, 200), ((),), ((0,),), ((2.0,),), ((True,),), [[200]], ([200],), 200, None]),
    "likelihood": ("one of bernoulli, gaussian", ["normal", None, 0]),
    "schedule": ("one of paper, quick, hold, fast", ["slow", None, 3, ["quick"]]),
    "epochs": ("None or an integer from 1 to 99999", [0, -3, 2.5, True, "3", 10**5, 10**19]),
    "rate_scale": (f"None or {POSITIVE}", [0, -1.0, True, "1", NAN, INF, 1e-60, 1e60]),
    "batch": (COUNT, [0, -20, 20.0, True, None]),
    "optimizer": ("one of adam, muon", ["sgd", None, 1]),
    "beta_1": (DECAY, [1, 1.0, -0.1, True, "0.9", None, NAN]),
    "beta_2": (DECAY, [1 - 1e-9, 1, 2.0, -0.1, False, "0.9", None, NAN]),
    "momentum": (DECAY, [1, 1.5, -0.1, True, "0.9", None, NAN]),
    "output_rate": (f"None or {POSITIVE}", [0, -1.0, True, "8", NAN, INF, 1e-60, 1e60]),
    "ema": (DECAY, [1, 1.0, -0.1, True, "0.9", None, NAN]),
    "epsilon": (POSITIVE, [0, 0.0, -1e-4, True, "1e-4", None, NAN, INF, 1e-60, 1e60]),
    "clip_norm": (f"None or {POSITIVE}", [0, -1.0, True, "1", NAN, INF, 1e-60, 1e60]),
    "backward_samples": (NONE_COUNT, [0, -1, 1.5, True, "2"]),
    "snapshot_epochs": (UNITS, [(0,), (1.5,), (True,), 3, [3], None]),
    "init_from": ("None or the folder of a trained run", [3, True, Path("results"), ""]),
    "seed": ("an integer from 0 to 2147483647", [-1, 2**31, 1.0, True, "1", None]),
    "k_evaluation": (COUNT, [0, -1, 500.0, True, "500", None, 3 * 10**9]),
    "split": ("one of train, validation, test", ["valid", None, 0]),
    "images": ("None or an integer of 2 or more", [1, 0, 2.0, True, "10"]),
    "units": ("one of all, active", ["dead", None, 0]),
    "pretrained": ("True or False", [1, 0, "yes", None]),
    "train": ("True or False", [1, 0, "yes", None]),
    "evaluate": ("True or False", [1, 0, "yes", None]),
    "plot": ("True or False", [1, 0, "yes", None]),
    "diagnose": ("True or False", [1, 0, "yes", None]),
    "strategy": ("one of auto, none, mirrored, multi_worker", ["gpu", None, 2]),
    "results_dir": ("a folder", [None, 3, Path("results"), "~nobody_at_all/x"]),
    "datasets_dir": ("None or a folder", [3, True, Path("datasets")]),
}
EDGES = {
    "k": [1],
    "latent_units": [(1,)],
    "hidden_units": [((1,),), ((8, 8, 8),)],
    "epochs": [1, None],
    "batch": [1],
    "beta_1": [0, 0.0, 0.999999],
    "ema": [0, 0.5],
    "epsilon": [1e-37, 1, 5.0],
    "clip_norm": [None, 1e-37, 1, 5.0],
    "backward_samples": [None, 1, 4],
    "snapshot_epochs": [(), (1,), (3, 2)],
    "seed": [0, 2**31 - 1],
    "k_evaluation": [1, 10**6],
    "dataset": ["a.npz", "some/where/b.npz", *DATASETS],
    "datasets_dir": [None, "d"],
}


def test_bad_values_are_tabled_for_every_field():
    assert list(dict.fromkeys(FIELDS)) == sorted(BAD, key=FIELDS.index) and set(BAD) == set(FIELDS)


@pytest.mark.parametrize("field, value", [(field, value) for field, (_, values) in BAD.items() for value in values])
def test_bad_value_is_named_with_the_legal_ones(field, value):
    (line,) = problems(replace(BASE, **{field: value}))
    assert line.startswith(f"{field} = {value!r}: must be {BAD[field][0]}")


@pytest.mark.parametrize("field, value", [(field, value) for field, values in EDGES.items() for value in values])
def test_legal_edge(field, value):
    assert problems(replace(BASE, **{field: value})) == []


@pytest.mark.parametrize(
    "field, legal",
    [
        ("objective", OBJECTIVES),
        ("schedule", SCHEDULES),
        ("optimizer", OPTIMIZERS),
        ("split", SPLITS),
        ("binarization", ("stochastic", "fixed")),
        ("dataset", tuple(DATASETS)),
    ],
)
def test_every_listed_value_is_taken_and_every_message_lists_it(field, legal):
    for value in legal:
        run = replace(BASE, rate_scale=0.05, **{field: value})  # without a scale `fast` is for Muon alone
        assert not any(line.startswith(f"{field} = ") for line in problems(run))
    (line,) = problems(replace(BASE, **{field: "no such thing"}))
    assert all(value in line for value in legal)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("binarization", [None, *BINARIZATIONS])
@pytest.mark.parametrize("dataset", ["mnist", "mnist_fixed", "own.npz"])
def test_likelihood_goes_with_binarization(dataset, binarization, likelihood):
    found = problems(replace(BASE, dataset=dataset, binarization=binarization, likelihood=likelihood))
    if (likelihood == "gaussian") == (binarization == "none"):
        assert found == []
    else:
        (line,) = found
        effective = binarization or {"mnist_fixed": "fixed"}.get(dataset, "stochastic")
        assert f"likelihood = {likelihood!r}" in line and f"binarization = {effective!r}" in line
        assert "continuous data (none) take gaussian" in line


@pytest.mark.parametrize(
    "changes, fragment",
    [
        (
            {"latent_units": (100, 50)},
            "hidden_units = ((200, 200),): must be of equal length",
        ),
        ({"hidden_units": ((8,), (8,))}, "must be of equal length"),
        ({"dataset": "my/mnist.npz"}, "the name of a data set's results: rename the file, or --dataset mnist"),
        ({"dataset": "my/_own.npz"}, "must not begin with _ or hold $: rename the file"),
        ({"dataset": "a$b_{$.npz"}, "must not begin with _ or hold $: rename the file"),
        ({"hidden_units": ()}, "must be of equal length"),
        ({"objective": "ciwae"}, "beta = None: objective 'ciwae' needs a value"),
        ({"objective": "vr", "k": 4}, "alpha = None: objective 'vr' needs a value"),
        ({"beta": 0.5}, "beta = 0.5: objective 'iwae' does not take a value"),
        ({"groups": 1, "objective": "vae"}, "groups = 1: objective 'vae' does not take a value"),
        ({"alpha": 0.0, "objective": "dreg"}, "alpha = 0.0: objective 'dreg' does not take a value"),
        ({"objective": "miwae", "k": 6, "groups": 4}, "groups = 4: must divide k = 6"),
        (
            {"objective": "miwae", "k": 8, "groups": 2, "schedule": "fast", "optimizer": "muon"},
            "groups = 2: must divide k = 5, then 8",
        ),
        ({"schedule": "fast"}, "schedule = 'fast': its learning rates are Muon's: take the values of FAST"),
        ({"schedule": "switch"}, "schedule = 'switch': its learning rates are Muon's"),
        (
            {"objective": "piwae", "k": 4, "groups": 2, "backward_samples": 2},
            "backward_samples: must be None for piwae",
        ),
        ({"momentum": 0.9}, "momentum = 0.9: of Muon alone: --optimizer muon, or --momentum 0.95"),
        ({"output_rate": 8.0}, "output_rate = 8.0: of Muon alone: --optimizer muon, or --output_rate None"),
        ({"schedule": "paper", "epochs": 3281}, "epochs = 3281: the paper's schedule has 3280"),
        ({"backward_samples": 5, "k": 5}, "backward_samples = 5: must be below k = 5"),
        ({"backward_samples": 6, "k": 5}, "backward_samples = 6: must be below k = 5"),
    ],
)
def test_inconsistent_pair(changes, fragment):
    (line,) = problems(replace(BASE, **changes))
    assert fragment in line


@pytest.mark.parametrize(
    "field, word, near",
    [
        ("objective", "iwea", "iwae"),
        ("dataset", "mnits", "mnist"),
        ("schedule", "papr", "paper"),
        ("optimizer", "Adam", "adam"),
        ("split", "valid", "validation"),
        ("likelihood", "gauss", "gaussian"),
        ("binarization", "stochastics", "stochastic"),
    ],
)
def test_nearest_legal_value_is_offered(field, word, near):
    (line,) = problems(replace(BASE, **{field: word}))
    assert line.endswith(f"; did you mean {near}?")


def test_what_is_inconsistent_is_told_beside_what_is_illegal():
    found = problems(replace(BASE, batch=0, objective="ciwae", latent_units=(1, 2), epochs="x", groups=3, k="2"))
    fields = ["epochs", "k", "batch", "latent_units", "beta", "groups"]
    assert [line.split(" = ")[0] for line in found] == fields


def test_all_wrong_values_are_reported_at_once():
    wrong = {field: values[0] for field, (_, values) in BAD.items()}
    assert [line.split(" = ")[0] for line in problems(Parameters(**wrong))] == [
        line.split(" = ")[0] for line in problems(replace(Parameters(**wrong), k=-7))
    ]
    assert len(problems(Parameters(**wrong))) == len(FIELDS)
    text = leaves(resolve, ["vae_l1_k1"], {"k": 0, "batch": "x", "split": "best"})
    assert [line.split(" = ")[0] for line in text.splitlines()] == [
        f"experiments.py: {field}" for field in ("k", "batch", "split")
    ]
    assert text.count("must be") == 3


def test_datasets_and_binarizations_are_those_of_the_table():
    (line,) = problems(replace(BASE, dataset="x"))
    assert line == f"dataset = 'x': must be one of {', '.join(DATASETS)}, or the path of a .npz file"
    assert {recipe.binarization for recipe in DATASETS.values()} <= set(BINARIZATIONS)


# The page that a user edits.


def field_comments():
    """{field: the comment on its line, or on the lines above} of the dataclass Parameters."""
    source = (ROOT / "experiments.py").read_text().split("class Parameters:")[1].split("\n\n\n")[0]
    comments, above = {}, ""
    for line in source.splitlines():
        code, _, comment = line.partition("  # ") if ":" in line.split("#")[0] else ("", "", line)
        above += comment.strip("# ") + " "
        if field := re.match(r"    (\w+): ", code):
            comments[field[1]], above = above.strip(), ""
    return comments


def test_every_field_has_a_comment():
    assert list(field_comments()) == FIELDS
    assert all(len(comment) > 5 for comment in field_comments().values())


@pytest.mark.parametrize(
    "field, legal",
    [
        ("dataset", DATASETS),
        ("binarization", BINARIZATIONS),
        ("objective", OBJECTIVES),
        ("likelihood", LIKELIHOODS),
        ("schedule", SCHEDULES),
        ("optimizer", OPTIMIZERS),
        ("split", SPLITS),
    ],
)
def test_the_comment_lists_the_legal_values(field, legal):
    assert all(re.search(rf"\b{value}\b", field_comments()[field]) for value in legal)


def test_parameters_are_frozen_and_legal():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PARAMETERS.k = 3
    for parameters in (BASE, PARAMETERS, *NAMED_RUNS.values()):
        assert problems(parameters) == []
    assert set(COMPARE) <= set(OBJECTIVES)


def test_first_run_is_the_comparison_of_the_issue():
    (vae, p), (iwae, q) = resolve([], {})
    assert (vae, iwae) == ("vae", "iwae")
    assert replace(p, objective="iwae") == q
    assert (p.dataset, p.k, p.latent_units, p.hidden_units) == ("mnist", 5, (50,), ((200, 200),))
    assert p.train and p.evaluate and p.plot and p.k_evaluation < 5000


# Named runs.

# Burda et al. 2016, Table 1, MNIST: (objective, layers, k) -> NLL, active units. Typed here a second time.
TABLE_1 = """
vae 1 1 86.76 19 | vae 1 5 86.47 20 | vae 1 50 86.35 20 | iwae 1 5 85.54 22 | iwae 1 50 84.78 25
vae 2 1 85.33 16+5 | vae 2 5 85.01 17+5 | vae 2 50 84.78 17+5 | iwae 2 5 83.89 21+5 | iwae 2 50 82.90 26+7
"""
CELLS = [cell.split() for line in TABLE_1.strip().splitlines() for cell in line.split(" | ")]
NETS = {"1": ((50,), ((200, 200),)), "2": ((100, 50), ((200, 200), (100, 100)))}


def test_ten_cells():
    assert len(CELLS) == 10
    assert set(PAPER) == {f"{objective}_l{layers}_k{k}" for objective, layers, k, *_ in CELLS}
    fast = {f"{name}_fast" for name in (*PAPER, "dreg_l1_k5", "dreg_l1_k50", "dreg_l2_k5", "dreg_l2_k50")}
    assert set(NAMED_RUNS) == {*PAPER, *POSTERIOR_2D, *fast, *(f"{name}_fast" for name in SWITCHED)}
    assert not set(ALIASES) & set(NAMED_RUNS) and not set(OBJECTIVES) & (set(NAMED_RUNS) | set(ALIASES))


def test_table_2():
    """Burda et al. 2016, Table 2, typed here a second time; each by the end of `fast`, from the run of that seed."""
    cells = {"vae": "vae_l1_k1", "iwae": "iwae_l1_k50"}
    assert SWITCHED["vae_to_iwae"][2:] == (84.88, "22") and SWITCHED["iwae_to_vae"][2:] == (86.02, "23")
    assert set(SWITCHED) == {f"{first}_to_{then}" for first in cells for then in cells}
    for name, (first, then, *_) in SWITCHED.items():
        assert [first, then] == [cells[word] for word in name.split("_to_")]
        run = NAMED_RUNS[f"{name}_fast"]
        assert replace(run, schedule="fast", init_from=None) == NAMED_RUNS[f"{then}_fast"]
        assert (run.schedule, run.init_from) == ("switch", f"{first}_fast")
        assert plan_epochs(run)[0].rate_from == 0.0092 and len(plan_epochs(run)) == 60
    assert [name for name, _ in resolve(["vae_to_iwae_fast"], {"seed": 1})] == ["vae_to_iwae_fast"]


def test_init_from_is_a_path_or_a_run_of_that_seed_in_the_results_or_released(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RELEASED", tmp_path / "pretrained")
    ours, folder = replace(BASE, init_from="a", seed=3), tmp_path / "results" / "mnist" / "b__seed3"
    assert runs.initial_folder(folder, ours) == folder.with_name("a__seed3")
    for place in (tmp_path / "pretrained" / "mnist" / "a__seed3", folder.with_name("a__seed3")):
        place.mkdir(parents=True)
        (place / "model.weights.h5").touch()
        assert runs.initial_folder(folder, ours) == place
    assert runs.initial_folder(folder, replace(ours, init_from=str(place))) == place
    assert runs.initial_folder(folder, replace(ours, seed=0)) == folder.with_name("a__seed0")
    assert runs.initial_folder(folder, replace(ours, init_from="~")) == Path.home()


@pytest.mark.parametrize("objective, layers, k, nll, active", CELLS)
def test_cell(objective, layers, k, nll, active):
    name = f"{objective}_l{layers}_k{k}"
    run = NAMED_RUNS[name]
    assert PAPER[name] == (float(nll), active)
    assert (run.latent_units, run.hidden_units) == NETS[layers]
    assert (run.objective, run.k, run.schedule, run.epochs, run.k_evaluation) == (
        objective,
        int(k),
        "paper",
        None,
        5000,
    )
    assert (run.dataset, run.batch, run.optimizer, run.likelihood) == ("mnist", 20, "adam", "bernoulli")
    assert (run.beta_1, run.beta_2, run.epsilon, run.ema, run.split) == (0.9, 0.999, 1e-4, 0.0, "test")
    assert resolve([name], {}) == [(name, run)]


@pytest.mark.parametrize("alias, name", [("iwae_l1_k1", "vae_l1_k1"), ("iwae_l2_k1", "vae_l2_k1")])
def test_at_one_sample_both_names_are_one_run(alias, name):
    assert resolve([alias], {}) == resolve([name], {}) == resolve([name, alias, name], {})
    assert resolve([alias], {"seed": 3, "epochs": 2}) == resolve([name], {"seed": 3, "epochs": 2})


@pytest.mark.parametrize(
    "name, run", [("iwae_l1_k50", "iwae_l1_k50_fast"), ("iwae_l1_k1", "vae_l1_k1_fast"), ("iwae_2d_k5", "iwae_2d_k5")]
)
def test_a_cell_of_the_paper_is_released_by_the_fast_schedule(name, run):
    ((found, parameters),) = resolve([name], {"pretrained": True, "seed": 1})
    assert found == run and parameters == replace(NAMED_RUNS[run], pretrained=True, seed=1)
    assert resolve(["vae_l1_k1"], {"pretrained": True, "epochs": 121})[0][0] == "vae_l1_k1__epochs121"


def test_doubles_run_once_and_order_is_kept():
    assert [name for name, _ in resolve(["iwae_l1_k5", "vae_l1_k5", "iwae_l1_k5"], {})] == ["iwae_l1_k5", "vae_l1_k5"]
    assert [name for name, _ in resolve(["iwae", "iwae"], {})] == ["iwae"]
    assert [name for name, _ in resolve(["iwae", "vae"], {"objective": "stl"})] == ["stl"]
    assert len({run_name(("run", BASE), replace(BASE, clip_norm=limit)) for limit in (1, 1.0)}) == 1
    assert [name for name, _ in resolve(["vae_l1_k5", "iwae_l1_k5"], {"objective": "dreg"})] == [
        "vae_l1_k5__objectivedreg"
    ]


def test_two_runs_of_one_name_are_refused(monkeypatch):
    """Their folders would differ by what is not in the name."""
    monkeypatch.setattr(experiments, "PARAMETERS", replace(PARAMETERS, k=8, schedule="hold", seed=3))
    line = leaves(resolve, ["iwae", "estimators"], {})
    assert "iwae__k8__schedulehold: asked for twice" in line and "\n" not in line


@pytest.mark.parametrize("field, value", [("latent_units", [50]), ("latent_units", {50}), ("schedule", ["quick"])])
def test_what_cannot_be_hashed_is_refused_as_any_other_value(field, value, monkeypatch):
    monkeypatch.setattr(experiments, "PARAMETERS", replace(PARAMETERS, **{field: value}))
    assert leaves(resolve, ["vae"], {}).startswith(f"experiments.py: {field} = {value!r}: must be ")


@pytest.mark.parametrize("compare", [(), None, "vae", [["vae"]], (3,)])
def test_compare_that_names_nothing_is_refused(compare, monkeypatch):
    monkeypatch.setattr(experiments, "COMPARE", compare)
    assert leaves(resolve, [], {}).startswith(f"experiments.py: COMPARE = {compare!r}: must be a tuple of ")
    assert resolve(["vae"], {})


def test_objective_of_parameters_that_compare_does_not_name_is_refused(monkeypatch):
    monkeypatch.setattr(experiments, "PARAMETERS", replace(PARAMETERS, objective="dreg"))
    assert (
        leaves(resolve, [], {}) == f"experiments.py: PARAMETERS has objective = 'dreg': enter it in COMPARE = {COMPARE}"
    )
    assert (
        [name for name, _ in resolve(["vae"], {})] == [name for name, _ in resolve([], {"objective": "vae"})] == ["vae"]
    )


def test_unknown_field_of_parameters_is_refused():
    line = leaves(lambda: experiments.Parameters(epoch=3))
    assert line.startswith("experiments.py: no field of Parameters is called 'epoch'; did you mean epochs?")
    assert "datasets_dir" in line and "\n" not in line


def test_of_several_runs_a_parameter_is_for_those_that_take_it():
    runs = dict(resolve(["vae", "ciwae", "miwae"], {"k": 4, "beta": 0.5, "groups": 2}))
    assert list(runs) == ["vae__k4", "ciwae__beta0.5__k4", "miwae__groups2__k4"]
    assert "does not take a value" in leaves(resolve, ["vae", "ciwae"], {"beta": 0.5, "groups": 1})
    assert "does not take a value" in leaves(resolve, ["vae"], {"beta": 0.5})


def test_a_binarization_that_is_the_data_sets_own_is_no_other_run():
    assert resolve(["vae"], {"binarization": "stochastic"}) == resolve(["vae"], {})
    assert dict(resolve(["vae"], {"binarization": "fixed"})).keys() == {"vae__binarizationfixed"}


def test_objective_alone_is_one_run():
    ((name, parameters),) = resolve([], {"objective": "dreg"})
    assert name == "dreg" and parameters == replace(PARAMETERS, objective="dreg")


def test_estimators_are_every_objective_under_one_budget():
    """`iwae` is the first, whence the others' difference; nothing but the objective and its own parameter differs."""
    runs = dict(resolve(["estimators"], {"epochs": 2}))
    names, values = list(runs), list(runs.values())
    assert names[0] == "iwae__k8__schedulehold__epochs2" and "ciwae__beta0.5__k8__schedulehold__epochs2" in names
    assert [run.objective for run in values[1:]] == [name for name in OBJECTIVES if name != "iwae"]
    own = dict.fromkeys(("objective", "beta", "groups", "alpha"))
    budget = {"k": 8, "schedule": "hold", "epochs": 2, "latent_units": (50,)}
    assert len({replace(run, **own) for run in values}) == 1
    assert {field: getattr(values[0], field) for field in budget} == budget


def test_two_latent_units_differ_in_objective_and_k_alone():
    """And each is the named run, in that run's folder, whether the group or its own name asks for it."""
    runs = dict(resolve(["posterior_2d"], {}))
    assert list(runs) == list(POSTERIOR_2D) and runs == dict(resolve(POSTERIOR_2D, {}))
    assert {name: (run.objective, run.k) for name, run in runs.items()} == {
        name: (name.split("_")[0], int(name.split("k")[1])) for name in POSTERIOR_2D
    }
    (same,) = {replace(run, objective="iwae", k=1) for run in runs.values()}
    assert (same.latent_units, same.hidden_units, same.epochs) == ((2,), ((200, 200),), 30)
    ((name, _),) = resolve(["iwae_2d_k30"], {"epochs": 16})
    assert name == "iwae_2d_k30__epochs16"


def test_snapshots_after_the_last_epoch_are_refused_with_those_that_can_be_had():
    line = leaves(resolve, ["iwae_2d_k30"], {"epochs": 3})
    assert line.endswith("snapshot_epochs = (1, 2, 4, 8, 16): the run has 3: try --snapshot_epochs 1,2")
    assert "the run has 16: try --snapshot_epochs ()" in leaves(resolve, ["iwae"], {"snapshot_epochs": (17,)})


def test_a_run_of_a_group_is_the_one_that_its_fields_ask_for():
    for name, run in resolve(["estimators"], {}):
        changes = {
            f.name: getattr(run, f.name) for f in fields(run) if getattr(run, f.name) != getattr(PARAMETERS, f.name)
        }
        assert resolve([run.objective], changes) == [(name, run)]


def test_a_group_is_overridden_like_a_run():
    assert {run.k for _, run in resolve(["estimators"], {"k": 4})} == {4}
    assert "groups = 2: must divide k = 5" in leaves(resolve, ["estimators"], {"k": 5})
    assert not {*GROUPS} & {*NAMED_RUNS, *ALIASES, *OBJECTIVES}


def test_runs_that_cannot_stand_in_one_table_are_refused_at_once():
    line = leaves(resolve, ["iwae", "iwae_l1_k5"], {})  # k_evaluation 500 and 5000
    assert "\n" not in line and "k_evaluation" in line and "500" in line and "5000" in line
    assert len(resolve(["iwae", "iwae_l1_k5"], {"k_evaluation": 500})) == 2


# Names of folders.


@pytest.mark.parametrize(
    "arguments, folder",
    [
        ("iwae_l1_k50", "iwae_l1_k50__seed0"),
        ("iwae_l1_k50 --epochs 3 --seed 2", "iwae_l1_k50__epochs3__seed2"),
        ("iwae_l1_k50 --seed 2 --epochs 3", "iwae_l1_k50__epochs3__seed2"),
        ("iwae_l1_k1 --epochs 3", "vae_l1_k1__epochs3__seed0"),
        ("iwae_l1_k50 --epochs 3 --results_dir elsewhere --k_evaluation 7", "iwae_l1_k50__epochs3__seed0"),
        ("vae_l1_k1 --latent_units 100,50 --hidden_units ((200,200),(100,))", None),
        ("iwae --objective iwae --k 5", "iwae__seed0"),
        ("iwae_l2_k5 --schedule quick --optimizer muon", "iwae_l2_k5__schedulequick__optimizermuon__seed0"),
        ("vae_l1_k5 --epsilon 1e-8 --ema 0.999", "vae_l1_k5__epsilon1e-08__ema0.999__seed0"),
    ],
)
def test_folder(arguments, folder, tmp_path):
    names, overrides, _ = parsed(*arguments.split())
    ((name, parameters),) = resolve(names, overrides)
    parameters = replace(parameters, results_dir=str(tmp_path))
    found = experiments.open_run(name, parameters, tiny_dataset()).folder
    folder = folder or "vae_l1_k1__latent_units100-50__hidden_units200-200_100__seed0"
    assert found == tmp_path / "tiny" / folder
    assert not (tmp_path / "tiny").exists()  # asking for a folder makes none


def tiny_dataset(name="tiny", n=40):
    images = np.zeros((n, 4), np.uint8)
    return Dataset(name, images, images, images, None, None, None, "stochastic", (2, 2))


# For every field: three values that a user might try one after the other.
TRIED = {
    "dataset": ("mnist_fixed", "omniglot", "a.npz"),
    "binarization": ("stochastic", "fixed", "none"),
    "objective": ("vae", "stl", "dreg"),
    "beta": (0, 0.5, 1),
    "groups": (1, 2, 12),
    "alpha": (0, 0.5, 0.25),
    "k": (1, 11, 111),
    "latent_units": ((1,), (11,), (1, 1)),
    "hidden_units": (((20, 10),), ((20,), (10,)), ((2010,),)),
    "likelihood": ("gaussian",),
    "schedule": ("paper", "hold"),
    "epochs": (1, 2, 12),
    "rate_scale": (0.5, 2, 1.5),
    "batch": (1, 2, 12),
    "optimizer": ("muon",),
    "beta_1": (0.0, 0.95, 0.99),
    "beta_2": (0.0, 0.95, 0.99),
    "epsilon": (1e-7, 1e-8, 0.1),
    "momentum": (0.0, 0.9, 0.99),
    "output_rate": (0.5, 2, 8.5),
    "ema": (0.9, 0.99, 0.999),
    "clip_norm": (1, 0.5, 12.0),
    "backward_samples": (1, 2, 3),
    "snapshot_epochs": ((1,), (2,), (1, 2)),
    "init_from": ("results/mnist/a", "b", "c"),
    "seed": (1, 2, 12),
    "k_evaluation": (1, 2, 12),
    "split": ("train", "validation"),
    "images": (2, 100),
    "units": ("active",),
    "pretrained": (True,),
    "train": (False,),
    "evaluate": (False,),
    "plot": (False,),
    "diagnose": (True,),
    "strategy": ("none", "mirrored", "multi_worker"),
    "results_dir": ("a", "b"),
    "datasets_dir": ("a", "b"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_what_changes_the_outcome_stands_in_the_name(field):
    names = [run_name(("run", BASE), replace(BASE, **{field: value})) for value in TRIED[field]]
    if field in NOT_IN_NAME:
        assert set(names) == {"run"}
    else:
        assert len({"run", *names}) == len(names) + 1
        assert all(name.startswith(f"run__{field}") and name.count("__") == 1 for name in names)
        assert all(re.fullmatch(r"[\w.-]+", name) for name in names)  # a file name on any system


def test_not_in_name_is_only_what_does_not_train():
    stated = {"k_evaluation", "split", "images", "units", "pretrained", "train", "evaluate", "plot", "diagnose"}
    stated |= {"strategy", "results_dir", "datasets_dir"}
    assert NOT_IN_NAME == stated | {"snapshot_epochs", "dataset", "seed"}  # the last two stand in the path


def test_names_of_all_single_and_double_changes_differ():
    training = [field for field in FIELDS if field not in NOT_IN_NAME]
    singles = [{field: value} for field in training for value in TRIED[field]]
    doubles = [a | b for i, a in enumerate(singles) for b in singles[:i] if set(a) != set(b)]
    changes = singles + doubles
    assert len({run_name(("run", BASE), replace(BASE, **change)) for change in changes}) == len(changes)


def test_an_edit_of_parameters_makes_a_new_folder(monkeypatch):
    monkeypatch.setattr(experiments, "PARAMETERS", replace(PARAMETERS, k=7, latent_units=(20,)))
    assert [name for name, _ in resolve([], {})] == ["vae__k7__latent_units20", "iwae__k7__latent_units20"]


# Data, refusals, silence.


@pytest.mark.parametrize(
    "names, field, split", [("iwae", "batch", "train"), ("iwae", "images", "test"), ("vae_l1_k1 vae_l1_k1_fast", 0, 0)]
)
def test_more_images_than_there_are_are_refused(monkeypatch, tmp_path, names, field, split):
    """Of every run of several: vae_l1_k1_fast has a batch of 400."""
    monkeypatch.setattr(runs, "load_dataset", lambda *_, **__: tiny_dataset(n=40))
    options = [f"--{field}", "41"] if field else []
    line = leaves(experiments.main, [*names.split(), *options, "--results_dir", str(tmp_path)])
    expected = f"{field} = 41: tiny has 40 {split} images" if field else "batch = 400: tiny has 40 train images"
    assert line == f"experiments.py: {expected}" and not any(tmp_path.iterdir())


def test_what_is_too_large_for_32_bits_is_refused_with_what_else_is_too_large(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "load_dataset", lambda *_, **__: tiny_dataset(n=40))
    options = ["--batch", "41", "--k", "2000000000", "--results_dir", str(tmp_path)]
    few, large = leaves(experiments.main, ["iwae", *options]).splitlines()
    assert few == "experiments.py: batch = 41: tiny has 40 train images"
    assert re.fullmatch(r".*: k = 2000000000, batch = 41, \d+ features of tiny: .* must stay below 2147483648", large)


def test_a_folder_that_changes_before_its_lock_is_checked_again(monkeypatch, tmp_path):
    """By another process, between the check and the lock: nothing is done in it then."""
    monkeypatch.setattr(runs, "load_dataset", lambda *_, **__: tiny_dataset(n=40))
    monkeypatch.setattr(experiments, "perform", lambda runs: pytest.fail("begun"))
    lock = experiments.lock

    def late(folder):
        folder.mkdir(parents=True)
        (folder / "parameters.json").write_text('{"k": 3}')
        return lock(folder)

    monkeypatch.setattr(experiments, "lock", late)
    assert "holds another run" in leaves(experiments.main, ["iwae", "--results_dir", str(tmp_path)])


def unreachable(name, datasets_dir=None, binarization=None):
    if name != "mnist_sample":
        raise Unavailable(f"{name} could not be had from any source:\n  https://a/*: gone\nWay out: put it there.")
    return tiny_dataset(name)


def test_unreachable_mnist_goes_on_with_the_sample_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(runs, "load_dataset", unreachable)
    assert load_data(BASE).name == "mnist_sample"
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("mnist could not be had", "https://a/*: gone", "Way out", "mnist_sample", "cannot be compared"):
        assert words in line


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name not in ("mnist", "mnist_sample")])
def test_other_unreachable_data_are_refused(dataset, monkeypatch):
    monkeypatch.setattr(runs, "load_dataset", unreachable)
    with pytest.raises(DatasetError, match=f"{dataset} could not be had"):
        load_data(replace(BASE, dataset=dataset))


@pytest.mark.parametrize("options", [{"datasets_dir": "~nobody_at_all/x"}, {"dataset": "~nobody_at_all/x.npz"}])
def test_the_home_of_nobody_is_refused(options):
    with pytest.raises(DatasetError, match="^~nobody_at_all/x.*npz: there is no such user$"):
        load_data(replace(BASE, **options))


def test_list_prints_the_table(capsys):
    experiments.main(["--list"])
    text = capsys.readouterr().out
    for objective, layers, k, nll, active in CELLS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{objective}_l{layers}_k{k} ")]
        assert line.split()[1:3] == [nll, active]
    for alias, name in ALIASES.items():
        assert re.search(rf"^{name} .*{alias}$", text, re.M)
    assert all(objective in text.splitlines()[-1] for objective in OBJECTIVES)
    for group in GROUPS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{group}: ")]
        assert all(name in line for name, _ in resolve([group], {}))


def test_list_has_the_runs_that_a_user_enters(capsys, monkeypatch):
    experiments.main(["--list"])
    assert "by you" not in capsys.readouterr().out
    monkeypatch.setitem(NAMED_RUNS, "mine", replace(PARAMETERS, k=7))
    experiments.main(["--list"])
    assert "Entered by you: mine\n" in capsys.readouterr().out


def test_quiet_start_drops_the_chatter_alone(capfd, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    with quiet_start():
        os.write(2, b"E0000 cuda_dnn.cc] Unable to register cuDNN factory\nI0000 oneDNN custom operations are on.\n")
        os.write(2, b"UserWarning: look here\n")
    os.write(2, b"oneDNN afterwards\n")
    assert capfd.readouterr().err == "UserWarning: look here\noneDNN afterwards\n"


def test_quiet_start_shows_what_was_said_before_an_error(capfd):
    with pytest.raises(ImportError), quiet_start():
        os.write(2, b"libx.so is missing\n")
        raise ImportError
    assert capfd.readouterr().err == "libx.so is missing\n"


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_refusals_come_before_tensorflow(tmp_path):
    """One process refuses a name, an option, values, a missing model and missing data, without TensorFlow."""
    tiny = tmp_path / "tiny.npz"
    images = np.tile(np.uint8([[0, 255, 9, 8]]), (30, 1))
    np.savez(tiny, x_train=images, x_validation=images, x_test=images)
    own = ["--dataset", str(tiny), "--results_dir", str(tmp_path)]
    refused = [
        ["iwea"],
        ["--epoch", "3"],
        ["--k", "0"],
        [*own, "--train", "false"],
        [*own, "--batch", "31"],
        [*own, "--images", "31"],
        ["--dataset", str(tmp_path / "none.npz")],
    ]
    code = f"""
import sys, experiments
from datasets_download import DatasetError
for arguments in {refused!r}:
    try:
        experiments.main(arguments)
    except (SystemExit, DatasetError) as error:
        print(str(error))
print(sorted({{"tensorflow", "keras", "tensorflow_probability", "matplotlib"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]" and len(lines) == len(refused)
    expected = ("'iwea'", "'--epoch'", "k = 0", "no trained model", "batch = 31", "images = 31", "none.npz")
    assert all(words in line for words, line in zip(expected, lines, strict=True))
    assert list(tmp_path.iterdir()) == [tiny]


def test_ctrl_c_while_the_program_is_imported_is_one_line(tmp_path):
    (tmp_path / "command_line.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    shutil.copy(ROOT / "experiments.py", tmp_path)
    done = subprocess.run([sys.executable, tmp_path / "experiments.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "experiments.py: stopped before anything was begun\n"


def test_refusal_of_the_program_itself():
    start = time.perf_counter()
    done = python("experiments.py", "iwae", "--dataset", "none.npz")
    assert time.perf_counter() - start < 5
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("experiments.py: none.npz: no such file")


def test_an_alias_is_refused_where_it_is_none():
    assert "iwae_l1_k1 is vae_l1_k1 at k = 1 alone" in leaves(resolve, ["iwae_l1_k1"], {"k": 5})
    assert resolve(["iwae_l1_k1"], {"k": 1}) == resolve(["vae_l1_k1"], {})


def test_a_broken_cache_is_not_taken_for_mnist_out_of_reach(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"half")
    with pytest.raises(DatasetError, match="mnist.npz is not an .npz file"):
        load_data(replace(BASE, datasets_dir=str(tmp_path)))
