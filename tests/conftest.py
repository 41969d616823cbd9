"""Settings of the property tests: no deadline, because the first call of a compiled loop compiles it."""

from hypothesis import HealthCheck, settings

settings.register_profile("compiled", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("compiled")
