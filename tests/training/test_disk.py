"""Disks that are full or not to be written to: one clear error, nothing damaged.

Full is a file system of 16 MB where one may be mounted, and everywhere a limit to the
size of files; read-only is a mount, and everywhere a folder's mode.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from privileges import as_file_modes_say
from tiny_runs import assert_same_run

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.run_folder import disk_errors

pytestmark = [
    pytest.mark.usefixtures("orbax_fails"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIONS = {
    "training": {"steps": 4, "group_size": 2, "checkpoint_every": 2},
    "evaluation": {},
}


class Limited:
    """A folder; when it is full no file of this process grows beyond 1 KB."""

    full, locked = "File too large", "Permission denied"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, self._before[1]))

    def clear(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)

    def close(self) -> None:
        self.clear()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self.path.chmod(0o555)
        with as_file_modes_say():
            yield
        self.path.chmod(0o755)


class Mounted:
    """A file system of its own."""

    full, locked = "No space left on device", "Read-only"

    def __init__(self, path: Path) -> None:
        self.path = path
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(path)]
        subprocess.run(mount, check=True, capture_output=True)

    def fill(self) -> None:
        with open(self.path / "ballast", "wb") as file, pytest.raises(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))

    def clear(self) -> None:
        (self.path / "ballast").unlink()

    def close(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)
        yield


def kinds() -> list[type]:
    """Those that this user may have."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            Mounted(Path(folder)).close()
    except (OSError, subprocess.CalledProcessError):
        return [Limited]
    return [Limited, Mounted]


@pytest.fixture(params=kinds())
def small_disk(request, tmp_path):
    """A folder that can be filled up, cleared and made read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    disk = request.param(path)
    yield disk
    disk.close()


def filling(disk, step):
    """A display that fills the disk when it has shown a step."""

    class Filling(Progress):
        def __init__(self, *arguments):
            super().__init__(*arguments, stream=io.StringIO())

        def update(self, shown, row):
            super().update(shown, row)
            if shown == step:
                while shown == 3 and not (disk.path / "run/checkpoints/2").exists():
                    time.sleep(0.01)
                disk.fill()

    return Filling


# At 2 the checkpoint has no room, at 3 the completions of step 4.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step, saved", [(2, None), (3, 2)])
def test_a_full_disk_is_one_error_and_the_run_goes_on_with_room(
    tiny_config, tmp_path, small_disk, step, saved
):
    folder = small_disk.path / "run"
    whole = tiny_config(run={"dir": str(tmp_path / "whole")}, **OPTIONS)
    cut = tiny_config(run={"dir": str(folder)}, **OPTIONS)
    training.run(whole)
    with pytest.raises(InputError, match=f"{small_disk.full}.*to resume") as error:
        training.run(cut, progress=filling(small_disk, step))
    small_disk.clear()
    assert f"run.dir='{folder}'" in str(error.value)
    done = [row["step"] for row in read_metrics(folder)]
    assert done == [*range(len(done))] and len(done) > step
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.latest() == saved
    checkpoints.close()

    training.run(cut)
    assert_same_run(folder, tmp_path / "whole")


def test_a_read_only_folder_is_one_error(tiny_config, small_disk):
    config = tiny_config(run={"dir": str(small_disk.path / "run")})
    with (
        small_disk.read_only(),
        pytest.raises(InputError, match=f"cannot be written: .*{small_disk.locked}"),
    ):
        training.run(config)


def test_a_folder_that_becomes_read_only_is_one_error(tiny_config, tmp_path):
    config = tiny_config(**OPTIONS)
    completions = Path(config.run.dir) / "completions"

    class Locking(Progress):
        def update(self, step, row):
            super().update(step, row)
            if step == 1:
                completions.chmod(0o555)

    with (
        as_file_modes_say(),
        pytest.raises(InputError, match="completions.*Permission denied.*to resume"),
    ):
        training.run(config, progress=Locking)
    completions.chmod(0o755)
    assert training.run(config).last_row["step"] == 4


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
