"""Copy finished runs to pretrained/, as --report reads them: python -m docs.release results/mnist/vae_l1_k1_fast__seed0

The README says how a run is evaluated: on the test images, at least.
"""

import json
import shutil
import sys
from pathlib import Path

import runs
from experiments import NAMED_RUNS
from report import EVALUATIONS
from run_folder import whole_file, write_text


def release(folder):
    """Copy a run's weights, parameters, log and evaluations; leaves where it is not trained, or evaluated otherwise."""
    for name in ("model.weights.h5", "results.json"):
        if not (folder / name).exists():
            sys.exit(f"docs.release: {folder} is not trained to its end and evaluated: it has no {name}")
    name = folder.name.partition("__")[0]
    if name not in NAMED_RUNS:
        sys.exit(f"docs.release: {folder}: enter {name} in NAMED_RUNS of experiments.py")
    places = [place for place in EVALUATIONS if (folder / place / "results.json").exists()]
    for place in places:
        found, asked = runs.read_results(folder / place), EVALUATIONS[place]
        asked = asked | {"k_evaluation": NAMED_RUNS[name].k_evaluation}
        if any(found[field] != value for field, value in asked.items()):
            way_out = "delete its results.json and log_likelihoods.npy, and evaluate again"
            sys.exit(f"docs.release: {folder / place}: another evaluation than {asked}; way out: {way_out}")
    target = runs.RELEASED / folder.parent.name / folder.name
    files = [Path("model.weights.h5"), Path("log.jsonl")]
    files += [path.relative_to(folder) for path in (folder / "snapshots").glob("epoch*.weights.h5")]
    files += [Path(place, name) for place in places for name in ("log_likelihoods.npy", "results.json")]
    for place in {"snapshots", *EVALUATIONS} - {"", *places}:  # of other weights
        shutil.rmtree(target / place, ignore_errors=True)
    for file in files:
        with whole_file(target / file) as partial:
            shutil.copyfile(folder / file, partial)
    parameters = json.loads((folder / "parameters.json").read_text()) | {"results_dir": "results", "datasets_dir": None}
    write_text(target / "parameters.json", json.dumps(parameters, indent=2) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        release(Path(name))
