"""Copy finished runs to pretrained/, as --report reads them: python -m docs.release results/mnist/vae_l1_k1_fast__seed0

The README says how a run is evaluated in the three ways that this asks for.
"""

import json
import shutil
import sys
from pathlib import Path

import runs
from report import EVALUATIONS
from run_folder import whole_file, write_text


def release(folder):
    """Copy a run's weights, parameters, log and three evaluations; leaves where it is not trained or evaluated so."""
    if not (folder / "model.weights.h5").exists():
        sys.exit(f"docs.release: {folder} is not trained to its end: it has no model.weights.h5")
    for place, wanted in EVALUATIONS.items():
        found = runs.read_results(folder / place) if (folder / place / "results.json").exists() else {}
        if any(found.get(field) != value for field, value in wanted.items()):
            sys.exit(f"docs.release: {folder / place}: no evaluation there, or another than {wanted}")
    target = runs.RELEASED / folder.parent.name / folder.name
    files = [Path("model.weights.h5"), Path("log.jsonl")]
    files += [Path(place, name) for place in EVALUATIONS for name in ("log_likelihoods.npy", "results.json")]
    for file in files:
        with whole_file(target / file) as partial:
            shutil.copyfile(folder / file, partial)
    parameters = json.loads((folder / "parameters.json").read_text()) | {"results_dir": "results", "datasets_dir": None}
    write_text(target / "parameters.json", json.dumps(parameters, indent=2) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        release(Path(name))
