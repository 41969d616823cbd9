"""What holds for all tests: nothing of the developer's own machine, no deadline for a first compiling call, turns."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("compiled", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("compiled")

# A shell starts what it runs in the background with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Kernel tests count the huge pages of the whole machine, and numpy asks for some for large arrays, of which other test
# processes have many. It reads this when it is first imported.
os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"

# Here `overcommit lab calibrate` installs price sets: the developer's own would change what a scenario costs.
_NO_SETTINGS = TemporaryDirectory(prefix="overcommit-tests-")
os.environ["XDG_CONFIG_HOME"] = _NO_SETTINGS.name


@contextmanager
def _turn(*, alone: bool) -> Generator[None, None, None]:
    """Wait until nobody else tests, or until nobody does alone.

    The door is held meanwhile, so that tests which can be side by side do not keep one out for ever that cannot.
    """
    folder = Path(gettempdir())
    name = f"overcommit-tests-{os.getuid()}"
    with (folder / f"{name}.door").open("w") as door, (folder / f"{name}.room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # closing is not enough while a child process has it open


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Lets several processes test (`pytest -n 2`), and those tests that run the kernel live have the machine alone."""
    with _turn(alone=item.get_closest_marker("kernel") is not None):
        return (yield)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "overcommit-test", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
