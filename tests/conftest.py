"""What holds for all tests: nothing of the developer's own machine, and no deadline for a first compiling call."""

import os
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings

settings.register_profile("compiled", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("compiled")

# Here `overcommit lab calibrate` installs price sets: the developer's own would change what a scenario costs.
_NO_SETTINGS = TemporaryDirectory(prefix="overcommit-tests-")
os.environ["XDG_CONFIG_HOME"] = _NO_SETTINGS.name
