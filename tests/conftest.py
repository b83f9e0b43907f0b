"""Settings every test shares."""

import os

import hypothesis

# Seeded and without a database: the same examples on every machine, no folder left behind.
hypothesis.settings.register_profile(
    "embedcam", database=None, deadline=None, derandomize=True, print_blob=False
)
hypothesis.settings.load_profile("embedcam")
# Pictures are drawn without a screen.
os.environ.setdefault("MPLBACKEND", "Agg")
