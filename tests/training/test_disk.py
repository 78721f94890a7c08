"""Disks that are full or not to be written to: one clear error, nothing damaged."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest
from tiny_runs import assert_same_run

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.run_folder import disk_errors

OPTIONS = {
    "training": {"steps": 4, "group_size": 2, "checkpoint_every": 2},
    "evaluation": {},
}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB, as far as this user may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system may be mounted: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def filling(disk, step):
    """A display that fills the disk when it has shown a step."""

    class Filling(Progress):
        def update(self, shown, row):
            super().update(shown, row)
            if shown == step:
                while shown == 3 and not (disk / "run/checkpoints/2").exists():
                    time.sleep(0.01)
                with open(disk / "ballast", "wb") as file, pytest.raises(OSError):
                    while True:
                        os.write(file.fileno(), bytes(4096))

    return Filling


# At 2 the checkpoint has no room, at 3 the completions of step 4.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step, saved", [(2, None), (3, 2)])
def test_a_full_disk_is_one_error_and_the_run_goes_on_with_room(
    tiny_config, tmp_path, small_disk, step, saved
):
    whole = tiny_config(run={"dir": str(tmp_path / "whole")}, **OPTIONS)
    cut = tiny_config(run={"dir": str(small_disk / "run")}, **OPTIONS)
    training.run(whole)
    with pytest.raises(InputError, match="No space left on device.*to resume") as error:
        training.run(cut, progress=filling(small_disk, step))
    assert f"run.dir='{small_disk / 'run'}'" in str(error.value)
    done = [row["step"] for row in read_metrics(small_disk / "run")]
    assert done == [*range(len(done))] and len(done) > step
    checkpoints = Checkpoints(small_disk / "run", read_only=True)
    assert checkpoints.latest() == saved
    checkpoints.close()

    (small_disk / "ballast").unlink()
    training.run(cut)
    assert_same_run(small_disk / "run", tmp_path / "whole")


def test_a_read_only_folder_is_one_error(tiny_config, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    config = tiny_config(run={"dir": str(small_disk / "run")})
    with pytest.raises(InputError, match="cannot be written: .*Read-only"):
        training.run(config)


def test_words_of_the_disk_are_found_below_other_errors():
    full = os.strerror(errno.ENOSPC)
    with pytest.raises(InputError, match="runs/a.*No space left"):
        with disk_errors(Path("runs/a")):
            try:
                raise ValueError(f"RESOURCE_EXHAUSTED: write failed [{full}]")
            except ValueError as error:
                raise RuntimeError("saving failed") from error
    with pytest.raises(ValueError, match="something else"):
        with disk_errors(Path("runs/a")):
            raise ValueError("something else")
