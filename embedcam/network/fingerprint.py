"""A torch network's parameters, hashed."""

import hashlib
import json

import torch
from torch import nn

from .layers import bare_name


def hash_parameters(module: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a module's sorted state dict.

    Of each entry its name, dtype, shape and bytes. `module.` before every name (data parallel) and
    `_orig_mod.` anywhere (compiled) are left out, as is `num_batches_tracked`, which counts
    training steps and computes nothing.
    """
    return _hash_state(module, with_bytes=True)


def hash_structure(module: nn.Module) -> str:
    """As `hash_parameters`, of names, dtypes and shapes alone."""
    return _hash_state(module, with_bytes=False)


def _hash_state(module: nn.Module, with_bytes: bool) -> str:
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
