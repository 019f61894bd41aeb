"""Copy finished runs to pretrained/, as --report reads them: python -m docs.release results/mnist/vae_l1_k1_fast__seed0

The README says how a run is evaluated: on the test images, at least.
"""

import filecmp
import json
import re
import shutil
import sys
from pathlib import Path

import runs
from experiments import NAMED_RUNS
from report import EVALUATIONS
from run_folder import read_log, reading_file, weights_digest, whole_file, write_text


def check(folder):
    """The contents of a run's parameters.json, and where in its folder evaluations lie; leaves where one is wrong.

    Raises OSError where a file is damaged.
    """
    for name in ("model.weights.h5", "parameters.json", "log.jsonl", "results.json"):
        if not (folder / name).exists():
            sys.exit(f"docs.release: {folder} is not trained to its end and evaluated: it has no {name}")
    name = folder.name.partition("__")[0]
    if name not in NAMED_RUNS:
        sys.exit(f"docs.release: {folder}: enter {name} in NAMED_RUNS of experiments.py")
    with reading_file(folder / "parameters.json", "train again"):
        parameters = json.loads((folder / "parameters.json").read_text())
        trained = {field: parameters[field] for field in ("objective", "k", "seed")}
    named = {"objective": NAMED_RUNS[name].objective, "k": NAMED_RUNS[name].k, "seed": trained["seed"]}
    if trained != named or not re.fullmatch(rf"{name}(__epochs\d+)?__seed{trained['seed']}", folder.name):
        sys.exit(
            f"docs.release: {folder}: by its name another run than {trained}, or one with other fields than epochs"
        )
    read_log(folder, runs.read_results(folder)["epochs"])
    places = [place for place in EVALUATIONS if (folder / place / "results.json").exists()]
    for place in places:
        found = runs.read_results(folder / place)
        asked = EVALUATIONS[place] | trained | {"k_evaluation": NAMED_RUNS[name].k_evaluation}
        asked["weights"] = weights_digest(folder) if "weights" in found else None  # which older ones do not name
        if any(found.get(field) != value for field, value in asked.items()):
            way_out = "delete its results.json and log_likelihoods.npy, and evaluate again"
            sys.exit(f"docs.release: {folder / place}: another evaluation than {asked}; way out: {way_out}")
    return parameters, places


def release(folder):
    """Copy a run's weights, parameters, log and evaluations. Of the same weights what was released before stays."""
    parameters, places = check(folder)
    target = runs.RELEASED / folder.parent.name / folder.name
    files = [Path("log.jsonl")]
    files += [path.relative_to(folder) for path in (folder / "snapshots").glob("epoch*.weights.h5")]
    files += [Path(place, name) for place in places for name in ("log_likelihoods.npy", "results.json")]
    weights = [place / "model.weights.h5" for place in (folder, target)]
    if weights[1].exists() and not filecmp.cmp(*weights, shallow=False):  # all else there is of those
        shutil.rmtree(target)
    parameters |= {"results_dir": "results", "datasets_dir": None}
    write_text(target / "parameters.json", json.dumps(parameters, indent=2) + "\n")
    for file in (*files, "model.weights.h5"):  # the weights last: without them there is no run
        with whole_file(target / file) as partial:
            shutil.copyfile(folder / file, partial)


if __name__ == "__main__":
    try:
        for name in sys.argv[1:] or sys.exit(__doc__):
            release(Path(name).resolve())
    except OSError as error:
        sys.exit(f"docs.release: {error}")
