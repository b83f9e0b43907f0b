"""The identity of a torch network: its parameters hashed, its probe taken."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..index.identity import Identity, compare
from .embedding_network import EmbeddingNetwork
from .layers import bare_name
from .steady import full_float32


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


def fingerprint(network: EmbeddingNetwork) -> Identity:
    """The identity of a network, its probe taken with one forward pass.

    A network without preprocess is asked at the input size it has seen, 224 x 224 before any.

    Raises:
        NetworkError: its embedding depends on the rest of a batch, or on chance: it has none.
    """
    network.check_steady()
    with full_float32(network.device):
        features = network.forward(network.probe_images())
    described = network.describe()
    precision = str(network.autocast or network.dtype).removeprefix("torch.")
    return Identity(
        parameters_sha256=hash_parameters(network.module),
        layer=described["layer"],
        preprocess=_plain(described["preprocess"]),
        normalize=described["normalize"],
        output=described["output"],
        layout=described["layout"],
        precision=precision,
        name=described["name"],
        probe_embedding=features.embedding[0].float().cpu().numpy(),
        probe_pooled=features.activations[0].mean((1, 2)).float().cpu().numpy(),
        structure_sha256=hash_structure(network.module),
    )


def check(stored: Identity, network: EmbeddingNetwork) -> None:
    """Refuse a network that is not the one an index was built with, see `identity.compare`.

    Raises:
        NetworkMismatch: naming the index's value and the network's.
    """
    compare(stored, fingerprint(network))


def _plain(value: Any) -> Any:
    """As it will come back from JSON: tuples as lists."""
    return None if value is None else json.loads(json.dumps(value))
