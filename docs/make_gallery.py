"""Draw the README's gallery again from the weights in pretrained/: python -m docs.make_gallery [--datasets_dir DIR]."""

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from experiments import main

ROOT = Path(__file__).parents[1]
RUN = "iwae_2d_k5__seed0"
FIGURES = {
    "comparison": ("posterior_side_by_side", "aggregate_over_training", "bound_against_k"),
    f"{RUN}/figures": ("posterior_of_one_input", "manifold", "interpolation", "log_likelihoods"),
}
ANIMATIONS = ("posterior_in_training", "prior_samples_in_training")


def make_gallery(options):
    """Draw the runs of pretrained/ in a temporary folder, and keep the figures of the README, in 256 colours."""
    gallery = ROOT / "docs" / "gallery"
    with tempfile.TemporaryDirectory() as place:
        main(["posterior_2d", "--pretrained", "--evaluate", "false", "--results_dir", place, *options])
        for folder, names in FIGURES.items():
            for name in names:
                image = Image.open(Path(place, "mnist", folder, f"{name}.png")).convert("RGB")
                image.quantize(method=Image.Quantize.FASTOCTREE).save(gallery / f"{name}.png", optimize=True)
        for name in ANIMATIONS:
            shutil.copy(Path(place, "mnist", RUN, "figures", f"{name}.gif"), gallery)


if __name__ == "__main__":
    make_gallery(sys.argv[1:])
