"""The user's module: what is accepted, where it is and in which mode, its hash, its failures."""

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import FunctionType

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError, InputError, NetworkError, ran_out, text_of

# Layers that treat a batch differently in training mode: their numbers would mix images.
MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
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
    if not isinstance(module, nn.Module):
        raise InputError(
            f"expected a torch.nn.Module, given {_kind(module)}; for two functions use "
            "EmbeddingNetwork.from_parts(trunk, head)"
        )
    asked: list[inspect.Parameter] = []
    with suppress(TypeError, ValueError):  # builtins tell nothing; the first run will
        asked = list(inspect.signature(module.forward).parameters.values())
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    others = [one for one in asked if one.default is one.empty and one.kind not in variable]
    others = [one for one in others if one is not asked[0] or one.kind is one.KEYWORD_ONLY]
    main = getattr(module, "main_input_name", "pixel_values")
    bases = [base.__name__ for base in type(module).__mro__]
    why = step = ""
    if isinstance(module, torch.jit.ScriptModule):
        why = "is a TorchScript module, whose layers cannot be watched"
        step = "the one it was made from, or its halves as EmbeddingNetwork.from_parts(trunk, head)"
    elif "SentenceTransformer" in bases:
        why = "takes a dict of features, not images"
        step = "EmbeddingNetwork.from_sentence_transformers(model)"
    elif main != "pixel_values":
        why = f"takes {main!r} first, not images"
        step = "EmbeddingNetwork.from_transformers(model, processor), or a model for images"
    elif hasattr(module, "encode_image"):
        why = "takes images and texts, not images alone"
        step = "EmbeddingNetwork.from_open_clip(model, preprocess)"
    elif others:
        why = f"also asks for {', '.join(one.name for one in others)}, not images alone"
        step = "a module whose forward takes nothing else, such as one around it"
    if why:
        raise NetworkError(f"the network, a {_kind(module)}, {why}; give {step}")


def refuse_parts(trunk: object, head: object) -> None:
    """Refuse what cannot be called, and a trunk alone."""
    for part, role in ((trunk, "trunk"), (head, "head")):
        if part is not None and (not callable(part) or isinstance(part, type)):
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


# Its place, precision and mode


def refuse_training(modules: Sequence[nn.Module]) -> None:
    """Refuse a network that is, or whose batch norm or dropout is, in training mode."""
    for module in modules:
        # An exported graph's flag says nothing, nor a compiled module's in torch 2.4; plain layers
        # without a mode do not mind it.
        modeless = type(module).__name__.startswith(("GraphModule", "OptimizedModule")) or all(
            type(part).__module__.startswith("torch.nn.") and not isinstance(part, MODAL)
            for part in module.modules()
        )
        wrong = [("the network", module)] if module.training and not modeless else []
        wrong += [(repr(n), p) for n, p in module.named_modules() if isinstance(p, MODAL)]
        for name, part in wrong:
            if part.training:
                raise NetworkError(
                    f"{name} ({type(part).__name__}) is in training mode, where batch norm and "
                    "dropout make each embedding depend on the others; call .eval() on it"
                )


def input_channels(module: nn.Module) -> int:
    """Return how many channels the first convolution takes, else 3."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def is_convolutional(module: nn.Module) -> bool:
    """Return whether a module has more convolutions over images than linear maps."""
    parts = [*module.modules()]
    convolutions = sum(isinstance(part, nn.Conv2d) for part in parts)
    # An attention's own projections are no modules of their own.
    linear = sum(isinstance(part, nn.Linear | nn.MultiheadAttention) for part in parts)
    return convolutions > linear


def module_device(module: nn.Module) -> torch.device:
    """Return where a module's parameters or buffers are; the CPU if it has none."""
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))


def lay_out(module: nn.Module, channels_last: bool) -> None:
    """Lay a module's weights out anew, those of convolutions over images: 3-D ones stay."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in _tensors(module):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=form)


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


def full_float32(device: torch.device) -> AbstractContextManager[object]:
    """Run without TF32, which on GPUs alone would move a deep network's probe by about `SAME`."""
    cudnn = torch.backends.cudnn
    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    return cudnn.flags(**kept, allow_tf32=False) if device.type == "cuda" else nullcontext()


# Several of it side by side


def twin_of(module: nn.Module) -> nn.Module | None:
    """Return a module of the same parameters, for another thread; None where there can be none.

    What a forward leaves on the module, such as a feature for later, each then has for itself. What
    it leaves elsewhere, they would share: a hook that is a plain function keeps things in a dict,
    or on the module it was written for.
    """
    parts = list(module.modules())
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        return None
    kinds = {type(part).__name__ for part in parts}
    if any(kind.startswith(("GraphModule", "OptimizedModule")) for kind in kinds):
        return None  # each would be compiled again
    hooks = [h for part in parts for h in (part._forward_hooks, part._forward_pre_hooks)]
    if any(isinstance(hook, FunctionType) for of in hooks for hook in of.values()):
        return None
    try:
        twin = copy.deepcopy(module, {id(tensor): tensor for tensor in _tensors(module)})
    except Exception as error:  # of the user's own __deepcopy__, or of what cannot be copied
        if ran_out(error):
            raise
        return None
    if not isinstance(twin, nn.Module) or not {*parts}.isdisjoint(twin.modules()):
        return None
    return twin


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[str]]:
    """Yield a list that names the parts of a module that are called, however, as they are."""
    called = list[str]()

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.enter_context(part.register_forward_pre_hook(noting(name)))
        yield called


def hookable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module's parts by dotted name, but for scripted ones, which take no hooks."""
    for name, part in module.named_modules():
        if name and not isinstance(part, torch.jit.ScriptModule):
            yield name, part


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch and BLAS compute on one thread: numbers then do not depend on the cores."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(before)


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
def user_code(what: str, advice: str) -> Iterator[None]:
    """Report an exception of the user's own code as a `NetworkError`; memory's and ours pass."""
    try:
        yield
    except (Exception, SystemExit) as error:
        tell_failure(error, what, advice)
        raise


def tell_failure(
    error: BaseException,
    what: str,
    advice: str,
    module: object = None,
    images: object = None,
) -> None:
    """Raise an exception of the user's own code as a `NetworkError`; not memory's and ours."""
    if isinstance(error, EmbedcamError) or ran_out(error):
        return
    message, shown = message_of(error), ""
    if isinstance(images, Tensor):
        shown = f" on an input {list(images.shape)}"
        if "channels, but got" in message:
            raise InputError(
                f"the images are {list(images.shape)}, and the network takes another number of "
                f"channels ({message}); give inputs as the network's preprocessing makes them"
            ) from error
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
