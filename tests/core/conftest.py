"""Hypothesis draws the same examples on every run, and no example fails for being slow."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "cograd",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("cograd")
