"""What a stranger may hand over as an index, and what embedcam makes of it.

kinds.py     a tiny index of every kind
trial.py     an index opened, verified, searched and explained in a child of its own, with limits
values.py    hostile values in the place of every key of a manifest
damage.py    random damage to the files of an index
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # children are forked, and threads are not
