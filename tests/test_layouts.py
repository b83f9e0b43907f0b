"""Which tensor is the embedding, and where in a layer's output the channels are."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from embedcam.errors import NetworkError
from embedcam.network.layers import Layout, choose_embedding, replace_first, resolve

Pair = namedtuple("Pair", "embedding other")


@dataclass
class Output:
    hidden: Tensor
    pooled: Tensor


def found(shape: tuple[int, ...], size: tuple[int, int], **given: Any) -> Layout:
    return resolve(torch.zeros(shape), torch.zeros(shape[0], 3, *size), **given)


def test_four_dimensions_are_told_apart_by_the_inputs_aspect() -> None:
    for shape, size, kind in (
        ((2, 512, 7, 7), (224, 224), "bkhw"),
        ((2, 7, 7, 768), (224, 224), "bhwk"),
        ((2, 96, 7, 10), (224, 320), "bkhw"),
        ((2, 7, 10, 96), (224, 320), "bhwk"),
        ((2, 2048, 1, 1), (64, 64), "bkhw"),
        ((2, 8, 8, 8), (64, 64), "bkhw"),  # cannot be told apart: the usual one
        ((2, 16, 13, 13), (224, 224), "bkhw"),  # 13 = 224 / 17 and a bit
    ):
        assert found(shape, size).kind == kind


def test_tokens_find_their_grid() -> None:
    for tokens, size, grid, prefix in (
        (197, (224, 224), (14, 14), 1),
        (196, (224, 224), (14, 14), 0),
        (261, (224, 224), (16, 16), 5),  # DINOv2: class token and four registers
        (1 + 14 * 28, (224, 448), (14, 28), 1),
        (1 + 37 * 27, (518, 378), (37, 27), 1),
        (1 + 16 * 21, (230, 300), (16, 21), 1),  # 14 px patches, the rest of the input unused
    ):
        layout = found((2, tokens, 32), size)
        assert (layout.kind, layout.grid, layout.prefix) == ("btk", grid, prefix)


def test_a_given_grid_or_prefix_is_believed_if_it_fits() -> None:
    assert found((1, 20, 8), (64, 64), grid=(2, 9)).prefix == 2
    assert found((1, 17, 8), (64, 64), prefix=1).grid == (4, 4)
    assert found((1, 4, 4, 8), (64, 64), kind="bkhw").grid == (4, 8)
    for given, message in (
        ({"grid": (5, 5)}, r"returned 17 tokens, but grid=5 x 5 makes 25"),
        ({"grid": (4, 4), "prefix": 0}, r"grid=4 x 4 and prefix_tokens=0 makes 16"),
        ({"prefix": 3}, r"17 tokens of layer 'layer' after 3 prefix tokens fit no grid"),
        ({"kind": "bkhw"}, r"layout='bkhw' says four dimensions"),
    ):
        with pytest.raises(NetworkError, match=message):
            found((1, 17, 8), (64, 64), **given)
    with pytest.raises(NetworkError, match=r"17 x 3.*grid=4 x 4 was given"):
        found((1, 8, 17, 3), (64, 64), grid=(4, 4))
    with pytest.raises(NetworkError, match=r"\[5, 2, 8\] for a batch of 2.*first dimension"):
        resolve(torch.zeros(5, 2, 8), torch.zeros(2, 3, 32, 32))


PLACES = [("bkhw", (1, 3, 1, 2)), ("bhwk", (1, 1, 2, 3)), ("btk", (1, 2 + 1 * 3 + 2, 3))]


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_maps_go_to_the_layers_layout_and_back(kind: str, place: tuple[int, ...]) -> None:
    layout = Layout(kind, (2, 3), 2 if kind == "btk" else 0)
    maps = torch.arange(2 * 4 * 2 * 3.0).reshape(2, 4, 2, 3)
    raw = layout.to_raw(maps, torch.full((2, 8, 4), -1.0) if kind == "btk" else maps)
    assert torch.equal(layout.to_maps(raw), maps)
    assert raw[place] == maps[1, 3, 1, 2]


def test_the_embedding_in_what_a_network_returns() -> None:
    z, other = torch.ones(2, 5), torch.zeros(2, 7)
    for output, choice in (
        (z, None),
        ((z, other), None),
        (Pair(z, other), None),
        ({"z": z}, None),
        ([other, z], 1),
        ({"a": other, "b": z}, "b"),
        (Output(other, z), "pooled"),
        (Output(torch.stack([z, z + 1], 1), other), lambda out: out.hidden[:, 0]),
        (z[:, :, None, None], None),
        ({"last_hidden_state": z[:, None], "pooler_output": z}, None),  # of transformers
    ):
        assert torch.equal(choose_embedding(output, choice, 2), z)


def test_outputs_without_one_embedding() -> None:
    z, tokens = torch.ones(2, 5), torch.ones(2, 7, 5)
    for output, choice, message in (
        (Output(tokens, z), None, r"Output with hidden, pooled; say"),
        ({"a": z, "b": z}, None, r"output='a'"),
        ({"last_hidden_state": tokens, "z": z}, None, r"output='z'"),
        ({"a": z}, "b", r"output='b' is not in .* with a\)"),
        ((z,), 4, r"output=4 is beyond the 1 values"),
        (tokens, None, r"\[2, 7, 5\] for a batch of 2.*last_hidden_state"),
        (torch.ones(3, 5), None, r"\[3, 5\] for a batch of 2"),
        (("text",), None, r"returned str; expected the embedding"),
    ):
        with pytest.raises(NetworkError, match=message):
            choose_embedding(output, choice, 2)


def test_what_a_layer_returned_keeps_its_kind() -> None:
    new = torch.ones(1)
    pair = replace_first(Pair(torch.zeros(1), "rest"), new)
    assert isinstance(pair, Pair)
    assert pair == (new, "rest")
    assert replace_first({"text": "x", "a": torch.zeros(1)}, new) == {"text": "x", "a": new}
    assert replace_first([torch.zeros(1), 2], new) == [new, 2]
