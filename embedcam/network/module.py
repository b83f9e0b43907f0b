"""The user's module: what is accepted, where it is and in which mode, its hash, its failures."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import EmbedcamError, InputError, NetworkError, ran_out, text_of

# Layers that treat a batch differently in training mode: their numbers would mix images.
_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_LONGEST_MESSAGE = 300
_ADVICE = {
    "missing 1 required": "embedcam calls it with images alone: give one that takes nothing else",
    "Expected more than 1 value per channel": "it norms by the statistics of the batch, also in "
    "eval mode, so that one picture cannot be embedded alone: use a norm with running statistics",
    "Inference tensors cannot be": "it keeps a tensor made inside torch.inference_mode: make the "
    "network anew, and run it under torch.no_grad instead",
}

# What is accepted


def refuse_module(module: object) -> None:
    """Refuse a module that hooks do not reach into, or that takes something else than images."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise InputError(
            f"expected a torch.nn.Module, given {_kind(module)}; for two functions use "
            "EmbeddingNetwork.from_parts(trunk, head)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise NetworkError(
            f"the network is a TorchScript module ({kind}), whose layers cannot be watched; give "
            "the one it was made from, or its halves as EmbeddingNetwork.from_parts(trunk, head)"
        )
    if any(base.__name__ == "SentenceTransformer" for base in type(module).__mro__):
        raise NetworkError(
            "a SentenceTransformer takes a dict of features, not images; give the vision model in "
            "it, such as model[0].model.vision_model, with its layer and preprocess="
        )
    main = getattr(module, "main_input_name", "pixel_values")
    if main != "pixel_values":
        raise NetworkError(
            f"{kind} takes {main!r} first, not images; give its vision part, such as "
            "CLIPVisionModelWithProjection or model.vision_model"
        )
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # builtins tell nothing; the first run will
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    others = [
        one.name
        for place, one in enumerate(parameters)
        if one.default is one.empty
        and one.kind not in variable
        and (place > 0 or one.kind is one.KEYWORD_ONLY)
    ]
    if others:
        raise NetworkError(
            f"the forward of {kind} also asks for {', '.join(others)}, and embedcam calls it with "
            "images alone; give a module whose forward takes nothing else, such as one around it"
        )


def refuse_parts(
    trunk: Callable[..., Any] | None, head: Callable[..., Any] | None, whole: bool
) -> None:
    """Refuse what cannot be called, and a trunk alone; of a whole module both may be missing."""
    for part, role in ((trunk, "trunk"), (head, "head")):
        if (part is not None or not whole) and (not callable(part) or isinstance(part, type)):
            raise InputError(f"{role} is {_kind(part)}; expected something to call")
    if trunk is not None and head is None:
        raise InputError(
            "trunk= was given without head=, so nothing leads from its activations to the "
            "embedding; give both, as EmbeddingNetwork.from_parts(trunk, head), or neither"
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def refuse_elsewhere(module: nn.Module, device: torch.device | None) -> None:
    """Refuse a module without values, or not where it is said to be: it is never moved."""
    places = {tensor.device: None for tensor in _tensors(module)}
    if any(place.type == "meta" for place in places):
        raise NetworkError(
            "the network's parameters are on the 'meta' device, so they have no values; call "
            "module.to_empty(device='cpu') and load its weights first"
        )
    place = next(iter(places), device)
    if device is None or place is None:
        return
    if place.type != device.type or device.index not in (None, place.index):
        raise NetworkError(
            f"device={str(device)!r} was given, but the network is on {str(place)!r}; move it "
            f"with module.to({str(device)!r}) first"
        )


def refuse_inference(module: nn.Module) -> None:
    """Refuse parameters made in inference mode, with which autograd can do nothing."""
    if any(tensor.is_inference() for tensor in _tensors(module)):
        raise NetworkError(
            "the network's parameters were made inside torch.inference_mode and cannot be "
            "differentiated through; make the network outside of it"
        )


# Its place, precision and mode


class Parts(nn.Module):
    """Trunk and head side by side, for their parameters; neither is changed."""

    def __init__(self, trunk: object, head: object) -> None:
        super().__init__()
        self.training = False
        for name, part in (("trunk", trunk), ("head", head)):
            if isinstance(part, nn.Module):
                self.add_module(name, part)


class ModuleState:
    """A module's place, precision and mode, asked before every run without walking its parts."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        modal = [part for one in modules for part in one.modules() if isinstance(part, _MODAL)]
        self._with_mode = [*modules, *modal]
        places = [
            (value.is_floating_point(), (part, name))
            for part in modules[0].modules()
            for name, value in part.named_parameters(recurse=False)
        ]
        # The part and the name, not the parameter: loading weights may put another in its place.
        self._first = next((place for _, place in places), None)
        self._first_floating = next((place for floating, place in places if floating), None)

    @property
    def device(self) -> torch.device:
        """Where the parameters or buffers are; the CPU if there are none."""
        first = _parameter(self._first)
        return module_device(self._modules[0]) if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point parameter; float32 if there is none."""
        first = _parameter(self._first_floating)
        return torch.float32 if first is None else first.dtype

    def refuse_training(self) -> None:
        """Refuse a network that is, or whose batch norm or dropout is, in training mode."""
        if any(part.training for part in self._with_mode):
            for module in self._modules:
                _refuse_training(module)


def _parameter(place: tuple[nn.Module, str] | None) -> nn.Parameter | None:
    return None if place is None else getattr(place[0], place[1], None)


def _refuse_training(module: nn.Module) -> None:
    # An exported graph carries a meaningless flag, as a compiled module does in torch 2.4; plain
    # layers without a mode do not mind it.
    modeless = type(module).__name__.startswith(("GraphModule", "OptimizedModule")) or all(
        type(part).__module__.startswith("torch.nn.") and not isinstance(part, _MODAL)
        for part in module.modules()
    )
    if module.training and not modeless:
        raise NetworkError(
            f"the network ({type(module).__name__}) is in training mode, where batch norm and "
            "dropout make each embedding depend on the others; call .eval() on it first"
        )
    for name, part in module.named_modules():
        if part.training and isinstance(part, _MODAL):
            raise NetworkError(
                f"{name!r} ({type(part).__name__}) of the network is in training mode; call "
                ".eval() on the network first"
            )


def input_channels(module: nn.Module) -> int:
    """Return how many channels the first convolution takes, else 3."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def module_device(module: nn.Module) -> torch.device:
    """Return where a module's parameters or buffers are; the CPU if it has none."""
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextmanager
def no_gradients() -> Iterator[None]:
    """Run without gradients and never in inference mode, whose tensors can never have one."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def uncompiled() -> AbstractContextManager[object]:
    """Run compiled code as it was written: an input of another size would compile it again."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Run without TF32, which on GPUs alone would move a deep network's probe by about `SAME`."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    ):
        yield


# Its parameters


def bare_name(name: str) -> str:
    """Return a dotted name without what wrappers add (`module.` of DDP, `_orig_mod.`)."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def hash_parameters(module: nn.Module, with_bytes: bool = True) -> str:
    """Return the SHA-256 of a state dict, names sorted and without wrappers' prefixes."""
    state = {key: value for key, value in module.state_dict().items() if torch.is_tensor(value)}
    names = {key: bare_name(key) for key in state}
    if len(set(names.values())) < len(names):
        # Only part of the network is called `module`; that name belongs to it.
        names = {key: key.replace("_orig_mod.", "") for key in state}
    digest = hashlib.sha256()
    for key in sorted(state, key=names.__getitem__):
        if key.rpartition(".")[2] == "num_batches_tracked":
            continue
        tensor = state[key].detach()
        header = [names[key], str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header).encode() + b"\n")
        if with_bytes:
            whole = tensor.cpu().contiguous()
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Its failures


@contextmanager
def user_code(
    what: str,
    module: object = None,
    images: Tensor | None = None,
    advice: str = "call it by itself on a tensor of that shape to see the whole of it",
) -> Iterator[None]:
    """Report an exception of the user's own code as a `NetworkError`; memory's and ours pass."""
    try:
        yield
    except EmbedcamError:
        raise
    except (Exception, SystemExit) as error:
        if ran_out(error):
            raise
        message = message_of(error)
        if images is not None and "channels, but got" in message:
            raise InputError(
                f"the images are {list(images.shape)}, and the network takes another number of "
                f"channels ({message}); give inputs as the network's preprocessing makes them"
            ) from error
        shown = "" if images is None else f" on an input {list(images.shape)}"
        raise NetworkError(
            f"{what} failed{shown}{_place(error, module)} with {type(error).__name__}: "
            f"{message or 'no message'}; {advice_of(message) or advice}"
        ) from error


def advice_of(message: str) -> str | None:
    """Return what to do about a message whose cause is known, whatever the input was."""
    return next((step for sign, step in _ADVICE.items() if sign in message), None)


def message_of(error: BaseException) -> str:
    """Return an exception's own message on one line, no longer than one reads."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()]
    # TorchScript begins with its own traceback and ends with the reason.
    line = lines[-1 if "TorchScript interpreter" in lines[0] else 0] if lines else ""
    return line[:_LONGEST_MESSAGE].rstrip(". ")


def _place(error: BaseException, module: object) -> str:
    """Return ", in its layer 'encoder.norm' (LayerNorm),": the innermost in the traceback."""
    if not isinstance(module, nn.Module):
        return ""
    names = {id(part): (name, part) for name, part in module.named_modules() if name}
    innermost, trace = None, error.__traceback__
    while trace is not None:
        innermost = names.get(id(trace.tb_frame.f_locals.get("self")), innermost)
        trace = trace.tb_next
    if innermost is None:
        return ""
    return f", in its layer {innermost[0]!r} ({type(innermost[1]).__name__}),"


class RandomOperations(TorchDispatchMode):
    """Notes the names of the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(str(func.name()).partition("::")[2].partition(".")[0].rstrip("_"))
        return func(*args, **(kwargs or {}))


def by_chance(operations: set[str], off: float, allowed: float) -> NetworkError:
    """Return the error for a network that embeds one picture otherwise each time."""
    cause = "something in it depends on chance or on what ran before"
    if operations:
        names = ", ".join(sorted(operations)[:3])
        cause = f"it draws random numbers ({names}), as a dropout that is always on does"
    return NetworkError(
        f"the same picture run twice gives embeddings that differ by {off:.2g} (allowed: "
        f"{allowed:g}): {cause}; switch that off in eval mode, as in F.dropout(x, p, self.training)"
    )


def by_batch(module: nn.Module, off: float, allowed: float) -> NetworkError:
    """Return the error for a network that embeds a picture otherwise beside another one."""
    cause = "something mixes the pictures of a batch, such as a norm by the batch's statistics"
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            kind = type(part).__name__
            cause = f"{name!r} ({kind}) keeps no running statistics and norms by the batch's"
            break
    return NetworkError(
        f"a picture alone and beside another gives embeddings that differ by {off:.2g} (allowed: "
        f"{allowed:g}): {cause}; make each its own, as batch norm with running statistics does"
    )
