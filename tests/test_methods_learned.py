"""LFI-CAM and ABN beside literal loops, as networks that are trained, saved and explained."""

import copy
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_cases
import zoo_learned as oracle
import zoo_perturbation
from oracles import cam
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock
from zoo_cases import Pooled, make, trunk

from embedcam import EmbeddingNetwork
from embedcam.demo.settings import DemoSettings
from embedcam.errors import InputError, NetworkError
from embedcam.methods import MethodMap, MethodWarning, cam_for
from embedcam.methods.learned import ABNetwork, LFINetwork, at_stride_one
from embedcam.targets import Coordinate
from examples import train_attention as script

TOLERANCE = 1e-9


def drawn(name: str, network: EmbeddingNetwork, images: Any, **settings: Any) -> MethodMap:
    with pytest.warns(MethodWarning, match="ignores the target"):
        return cam_for(network, images, Coordinate(0), name, progress=False, **settings)


def off(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["lficam", "abn"])
def test_a_branch_costs_one_pass(name: str) -> None:
    _, subject = zoo_cases.run(oracle.CASES[name](), name)
    assert vars(subject.passes) == dict(forwards=1, heads=0, head_backwards=0, full_backwards=0)


@pytest.mark.parametrize("signed", [False, True])
def test_every_step_of_lfi_is_the_formulas(signed: bool) -> None:
    case = oracle.lfi_case(signed=signed)
    image, activations = oracle.numbers(case)
    images = case.image[None]
    with torch.no_grad():
        a, importance, attention = case.module.attend(images)
        assert off(a[0], activations) == 0
        found = case.module.stacked(images, a)[0]
        assert off(found, oracle.stacked(image, activations)) < TOLERANCE
        weights = oracle.lficam(case).weights
        assert off(importance[0], weights) < TOLERANCE
        seen = oracle.unit(cam(weights, activations))
        assert off(attention[0], seen) < TOLERANCE
        onward = torch.from_numpy(oracle.attended(activations, seen))
        z = case.module.head(onward[None])
        assert off(case.module(images), z) < TOLERANCE
        assert off(case.module.head(a), z) > 1e-3, "attention must change the embedding"


def test_every_step_of_abn_is_the_formulas() -> None:
    case = oracle.abn_case()
    _, activations = oracle.numbers(case)
    attention, own = oracle.abn_branch(activations, case.module)
    onward = torch.from_numpy(oracle.attended(activations, attention))
    with torch.no_grad():
        embedding, branch = case.module.both(case.image[None])
        staged = oracle.relu(oracle.convolution(onward.numpy(), case.module.stage[0], stride=2))
        z = case.module.head(torch.from_numpy(staged)[None])
        assert off(branch[0], own) < TOLERANCE
        assert off(embedding, z) < TOLERANCE
        torch.testing.assert_close(case.module(case.image[None]), embedding)
        unseen = case.module.head(case.module.stage(torch.from_numpy(activations)[None]))
        assert off(unseen, z) > 1e-3, "attention must change the embedding"


def test_autocast_is_the_networks_own_whatever_surrounds_the_call() -> None:
    case = oracle.lfi_case()
    module, image = case.module.float(), case.image.float()
    plain = EmbeddingNetwork(module, "trunk")
    half = EmbeddingNetwork(module, "trunk", autocast=torch.bfloat16)
    expected = drawn("lficam", plain, image).weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(drawn("lficam", plain, image).weights, expected)
    rounded = drawn("lficam", half, image).weights
    assert 1e-5 < off(rounded, expected) < 8e-2


@pytest.mark.parametrize("name", ["lficam", "abn"])
def test_a_network_in_training_mode_is_refused(name: str) -> None:
    case = oracle.CASES[name]()
    case.module.train()
    with pytest.warns(MethodWarning), pytest.raises(NetworkError, match=r"call \.eval\(\) on it"):
        cam_for(case.network, case.image, Coordinate(0), name, progress=False)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_where_all_is_flat_attention_is_zero_and_gradients_are_finite(value: float) -> None:
    case = oracle.lfi_case()
    images = case.image[None]
    flat = torch.full((1, 6, 4, 6), value, dtype=torch.float64, requires_grad=True)
    importance = case.module.importance(images, flat)
    attention = case.module.attention(flat, importance)
    assert torch.equal(attention, torch.zeros_like(attention))
    assert torch.isfinite(importance).all()
    z = case.module.embed(images, flat)
    assert off(z.detach(), case.module.head(flat).detach()) == 0
    (gradient,) = torch.autograd.grad(z.sum(), flat)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["lficam", "abn"])
def test_other_methods_work_at_the_same_layer(name: str) -> None:
    case = oracle.CASES[name]("triplets")
    case.network.check()
    _, gradient = case.gradient(case.image)
    found, _ = zoo_cases.run(case, "gradcam")
    assert off(found.weights[0], gradient.mean((1, 2))) < TOLERANCE
    # Ablation-CAM puts many activations through the head beside one picture.
    expected = zoo_perturbation.ablationcam(case)
    assert zoo_cases.distance(expected, zoo_cases.run(case, "ablationcam")[0]) < TOLERANCE


def test_gradients_reach_every_parameter_of_the_branches() -> None:
    images = torch.randn(4, 3, 12, 18, generator=torch.Generator().manual_seed(3))
    lfi = oracle.lively(oracle.lfi_module).train()
    lfi(images).pow(2).sum().backward()
    abn = oracle.lively(oracle.abn_module).train()
    torch.stack([one.pow(2).sum() for one in abn.both(images)]).sum().backward()
    for module in (lfi, abn):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


def test_a_stage_at_stride_one_keeps_its_numbers_and_the_positions() -> None:
    down = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    stage = oracle.lively(lambda: nn.Sequential(BasicBlock(4, 8, 2, down), BasicBlock(8, 8)))
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    made = at_stride_one(stage)
    x = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert made(x).shape == (1, 8, 6, 10)
        # A convolution at stride 2 is every other place of the one at stride 1.
        assert torch.allclose(made[0].conv1(x)[..., ::2, ::2], stage[0].conv1(x), atol=1e-6)
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(before[k], v) for k, v in stage.state_dict().items())


def test_networks_without_the_branch_are_told_what_to_do() -> None:
    plain, lfi = make(), oracle.lfi_case()
    wrapped = EmbeddingNetwork(nn.Sequential(nn.Identity(), lfi.module).eval(), "1.trunk")
    parts = EmbeddingNetwork.from_parts(lfi.module.trunk, Pooled().double().eval())
    for name, network, said in [
        ("lficam", plain.network, "this Sequential has none; wrap trunk and head in embedcam.meth"),
        ("lficam", wrapped, "this Sequential has none"),
        ("lficam", parts, "this network given as trunk and head has none"),
        ("abn", lfi.network, "this LFINetwork has none; wrap trunk and head in embedcam.methods."),
        ("abn", plain.network, r"ABNetwork, train it as examples/train_attention\.py does"),
    ]:
        with pytest.warns(MethodWarning), pytest.raises(NetworkError, match=said):
            cam_for(network, lfi.image, Coordinate(0), name, progress=False)


def test_a_layer_that_is_not_weighed_is_refused_by_lficam() -> None:
    case = oracle.lfi_case()
    network = EmbeddingNetwork(case.module, "trunk.0")
    said = "explains layer 'trunk.0'"
    with pytest.warns(MethodWarning), pytest.raises(NetworkError, match=said):
        cam_for(network, case.image, Coordinate(0), "lficam", progress=False)
    last = EmbeddingNetwork(case.module, "trunk.4")
    expected = drawn("lficam", case.network, case.image)
    assert np.array_equal(drawn("lficam", last, case.image).cam, expected.cam)
    # A wrapper that hands images on is looked through.
    wrapper = nn.Sequential(OrderedDict(module=case.module)).eval()
    wrapped = EmbeddingNetwork(wrapper, "trunk", input_size=(12, 18))
    assert np.array_equal(drawn("lficam", wrapped, case.image).cam, expected.cam)


def test_abn_draws_the_same_whatever_layer_is_explained() -> None:
    case = oracle.abn_case()
    network = EmbeddingNetwork(case.module, "stage", input_size=(12, 18))
    found, expected = drawn("abn", network, case.image), drawn("abn", case.network, case.image)
    assert off(found.cam, expected.cam) < 1e-6
    assert (found.passes.forwards, expected.passes.forwards) == (2, 1)


def test_channels_that_are_not_the_trunks_and_stages_that_shrink_are_refused() -> None:
    images = torch.zeros(1, 3, 12, 18)
    with pytest.raises(InputError, match="n_channels = 0"):
        LFINetwork(trunk(), Pooled(), 0)
    with pytest.raises(NetworkError, match=r"is \[1, 6, 4, 6\]; expected \[B 5 H W\]"):
        LFINetwork(trunk(), Pooled(), 5)(images)
    with pytest.raises(NetworkError, match=r"makes \[3, 5\] of the trunk's \[4, 6\] positions"):
        ABNetwork(trunk(), nn.MaxPool2d(2), Pooled(), 6, 4)(images)
    own = ABNetwork(trunk(), nn.MaxPool2d(2), Pooled(), 6, 4, branch=nn.Identity())
    assert own(images).shape == (1, 3)


SMALL = DemoSettings(
    input_size=48, scene_size=48, n_train=60, n_query=20, steps=24, batch_size=20, channels=24,
    embedding_size=8,
)  # fmt: skip


@pytest.mark.parametrize("name", ["lfi", "abn"])
def test_training_lowers_the_loss_and_the_maps_are_the_branchs(name: str) -> None:
    module = (script.make_lfi if name == "lfi" else script.make_abn)(SMALL).eval()
    untrained = copy.deepcopy(module)
    losses = script.train(module, SMALL, progress=False)
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    again = copy.deepcopy(untrained)
    assert torch.equal(script.train(again, SMALL, progress=False), losses)
    network = script.explained(module, SMALL)
    pictures = [Image.fromarray(scene.pixels) for scene in script.held_out(SMALL)[:2]]
    images = torch.from_numpy(np.stack([network.preprocess(one) for one in pictures]))
    with torch.no_grad():
        a, second, third = module.attend(images)
        before = untrained.attend(images)[1]
    assert off(before, second) > 1e-3, "the branch itself must have learned"
    found = drawn("lficam" if name == "lfi" else "abn", network, images)
    if name == "abn":
        assert off(found.grid_cam, second) < 1e-6
    else:
        assert off(found.weights, second) < 1e-6
        assert off(found.grid_cam, torch.einsum("bk,bkhw->bhw", second, a).clamp(min=0)) < 1e-5
        top = found.grid_cam.max((1, 2), keepdims=True)
        low = found.grid_cam.min((1, 2), keepdims=True)
        assert off((found.grid_cam - low) / (top - low), third) < 1e-4


def test_the_script_writes_weights_and_a_picture(tmp_path: Path, capsys) -> None:
    script.run(tmp_path, replace(SMALL, steps=2, n_query=10, n_train=20), 2, progress=False)
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:3]] == ["lficam", "abn"]
    names = ["abn.safetensors", "attention.png", "lfi.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
