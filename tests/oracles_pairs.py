"""Receipts of a pair once more, as slow literal loops over the head's whole Jacobian."""

import math
from collections.abc import Callable

import numpy as np
import torch
from build_samples import Toy
from torch import Tensor, nn

Array = np.ndarray


def jacobian(head: Callable[[Tensor], Tensor], activations: Array) -> Array:
    """dz_d / dA_kij, `[D K H W]`, one backward pass a number of z."""
    maps = torch.tensor(activations, dtype=torch.float64)[None].requires_grad_()
    z = head(maps)[0]
    rows = [torch.autograd.grad(one, maps, retain_graph=True)[0][0].numpy() for one in z]
    return np.stack(rows)


def held_bent(head: nn.Sequential, activations: Array) -> Array:
    """The same of mean, linear, tanh, linear with tanh(h) / h held, `[D K H W]`."""
    _, first, _, second = head
    A = activations
    W1, b1, W2 = (x.detach().numpy() for x in (first.weight, first.bias, second.weight))
    hidden, n = W1 @ A.mean((1, 2)) + b1, A.shape[1] * A.shape[2]
    J = np.zeros((len(W2), *A.shape))
    for d, k, m in np.ndindex(len(W2), len(A), len(W1)):
        J[d, k] += W2[d, m] * np.tanh(hidden[m]) / hidden[m] * W1[m, k] / n
    return J


def held_power_mean(head: nn.Sequential, activations: Array) -> Array:
    """The same of clamp c, mean of cubes m, its root r, linear, with c/A, c^2 and r/m held."""
    A, W = activations, head[1].weight.detach().numpy()
    J = np.zeros((len(W), *A.shape))
    for k in range(len(A)):
        clamped = np.maximum(A[k], 1e-3)
        m = (clamped**3).mean()
        for d, i, j in np.ndindex(len(W), *A.shape[1:]):
            slope = clamped[i, j] / A[k, i, j] if A[k, i, j] else 0.0
            J[d, k, i, j] = W[d, k] * m ** (1 / 3) / m * clamped[i, j] ** 2 * slope / A[k].size
    return J


def layer_norm_map(norm: nn.LayerNorm, token: Array) -> Array:
    """g_i (delta_ik - 1/K) / sigma, `[K K]`, with sigma of the token held."""
    width = len(token)
    sigma = np.sqrt(((token - token.mean()) ** 2).mean() + norm.eps)
    gain = norm.weight.detach().numpy()
    return np.array(
        [[gain[i] * ((i == k) - 1 / width) / sigma for k in range(width)] for i in range(width)]
    )


def attention_of_one(query: Array, tokens: Array, W: Array, b: Array, heads: int) -> Array:
    """The weights with which a query `[K]` attends to tokens `[T K]`, keys W t + b, `[heads T]`."""
    width = len(query)
    weights = np.zeros((heads, len(tokens)))
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        for t, token in enumerate(tokens):
            weights[h, t] = np.exp(query[part] @ (W @ token + b)[part] / np.sqrt(width // heads))
    return weights / weights.sum(1, keepdims=True)


def mixed_values(weights: Array, V: Array, out: Array) -> list[Array]:
    """out [a_1t V_1; a_2t V_2; ...] of each token t, V_h the rows of head h; `[K K]` each."""
    heads, width = len(weights), len(V)
    maps = []
    for t in range(weights.shape[1]):
        scaled = np.zeros(V.shape)
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            scaled[part] = weights[h, t] * V[part]
        maps.append(out @ scaled)
    return maps


def held_tokens(patches: nn.Module, head: nn.Module, activations: Array) -> tuple[Array, Array]:
    """The same of attention of the class token, weights and sigma held; and what that token gives.

    Out: `[D K H W]` and `[D]`.
    """
    A, width, mix = activations, len(activations), head.mix
    first = patches.token.detach().numpy()[0]
    tokens = np.concatenate([first, A.reshape(width, -1).T])
    maps = [layer_norm_map(head.norm, token) for token in tokens]
    shift = head.norm.bias.detach().numpy()
    normed = np.stack([to @ token + shift for to, token in zip(maps, tokens, strict=True)])
    W, b = mix.in_proj_weight.detach().numpy(), mix.in_proj_bias.detach().numpy()
    query = W[:width] @ normed[0] + b[:width]
    keys = W[width : 2 * width], b[width : 2 * width]
    weights = attention_of_one(query, normed, *keys, mix.num_heads)
    mixed = mixed_values(weights, W[2 * width :], mix.out_proj.weight.detach().numpy())
    linear = head.linear.weight.detach().numpy()
    each = [linear @ value @ to for value, to in zip(mixed, maps, strict=True)]
    J = np.stack(each[1:], -1).reshape(len(linear), *A.shape)
    return J, (each[0] + linear) @ tokens[0]


def held_block(block: nn.Module, tokens: Array, stream: Array | None) -> dict[str, Array]:
    """What z is the sum of behind an attention of one query, a perceptron, a norm and a linear map.

    `tokens` `[T K]` are what is attended to, by the first of them, or by `block.latent`; `stream`
    `[K]` is what the attention's output is added to. Weights and sigmas are held. Out: "tokens"
    `[T D]`, and `[D]` each "stream", "perceptron", "biases".
    """
    array = {name: value.detach().numpy() for name, value in block.named_parameters()}
    asking = array["latent"] if stream is None else tokens[0]
    query = array["q.weight"] @ asking + array["q.bias"]
    keys = array["k.weight"], array["k.bias"]
    weights = attention_of_one(query, tokens, *keys, block.heads)
    given = mixed_values(weights, array["v.weight"], array["out.weight"])
    each = np.stack([value @ token for value, token in zip(given, tokens, strict=True)])
    constant = array["out.weight"] @ array["v.bias"] + array["out.bias"]
    y = each.sum(0) + constant + (0 if stream is None else stream)
    hidden = layer_norm_map(block.norm, y) @ y + array["norm.bias"]
    hidden = array["up.weight"] @ hidden + array["up.bias"]
    bent = np.array([h / 2 * (1 + math.erf(h / math.sqrt(2))) for h in hidden])
    added = array["down.weight"] @ bent
    y = y + added + array["down.bias"]
    last = array["last.weight"] @ layer_norm_map(block.end, y)
    shift = array["last.weight"] @ array["end.bias"] + array["last.bias"]
    return {
        "tokens": np.stack([last @ one for one in each]),
        "stream": last @ (np.zeros(len(y)) if stream is None else stream),
        "perceptron": last @ added,
        "biases": last @ (constant + array["down.bias"]) + shift,
    }


def held_norm(
    activations: Array, norm: nn.Module, W: Array | None, centred: bool, pooled: bool = True
) -> Array:
    """The same of a mean and a LayerNorm (or RMSNorm) in either order, then W; sigma held."""
    A, width, n = activations, len(activations), activations[0].size
    gain = norm.weight.detach().double().numpy()
    W = np.eye(width) if W is None else W
    J = np.zeros((len(W), *A.shape))
    for i, j in np.ndindex(A.shape[1:]):
        values = [A[k].mean() if pooled else A[k, i, j] for k in range(width)]
        middle = sum(values) / width if centred else 0.0
        sigma = math.sqrt(sum((x - middle) ** 2 for x in values) / width + norm.eps)
        for d, k, m in np.ndindex(len(W), width, width):
            J[d, k, i, j] += W[d, m] * gain[m] * ((m == k) - centred / width) / sigma / n
    return J


def held_normed(head: nn.Sequential, activations: Array) -> Array:
    """The same of mean, LayerNorm, linear."""
    return held_norm(activations, head[1], head[2].weight.detach().numpy(), True)


def slopes_of(made: Toy, A: Array) -> tuple[Array, Array | None]:
    """dz/dA `[D K H W]` of a toy, what is held held, and what its class token gives to z `[D]`."""
    first, head = made.precise
    if made.kind == "tokens":
        return held_tokens(first, head, A)
    known = {"pooled": held_bent, "other": held_power_mean, "normed": held_normed}
    literal = known.get(made.kind)
    return (jacobian(made.head, A) if literal is None else literal(head, A)), None


def cell_vector(J: Array, A: Array, norm: float, row: int, column: int) -> list[float]:
    """sum_k dz_d/dA_kij A_kij / |z| for every d."""
    width, channels = J.shape[:2]
    return [
        sum(J[d, k, row, column] * A[k, row, column] for k in range(channels)) / norm
        for d in range(width)
    ]


def contributions(J: Array, A: Array, norm: float, direction: Array) -> Array:
    """sum_d dz_d/dA_kij A_kij c_d / |z|, `[K H W]`."""
    total = np.zeros(A.shape)
    for d, k, i, j in np.ndindex(J.shape):
        total[k, i, j] += J[d, k, i, j] * A[k, i, j] * direction[d] / norm
    return total


def pair_product(one: list[float], other: list[float], mean: Array, n: int, m: int) -> float:
    """(v - mean / n) . (v' - mean / m), n and m the numbers of cells."""
    return sum(
        (a - mean[d] / n) * (b - mean[d] / m)
        for d, (a, b) in enumerate(zip(one, other, strict=True))
    )


def greedy_links(matrix: Array, n: int) -> list[tuple[tuple[int, ...], float]]:
    """The largest positive entry, then the largest that is allowed beside those, and so on."""
    found: list[tuple[tuple[int, ...], float]] = []
    for place in sorted(np.ndindex(*matrix.shape), key=lambda at: -matrix[at]):
        if matrix[place] > 0 and all(allowed(place, taken) for taken, _ in found):
            found.append((place, float(matrix[place])))
    return found[:n]


def allowed(place: tuple[int, ...], taken: tuple[int, ...]) -> bool:
    """Neither cell is used, and not both touch those used together."""
    i, j, k, m = (abs(a - b) for a, b in zip(place, taken, strict=True))
    used = i == j == 0 or k == m == 0
    return not used and not (i <= 1 and j <= 1 and k <= 1 and m <= 1)
