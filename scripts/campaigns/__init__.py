"""What a stranger may hand over as an index, and what a killed job leaves."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # children are forked, and threads are not
