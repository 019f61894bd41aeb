"""Shared by the tests: TensorFlow kept quiet, and a net small enough to compile in a second."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest


@pytest.fixture(scope="session")
def x_small():
    """60 binary images [60, 12] of two kinds with noise: something to learn, in no time."""
    rng = np.random.default_rng(0)
    kinds = rng.random((2, 12)) < 0.5
    return np.float32(kinds[rng.integers(2, size=60)] ^ (rng.random((60, 12)) < 0.1))


@pytest.fixture
def small_net(x_small):
    """A function of the number of stochastic layers: an Autoencoder of 12 features, the same at each call."""
    from models import Autoencoder

    def build(layers=1, likelihood="bernoulli", seed=0):
        return Autoencoder(x_small.mean(axis=0), (4, 3, 2)[:layers], ((8, 8), (6,), (5,))[:layers], likelihood, seed)

    return build


@pytest.fixture
def uncompiled():
    """A tenth of the time, for what does not depend on the compiler."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def small_posteriors(monkeypatch):
    """Samples and grids of the figures of posteriors as small as they go."""
    import posterior

    sizes = {"POOL": 200, "SIDE": 11, "WIDE_SIDE": 21, "CANDIDATES": 20, "BOUND_IMAGES": 20, "BOUND_KS": (1, 50)}
    for name, value in sizes.items():
        monkeypatch.setattr(posterior, name, value)
