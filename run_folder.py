"""A run's folder: each file is there whole or not at all, one process at a time."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

SECONDS_BETWEEN_CHECKPOINTS = 30
STOPS = (signal.SIGINT, signal.SIGTERM)
LOGGED = ("bound_train", "bound_validation", "seconds")  # what is read of a record of log.jsonl


def unwritable(path, reason):
    """The error of a file that cannot be written: what, where, the way out."""
    way_out = "make room or give the right to write, and the same command goes on, or name another folder"
    return OSError(f"cannot write {path}: {reason}; what was there before stands. Way out: {way_out}")


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path):
    """Have what is written to a file or a folder on the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def whole_file(path):
    """A path to write a file or a folder to, renamed to `path` when the block ends well: there whole or not at all.

    Raises OSError where it cannot be written; the file before it then stands.
    """
    partial = path.with_name(f"partial.{os.getpid()}.{path.name}")  # the ending stays: Keras and numpy go by it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for part in (partial, *partial.rglob("*")):
            sync(part)  # before the name: a power cut leaves the old file or the new one
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        quoted = re.search(r"errno = (\d+)", str(error))  # h5py raises either, and quotes the system in several lines
        if isinstance(error, RuntimeError) and not quoted:
            raise
        reason = os.strerror(int(quoted[1])) if quoted else error.strerror or str(error).partition("\n")[0]
        raise unwritable(path, reason) from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written nothing can be deleted either
            remove(partial)


def write_text(path, text):
    """Write a text file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def reading(message, error=OSError):
    """Whatever a reader of files stumbles over becomes one line: json, zip, npy, mat and h5 have no list of it."""
    try:
        yield
    except PermissionError as reason:
        what = reason.filename or textwrap.shorten(str(reason), 200)  # h5py names the file in its text alone
        raise error(f"no right to read {what}; way out: give it, and the same command goes on") from reason
    except Exception as reason:
        raise error(f"{message} ({type(reason).__name__}: {textwrap.shorten(str(reason), 200)})") from reason


def reading_file(path, way_out):
    """`reading` of a file of a run's folder: where it is, and what to do about it."""
    return reading(f"{path} is damaged or missing; what else is there stands. Way out: {way_out}")


def weights_digest(folder):
    """The digest of its weights that the model.weights.h5 of a folder holds; None, if it holds none."""
    import h5py

    with reading_file(folder / "model.weights.h5", "train again"), h5py.File(folder / "model.weights.h5") as file:
        return file.attrs.get("digest")


def read_log(folder, epochs):
    """The records of the log.jsonl of a training that has ended, a dict for each of its epochs.

    Raises OSError where they are not there, or not whole.
    """
    path = Path(folder) / "log.jsonl"
    way_out = "delete model.weights.h5, and the same command makes both of the last checkpoint"
    if not path.with_name("checkpoints").exists():  # it came from pretrained/
        way_out = f"delete {folder}, and take it by --pretrained, or train it, again"
    with reading_file(path, way_out):
        log = [json.loads(line) for line in path.read_text().splitlines()]
        found = [record["epoch"] for record in log if all(isinstance(record[field], int | float) for field in LOGGED)]
        if found != list(range(1, epochs + 1)):
            raise ValueError(f"it has epochs {found}, of {epochs}")
    return log


def check_parameters(folder, ours, ignored):
    """Leave with a table of the differences where a folder's parameters.json does not fit the run.

    ours: what this run would write there; ignored: fields that may differ. An absent field is as good as None.
    Raises OSError where it cannot be read.
    """
    way_out = "delete that folder, or choose another place with --results_dir"
    with reading_file(folder / "parameters.json", way_out):
        theirs = dict(json.loads((folder / "parameters.json").read_text()))
    fields = [field for field in ours | theirs if field not in ignored and ours.get(field) != theirs.get(field)]
    if fields:
        rows = [("field", "there", "here"), *((f, repr(theirs.get(f)), repr(ours.get(f))) for f in fields)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["   ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        sys.exit("\n  ".join([f"experiments.py: {folder} holds another run:", *lines]) + f"\nWay out: {way_out}")


@contextlib.contextmanager
def lock(folder, inside=("**",), wait=False):
    """Hold a folder, made if need be, and clear what a killed process left half-written; leaves where it is held.

    The kernel gives the lock back when a process ends, however it ends. inside: where to clear, as patterns of folders;
    wait: for the process that holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise unwritable(folder, error.strerror) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # a file system without locks
                raise unwritable(folder, f"no lock can be had there, {error.strerror}") from error
            at_work = f"another process is at work in {folder}"
            if not wait:
                sys.exit(f"experiments.py: {at_work}: wait for its end, or stop it")
            print(f"{at_work}: waiting for its end", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        left = [path for place in inside for path in folder.glob(f"{place}/partial.[0-9]*.*")]
        for partial in left:  # a list: none is removed while it is walked through
            remove(partial)
        yield


@contextlib.contextmanager
def signals_go_to(handler):
    """While open, the signals of STOPS are handled so."""
    before = {number: signal.signal(number, handler) for number in STOPS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def stop_asked():
    """While open, Ctrl-C and SIGTERM only add to the list that this gives; a second one stops at once."""
    asked, before = [], {number: signal.getsignal(number) for number in STOPS}

    def ask(number, _):
        asked.append(number)
        signal.signal(number, before[number])

    with signals_go_to(ask):
        yield asked


def digest(*parts):
    """16 hexadecimal digits of the SHA-256 of arrays or bytes."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


def due(saved):
    """Whether what was saved at that time.monotonic() is old enough to be saved again."""
    return time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
