"""The method zoo: every class activation method, on embedding networks, with a target.

Each is a function `method(subject, **options) -> MethodOutput` that declares its options.
"""

from .direct import (
    DirectWeights,
    MethodMap,
    MethodWarning,
    cam_for,
    run_method,
)
from .subject import MethodOutput, Passes, Subject, inputs_a_pass

__all__ = [
    "DirectWeights",
    "MethodMap",
    "MethodOutput",
    "MethodWarning",
    "Passes",
    "Subject",
    "cam_for",
    "inputs_a_pass",
    "run_method",
]
