"""Weights and heads from files. No pickle is ever run: `.safetensors`, or `weights_only=True`."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..index.identity import NetworkWarning
from .layers import near_misses
from .module import message_of

# How training scripts wrap a state dict.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
# Names in the DenseNet files that torchvision itself distributes: norm.1 for norm1.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")
_FLOATS = {"F16", "BF16", "F32", "F64"}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file, wrappers taken off."""
    path = Path(path)
    _refuse_missing(path, "weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    # Whatever a damaged file makes its reader say.
    except Exception as error:
        raise NetworkError(
            f"weights {path} cannot be read ({_short(error)}); expected .safetensors, or a PyTorch "
            "checkpoint that loads with weights_only=True: save the network's state_dict() (of a "
            "Lightning checkpoint torch.save(checkpoint['state_dict'], FILE))"
        ) from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    what = "" if isinstance(content, Mapping) and content else f"a {type(content).__name__}"
    if not what and (other := [str(k) for k, one in content.items() if not torch.is_tensor(one)]):
        what = f"{len(other)} entries that are not tensors ({_some(other)})"
    if what:
        raise NetworkError(
            f"weights {path} hold {what}; expected a state dict of named tensors, perhaps under "
            "'state_dict' or 'model'"
        )
    # torch.compile writes its own prefix anywhere; those before all names are found in loading.
    state = {str(key).replace("_orig_mod.", ""): value for key, value in content.items()}
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], dropped: Sequence[str], source: str
) -> None:
    """Put a state dict into a module, all or nothing; names that begin with a `dropped` one go."""
    wanted = module.state_dict()
    state = _fitted_names(state, wanted, source)
    extra = [k for k in state if k not in wanted and not k.startswith(tuple(dropped))]
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unlike = [
        f"{k} {list(state[k].shape)} instead of {list(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    problems = {"missing": missing, "unexpected": extra, "of another shape": unlike}
    if any(problems.values()):
        hint = near_misses(extra[0], missing, 1) if extra and missing else ""
        if 2 * len(missing) > len(wanted):
            hint = "; these are another network's weights: give this one's, or name the other"
        said = [f"{len(k)} {what} ({_some(k)})" for what, k in problems.items() if k]
        raise NetworkError(f"{source} do not fit the network: {', '.join(said)}{hint}")
    fitting = {key: value.to(wanted[key].dtype) for key, value in state.items() if key in wanted}
    module.load_state_dict(fitting, strict=False)


def _fitted_names(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return a state without the one prefix behind which most of the module's names stand."""
    parts = [key.split(".") for key in state]
    prefixes = {".".join(p[:n]) + "." for p in parts for n in range(1, min(len(p), 5))}
    # Sorted, the shortest first: the same choice each time.
    best = max(
        ["", *sorted(prefixes, key=lambda prefix: (len(prefix), prefix))],
        key=lambda prefix: sum(f"{prefix}{key}" in state for key in wanted),
    )
    left = [key for key in state if not key.startswith(best)]
    if left:
        warnings.warn(
            f"{source}: {len(left)} entries beside {best!r} are left out ({_some(left)})",
            NetworkWarning,
            stacklevel=2,
        )
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


def read_affine(path: str | Path, width: int | None) -> nn.Linear:
    """Return an affine head `weight [D K']`, perhaps `bias [D]`; `width` is K', None if unknown."""
    path = Path(path)
    _refuse_missing(path, "head")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            kinds = {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
            _check_affine(path, kinds, width)
            tensors = {key: file.get_tensor(key).float() for key in kinds}
    except (SafetensorError, OSError) as error:
        raise NetworkError(
            f"head {path} cannot be read ({_short(error)}); expected a .safetensors file with "
            "weight [D K] and perhaps bias [D]"
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise NetworkError(f"head {path} holds NaN or infinity; save it again from training")
    width, depth = tensors["weight"].shape
    linear = nn.Linear(depth, width, "bias" in tensors, device="meta")
    linear.load_state_dict(tensors, assign=True)
    return linear


def _check_affine(path: Path, kinds: dict[str, tuple[list[int], str]], width: int | None) -> None:
    """Refuse wrong names, shapes and dtypes, before any number is read."""
    shape = kinds["weight"][0] if "weight" in kinds else []
    fits = len(shape) == 2 and 0 not in shape and shape[1] == (width or shape[1])
    if (
        not fits
        or set(kinds) - {"weight", "bias"}
        or kinds.get("bias", (shape[:1], ""))[0] != shape[:1]
        or not _FLOATS.issuperset(dtype for _, dtype in kinds.values())
    ):
        held = ", ".join(f"{key} {sides} of {dtype}" for key, (sides, dtype) in kinds.items())
        raise NetworkError(
            f"head {path} holds {held or 'nothing'}; expected weight [D {width or 'K'}] and "
            "perhaps bias [D] in floating point, K the length of the network's embedding"
        )


def _refuse_missing(path: Path, what: str) -> None:
    if not path.is_file():
        raise NetworkError(f"{what} {path} is not a file; give the path of an existing one")


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {message_of(error)}".rstrip(": ")
