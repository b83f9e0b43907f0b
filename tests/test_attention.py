"""Layers read inside an attention: against loops, in every library's networks, alone in threads."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo_attention
from build_samples import pictures
from torch import Tensor, nn

from embedcam import Explainer, Index, Preprocess, Recipe, Similarity, build_index, cam_for
from embedcam.errors import NetworkError
from embedcam.methods import Subject, run_method
from embedcam.network import EmbeddingNetwork, load_network, read_by
from embedcam.network.attention import AttentionWatch, watching
from embedcam.recipe.registry import METHODS
from embedcam.targets import Direction

KINDS: list[dict[str, Any]] = [
    {},
    {"signed": True, "normalize": False},
    {"head": "curved"},
    {"head": "curved", "signed": True},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gradeclip", "maskclip"])
def test_what_is_read_is_what_loops_make_of_the_parameters(method: str, kind: Any) -> None:
    case = zoo_attention.made(method=method, **kind)
    expected = getattr(
        zoo_attention, {"gradeclip": "gradeclip", "maskclip": "value"}[method] + "_activations"
    )(case)
    features = case.network.forward(torch.stack([case.image.flip(-1), case.image]))
    np.testing.assert_allclose(features.activations[1], expected, rtol=1e-9, atol=1e-12)
    plain = EmbeddingNetwork(case.module, "blocks.1.norm1", normalize=case.network.normalize)
    same = plain.forward(case.image[None]).embedding
    torch.testing.assert_close(features.embedding[1:], same, rtol=1e-9, atol=1e-12)
    # The oracle can fail.
    with torch.no_grad():
        case.module.blocks[0].norm1.weight[0] += 0.5
    off = case.network.forward(case.image[None]).activations[0].numpy() - expected
    assert np.abs(off).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_reading_are_of_the_output_at_every_position(kind: Any) -> None:
    case = zoo_attention.made(method="gradeclip", **kind)
    with case.network.head_pass(case.image[None]) as head:
        z = torch.arange(3.0, dtype=torch.float64)[None]
        found = head.vjp(z)[0]
    run = zoo_attention.Run(case)
    each = zoo_attention.gradients((run.z * z[0]).sum(), run.attended[-1].o)
    expected = sum(each[row] for row in run.rows)
    torch.testing.assert_close(found, expected[:, None, None].expand(-1, *zoo_attention.GRID))


# Every library's attention, fused and not

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def timm_vit(**more: Any) -> tuple[nn.Module, str, Any]:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**SMALL, num_classes=0, **more), "blocks.1", None


def timm_eva() -> tuple[nn.Module, str, Any]:
    from timm.models.eva import Eva

    return Eva(**SMALL, num_classes=0, use_rot_pos_emb=True), "blocks.1", None


def torchvision_vit() -> tuple[nn.Module, str, Any]:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 3, 24, 48), "encoder.layers", None


def open_clip_vit(**more: Any) -> tuple[nn.Module, str, Any]:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(32, 8, 24, 2, 3, 2.0, output_dim=16, **more), "transformer", None


def open_clip_resnet() -> tuple[nn.Module, str, Any]:
    from open_clip.modified_resnet import ModifiedResNet

    return ModifiedResNet([1, 1, 1, 1], 16, 4, image_size=64, width=8), "layer4", None


def hf(kind: str, attention: str) -> tuple[nn.Module, str, Any]:
    import transformers

    shape = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
        "patch_size": 8, "intermediate_size": 48, "attn_implementation": attention,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape)
    return getattr(transformers, f"{kind}Model")(config), "", "pooler_output"


MODELS: dict[str, Callable[[], tuple[nn.Module, str, Any]]] = {
    "timm": timm_vit,
    "timm mean": lambda: timm_vit(global_pool="avg"),
    "timm registers": lambda: timm_vit(reg_tokens=4),
    "timm pool": lambda: timm_vit(global_pool="map", class_token=False),
    "eva": timm_eva,
    "torchvision": torchvision_vit,
    "open_clip": open_clip_vit,
    "open_clip pool": lambda: open_clip_vit(attentional_pool=True, attn_pooler_heads=4),
    "open_clip resnet": open_clip_resnet,
}
for one in ("CLIPVision", "SiglipVision", "Dinov2", "DINOv3ViT", "ViT"):
    for how in ("eager", "sdpa"):
        MODELS[f"{one} {how}"] = lambda one=one, how=how: hf(one, how)


def network_of(name: str) -> EmbeddingNetwork:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module, layer, output = MODELS[name]()
        for values in module.parameters():
            if values.ndim > 1:
                nn.init.normal_(values, 0, 0.2)
    layer = layer or [n for n, _ in module.named_modules() if n.endswith(".1")][-1]
    size = (64, 64) if "resnet" in name else (32, 32)
    return EmbeddingNetwork(module.eval(), layer, output=output, input_size=size)


@pytest.mark.parametrize("name", MODELS)
def test_the_last_attention_of_every_library_is_found_and_read(name: str) -> None:
    pytest.importorskip({"e": "timm", "t": "timm", "o": "open_clip"}.get(name[0], "transformers"))
    network = network_of(name)
    images = torch.from_numpy(network.probe_images(2))
    plain = network.forward(images)
    loosened, values = read_by(network, "gradeclip"), read_by(network, "value")
    for read in (loosened, values):
        features = read.forward(images)
        torch.testing.assert_close(features.embedding, plain.embedding, rtol=1e-4, atol=1e-6)
        assert features.activations.abs().sum((1, 2, 3)).min() > 0
    # The weights of an attention sum to 1: mean of v by them is o, whatever the library calls it.
    with torch.no_grad(), watching(loosened.runner.part, watch := AttentionWatch(2, Tensor.clone)):
        network.module(images)
    (seen,) = watch.seen
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones_like(seen.weights[..., 0]))
    torch.testing.assert_close(seen.weights @ seen.value, seen.output)
    target = Similarity(plain.embedding[1].numpy())
    for method in ("gradeclip", "maskclip", "rollout", "genericattention", "legrad"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = cam_for(network, images[:1], target, method, progress=False)
        assert np.isfinite(found.cam).all()
    part = loosened.runner.part
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in network.module.modules())
    assert not part.training


def test_the_value_of_the_only_position_of_a_pool_is_the_embedding() -> None:
    network = read_by(network_of("open_clip resnet"), "value")
    features = network.forward(
        torch.tensor([0.2, 0.5, 0.8])[None, :, None, None].expand(1, 3, 64, 64)
    )
    # Every position of a picture of one color, but for the borders' padding and the places.
    direction = features.activations[0].mean((1, 2))
    cosine = torch.nn.functional.cosine_similarity(direction, features.embedding[0], dim=0)
    assert cosine > 0.9


def test_a_network_without_attention_says_so() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    network = EmbeddingNetwork(module, "0", input_size=(16, 16), name="plain")
    with pytest.raises(NetworkError, match="the network plain has no attention over all its posi"):
        read_by(network, "gradeclip")
    with pytest.raises(NetworkError, match="inside layer '0' no attention can be seen"):
        EmbeddingNetwork(module, "0@value").forward(torch.zeros(1, 3, 16, 16))
    with pytest.raises(NetworkError, match="'@values' is unknown; write LAYER@gradeclip or @value"):
        EmbeddingNetwork(module, "0@values")
    with (
        Subject(network, torch.zeros(1, 3, 16, 16), Similarity(np.ones(4))) as subject,
        pytest.raises(NetworkError, match=r"explains layer '0'.*--layer @gradeclip"),
    ):
        run_method(subject, METHODS["gradeclip"])


def test_what_is_read_makes_no_receipt_and_the_layer_that_does_is_named() -> None:
    network = small("blocks.1.attention@value")
    with pytest.raises(NetworkError, match=r"no receipt can be made.*at layer 'blocks\.1\.norm1'"):
        network.held_pass(network.probe_images())


def test_other_threads_are_not_seen_and_an_exception_leaves_nothing() -> None:
    case = zoo_attention.made(method="gradeclip")
    case.network.forward(case.image[None])
    attention = case.module.blocks[1].attention
    inside, go = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(10)

    handle = attention.register_forward_pre_hook(hold)
    with watching(attention, watch := AttentionWatch(1)):
        other = threading.Thread(target=lambda: case.module(case.image[None]))
        other.start()
        inside.wait(10)
        with torch.no_grad():
            case.module(case.image[None].flip(-1))
        go.set()
        other.join()
    handle.remove()
    assert len(watch.seen) == 1
    q = zoo_attention.Run(case.with_image(case.image.flip(-1))).attended[1].q
    torch.testing.assert_close(
        watch.seen[0].query[0].transpose(0, 1).flatten(1), torch.stack(q).detach()
    )
    broken = attention.proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(NetworkError, match="division by zero"):
        case.network.forward(case.image[None])
    broken.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not attention._forward_hooks
    assert torch.isfinite(case.network.forward(case.image[None]).embedding).all()


# In an index


def small(layer: str = "blocks.1.norm1") -> EmbeddingNetwork:
    module = zoo_attention.made(method="rollout").module.float()
    return EmbeddingNetwork(module, layer, preprocess=Preprocess((12, 18), "squash", None))


@pytest.mark.parametrize(("method", "reading"), [("gradeclip", "gradeclip"), ("maskclip", "value")])
def test_an_index_by_a_reading_is_transferred_and_opened_by_any_layer(
    tmp_path, method: str, reading: str
) -> None:
    source, centred = pictures(tmp_path), {"target": "centred", "norm": "around"}
    recipe = Recipe(method=method, encoding="low-rank", **centred)
    build_index(source, small(), tmp_path / "index", recipe, progress=False)
    with Index.open(tmp_path / "index") as index:
        layer = f"blocks.1.attention@{reading}"
        assert index.manifest.layer_names == [layer]
        assert index.encoding(0).bytes_per_image() == (0 if reading == "value" else 2 * 8 + 4)
        query = tmp_path / source.items[2].path
        centred_row = Direction(index.embeddings([2])[0] - index.fitted("embedding_mean"))
        for network in (small(layer), small()):  # brought to the layer by itself
            # The nearest is the picture itself, whose weights are its own.
            found = Explainer(index, network).explain(query, n_neighbors=1)
            own = cam_for(network, query, centred_row, method, norm="around", progress=False)
            size = np.abs(own.weights).max()
            np.testing.assert_allclose(found.weights, own.weights, atol=5e-3 * size)
            np.testing.assert_allclose(
                found.cam, own.cam, atol=5e-3 * np.abs(found.signed_cam).max()
            )


def made_network() -> EmbeddingNetwork:
    """What a factory of a user's returns."""
    return small()


def test_a_network_is_loaded_by_name_at_a_reading(tmp_path) -> None:
    expected = read_by(small(), "gradeclip")
    images = expected.probe_images(2)
    for layer in ("@gradeclip", "blocks.1.attention@gradeclip"):
        loaded = load_network("test_attention:made_network", layer=layer)
        assert loaded.layer == "blocks.1.attention@gradeclip"
        again = load_network(**loaded.spec)
        torch.testing.assert_close(
            again.forward(images).activations, expected.forward(images).activations
        )
        loaded.for_index(again.identity())
    # Side by side on two threads, each its own copy.
    first, second = expected.side_by_side(2)
    assert second.module is not first.module
    torch.testing.assert_close(
        second.forward(images).activations, expected.forward(images).activations
    )
    timm = pytest.importorskip("timm")
    del timm
    network = load_network("timm:test_vit", weights="random", layer="@value")
    assert network.layer.endswith("attn@value")
    assert network.forward(network.probe_images()).activations.ndim == 4
    assert network.spec["layer"] == network.layer


@pytest.mark.parametrize("reading", ["gradeclip", "value"])
def test_a_reading_is_exported(reading: str, tmp_path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    from embedcam.export import through_onnx

    network = read_by(small(), reading)
    by_file = through_onnx(network, tmp_path / "network.onnx", progress=False)
    images = network.probe_images(3)
    expected, found = network.forward(images), by_file.forward(images)
    torch.testing.assert_close(found.activations, expected.activations, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
