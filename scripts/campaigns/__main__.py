"""Campaigns: killed jobs, hostile indexes, older checkouts, and faults in the core.

    python -m scripts.campaigns kills      SIGKILL at random moments; run again, the same bytes
    python -m scripts.campaigns mutants    random damage to the files of an index
    python -m scripts.campaigns manifests  hostile values in the place of every key
    python -m scripts.campaigns builds OLD bytes of small builds, against an older checkout
    python -m scripts.campaigns faults     faults planted in the core, which tests should catch

Each names its options with --help, and exits with 1 where anything did not hold.
"""

import sys

from . import compare_builds, faults, hostile, kills

CAMPAIGNS = {
    "kills": kills.main,
    "mutants": hostile.mutants,
    "manifests": hostile.manifests,
    "builds": compare_builds.main,
    "faults": faults.main,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CAMPAIGNS:
        sys.exit(__doc__)
    sys.exit(CAMPAIGNS[sys.argv.pop(1)]())
