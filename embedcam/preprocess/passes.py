"""How many pictures go through a network at once, and in which memory format: a table.

It is looked up and never tried out: a trial would make two runs of the same build differ.
"""

CPU_BATCH = 8
"""By torch, so that results between layers fit the caches."""
ONNX_BATCH = 32
"""By ONNX Runtime, which plans its memory for a whole run."""
ACCELERATOR_BATCH = 64


def usual_passes(
    runtime: str, device: str, *, convolutional: bool = False, half: bool = False
) -> tuple[int, bool]:
    """Return images a forward pass, and whether their channels come last in memory.

    `runtime` is "torch" or "onnx", `device` the kind of torch device; of torch's networks it
    matters whether they are `convolutional`, and on accelerators whether they compute in `half`
    precision.
    """
    if runtime == "onnx":
        return ONNX_BATCH, False
    if device == "cpu":
        return CPU_BATCH, convolutional
    # Tensor cores take the channels last of half precision alone.
    return ACCELERATOR_BATCH, convolutional and half
