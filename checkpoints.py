"""The states of a training on disk, by tf.train.Checkpoint: whole, verified, the last two."""

import contextlib
import os
import sys
import time

import tensorflow as tf

from run_folder import reading, remove, unwritable, whole_file

GENERATIONS = 2  # checkpoints that are kept: where the newest is damaged there is one before


@contextlib.contextmanager
def tensorflow_writes(path):
    """While open, TensorFlow's own errors become the one of `path` that cannot be written."""
    try:
        yield
    except tf.errors.OpError as error:  # "{{node}} partial path; File too large [Op:SaveV2]", and maybe more lines
        reason = error.message.partition("\n")[0].rpartition("; ")[2].partition(" [Op:")[0]
        raise unwritable(path, reason) from error


def is_whole(path):
    """Whether all of a state is sound, by the checksums in it. Raises OSError where it cannot be read at all."""
    with reading(f"{path} cannot be read, and stands. Way out: mend that, and the same command goes on"):
        for file in path.iterdir():  # what TensorFlow finds is of the contents then, no fault of the moment
            file.read_bytes()
    try:
        reader = tf.train.load_checkpoint(str(path / "state"))
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except (tf.errors.OpError, IndexError):  # IndexError: the data file is too short
        return False
    return True


class Checkpoints:
    """The last states of a training, by tf.train.Checkpoint, each in a folder that is there whole or not at all."""

    def __init__(self, folder, **state):
        self.folder, self.saved, self.checkpoint = folder, time.monotonic(), tf.train.Checkpoint(**state)

    def generations(self):
        """Oldest first: names sort by progress."""
        names = os.listdir(self.folder) if self.folder.exists() else []  # raises where there is no right to
        return sorted(self.folder / name for name in names if name[0].isdecimal())

    def save(self, name):
        """Keep the state, and the one before it. name: sorts after those saved before."""
        path = self.folder / name
        with tensorflow_writes(path), whole_file(path) as partial:
            self.checkpoint.write(partial / "state")
        for old in self.generations()[:-GENERATIONS]:
            remove(old)
        self.saved = time.monotonic()

    def restore(self):
        """Take the newest undamaged state, if there is one; damaged ones are told, and put out of the way.

        Raises OSError for a state of other variables than these, and where there is no right to read one.
        """
        damaged = []
        while (left := self.generations()) and not is_whole(left[-1]):  # before any variable is changed
            aside = left[-1].with_name(f"damaged.{left[-1].name}")
            remove(aside)
            damaged.append(left[-1].rename(aside))
        if damaged:
            onward = "going on from the state before" if left else "no other is left: starting from the beginning"
            print(f"{', '.join(map(str, damaged))}: damaged; {onward}", file=sys.stderr)
        if not left:
            return
        try:
            self.checkpoint.read(left[-1] / "state").assert_consumed()
        except (AssertionError, ValueError, tf.errors.OpError) as error:  # missing, or of another shape or type
            tf.get_logger().setLevel("ERROR")  # it would name each variable, twice
            way_out = "go on with that, or delete the folder"
            raise OSError(f"{self.folder}: of another version of this program; {way_out}") from error
