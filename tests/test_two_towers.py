"""Networks of transformers, open_clip and sentence-transformers: found whole, equal to theirs."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from embedcam.errors import NetworkError
from embedcam.network import EmbeddingNetwork, load_network, source
from embedcam.preprocess import CustomPreprocess, Preprocess

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
from scripts.networks import made  # noqa: E402

TEXTS = ["a cat", "two dogs over the red car"]
# Before the last attention, its last output, its last map; tokens before the grid.
LAYERS = {
    "vit": ("layers.1.layernorm_before", 1),
    "deit": ("layers.1.layernorm_before", 2),
    "beit": ("layernorm", 1),
    "dinov2_registers": ("encoder.layer.1.norm1", 5),
    "dinov3_vit": ("model.layer.1.norm1", 5),
    "dinov3_convnext": ("model.stages.3", None),
    "swin": ("layernorm", None),
    "convnextv2": ("encoder", None),
    "resnet": ("encoder", None),
    "pvt_v2": ("encoder", None),
    "hiera": ("encoder", None),
    "clip_vision": ("vision_model.encoder.layers.1.layer_norm1", 1),
    "siglip_vision": ("post_layernorm", 0),
    "clip": ("vision_model.encoder.layers.1.layer_norm1", 1),
    "siglip": ("vision_model.post_layernorm", 0),
    "siglip2": ("vision_model.post_layernorm", None),
}


def photographs(sides: tuple[tuple[int, int], ...] = ((317, 233), (211, 300))) -> list[Any]:
    """Smooth pictures with edges, of odd sides."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (23, 31, 3), dtype=np.uint8)
    return [Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC) for size in sides]


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def of_transformers(model: Any, given: Any) -> Tensor:
    """What the library itself makes of a processor's output, through its documented ways."""
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            return unit(model.get_image_features(**given).pooler_output)
        output = model(**given)
    found = next(
        (output[name] for name in ("image_embeds", "pooler_output") if name in output), None
    )
    return unit(output.last_hidden_state.mean((2, 3)) if found is None else found.flatten(1))


@pytest.mark.parametrize("name", LAYERS)
def test_models_of_transformers_are_found_whole(name: str) -> None:
    model, processor = made.model(name), made.processor(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network = EmbeddingNetwork.from_transformers(model, processor)
    layer, prefix = LAYERS[name]
    assert network.layer == layer
    pictures = photographs(((made.SIDE,) * 2,) * 2) if name == "siglip2" else photographs()
    # Called whole, the processor of SigLIP2 has a number of patches of its own.
    patches = {"max_num_patches": 16} if name == "siglip2" else {}
    given = processor(images=pictures, return_tensors="pt", **patches)
    mine = np.stack([network.preprocess(picture) for picture in pictures])
    if name == "siglip2":  # its pictures are patches
        embedding = network.forward(mine).embedding
        torch.testing.assert_close(embedding, of_transformers(model, given), rtol=0, atol=2e-2)
    else:
        theirs = given["pixel_values"]
        embedding = network.forward(theirs).embedding
        torch.testing.assert_close(embedding, of_transformers(model, given), rtol=0, atol=1e-5)
        levels = np.abs(mine - theirs.numpy()) * np.array(network.preprocess.std)[:, None, None]
        assert levels.max() * 255 < 2.5
    network.check()
    assert network.layout_options[2] == prefix
    # The layer's positions are those of the picture, each of which reaches the embedding.
    with network.head_pass(mine[:1]) as made_pass:
        # No direction that a norm at the end is blind to, as ones are.
        slopes = made_pass.vjp(torch.randn(made_pass.features.embedding.shape))
    assert bool(slopes.ne(0).any(1).all())
    # What was given is as it was.
    assert not any(part._forward_hooks or part.training for part in model.modules())
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "blip"])
def test_texts_of_transformers_are_theirs(name: str) -> None:
    model, processor = made.model(name), made.processor(name)
    network = EmbeddingNetwork.from_transformers(model, processor)
    # Theirs is as their documentation has it: SigLIP's towers want the whole length.
    whole = {"padding": "max_length", "max_length": 64 if name == "siglip2" else 16}
    given = {"padding": True} if name in ("clip", "blip") else whole
    with torch.no_grad():
        tokens = processor(text=TEXTS, return_tensors="pt", **given)
        expected = unit(model.get_text_features(**tokens).pooler_output).numpy()
    np.testing.assert_allclose(network.embed_texts(TEXTS), expected, rtol=0, atol=1e-5)
    one = network.embed_texts(TEXTS[:1])
    np.testing.assert_allclose(one, expected[:1], rtol=0, atol=1e-5)
    # Only the parts for pictures are the network.
    assert not any("text" in key for key in network.module.state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    for name in ("clip", "dinov2"):
        made.save(name, place / name)
    classifier = transformers.ViTForImageClassification(
        transformers.ViTConfig(**made.TRANSFORMERS["vit"][1])
    )
    classifier.save_pretrained(place / "classifier")
    made.processor("vit").save_pretrained(place / "classifier")
    return place


def test_folders_need_no_connection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download._request_wrapper", refuse, raising=False)
    monkeypatch.setattr("httpx.Client.send", refuse)
    network = load_network(f"hf:{folder / 'clip'}")
    by_hand = EmbeddingNetwork.from_transformers(made.model("clip"), made.processor("clip"))
    inputs = network.probe_images(2)
    torch.testing.assert_close(network.forward(inputs).embedding, by_hand.forward(inputs).embedding)
    np.testing.assert_allclose(network.embed_texts(TEXTS), by_hand.embed_texts(TEXTS), atol=1e-6)
    again = load_network(**json.loads(json.dumps(network.spec)))
    assert (again.layer, again.preprocess) == (network.layer, network.preprocess)
    first, same, other = (
        load_network(f"hf:{folder / 'dinov2'}", weights="random", seed=seed) for seed in (0, 0, 1)
    )
    embeddings = [one.forward(inputs).embedding for one in (first, same, other)]
    assert torch.equal(*embeddings[:2])
    assert not torch.allclose(embeddings[0], embeddings[2])


def test_a_pooler_without_weights_is_taken_off(folder: Path) -> None:
    network = load_network(f"hf:{folder / 'classifier'}")
    model = transformers.ViTModel.from_pretrained(
        folder / "classifier", add_pooling_layer=False
    ).eval()
    inputs = torch.from_numpy(network.probe_images(2))
    with torch.no_grad():
        expected = unit(model(inputs).last_hidden_state[:, 0])
    torch.testing.assert_close(network.forward(inputs).embedding, expected)


def test_another_size_and_a_head(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.eye(3, 32)}, tmp_path / "head.safetensors")
    network = load_network(
        f"hf:{folder / 'dinov2'}", size=(96, 48), head=tmp_path / "head.safetensors"
    )
    features = network.forward(network.probe_images(1))
    assert features.activations.shape == (1, 32, 12, 6)
    with torch.no_grad():
        model = made.model("dinov2")
        theirs = model(torch.from_numpy(network.probe_images(1))).pooler_output
    torch.testing.assert_close(features.embedding, unit(theirs[:, :3]))


def test_what_is_not_there_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "own").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder / "dinov2", tmp_path / "part", ignore=lambda *_: ["model.safetensors"])
    modules = [{"idx": 0, "name": "0", "path": "", "type": "custom.Module"}]
    (tmp_path / "own" / "modules.json").write_text(json.dumps(modules))
    for name, said in (
        ("hf:/nowhere/model", "names a folder that is not there"),
        ("hf:nobody/nothing", r"config.json of hf:nobody/nothing is neither here nor could it be"),
        ("st:nobody/nothing", r"st:nobody/nothing is neither here"),
        ("st:./nowhere", "st:./nowhere names a folder that is not there"),
        (f"hf:{tmp_path / 'empty'}", "empty has no config.json; give the folder that the whole"),
        (f"st:{tmp_path / 'empty'}", "empty has no modules.json; give"),
        (f"open_clip:{tmp_path / 'empty'}", "empty has no open_clip_config.json; give"),
        (f"hf:{tmp_path / 'part'}", "part does not hold the whole .*no file named model.safeten"),
        (f"st:{tmp_path / 'own'}", r"code that comes with it \(custom.Module\)"),
        ("open_clip:ViT-B32", r"no 'ViT-B32'; did you mean ViT-B-32"),
        ("open_clip:ViT-B-32", r"names no weights; give NAME:TAG with one of openai"),
        ("open_clip:ViT-B-32:opnai", r"knows no weights 'opnai'; did you mean openai"),
        ("open_clip:ViT-B-32:openai", r"openai is neither here nor"),
    ):
        with pytest.raises(NetworkError, match=said) as caught:
            load_network(name)
        assert "\n" not in str(caught.value)
    text = transformers.BertModel(transformers.BertConfig(**made._SMALL, hidden_size=32))
    with pytest.raises(NetworkError, match="takes 'input_ids', no pictures"):
        EmbeddingNetwork.from_transformers(text, made.processor("vit"))
    with pytest.raises(NetworkError, match="no encode_image"):
        EmbeddingNetwork.from_open_clip(nn.Identity(), lambda picture: picture)
    with pytest.raises(NetworkError, match=r"from_transformers\(model, processor\)"):
        EmbeddingNetwork(made.model("clip"), "vision_model")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(NetworkError, match="needs open-clip, which is not installed; run pip"):
        source.imported("open_clip", "open_clip:RN50")


@pytest.mark.parametrize("there", [False, True])
def test_the_hub_is_asked_where_it_can_be_connected_to(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    asked = []

    def load(local: bool) -> None:
        asked.append(local)
        raise KeyError("cached" if local else "fetched")

    def connect(*_: object) -> io.BytesIO:
        if not there:
            raise OSError("no route")
        return io.BytesIO()

    monkeypatch.setattr(source, "getproxies", dict)
    monkeypatch.setattr(source.socket, "create_connection", connect)
    why = "KeyError: 'fetched'" if there else "no connection to the hub"
    with pytest.raises(NetworkError, match=rf"{why}\); give the folder .* as in hf:\./folder"):
        source.fetched(load, "hf:a/b", "the whole")
    assert asked == [True, False][: 1 + there]


# open_clip

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
TRUNK = {"image_size": 64, "timm_model_pretrained": False, "timm_proj": "linear"}
OPEN_CLIP: dict[str, tuple[dict[str, Any], str, int | None]] = {
    "vit": ({"vision_cfg": VIT}, "visual.transformer.resblocks.1.ln_1", 1),
    "resnet": (
        {"vision_cfg": {"image_size": 64, "layers": [1] * 4, "width": 16, "patch_size": None}},
        "visual.layer4.0",
        None,
    ),
    "convnext": (
        {"vision_cfg": {**TRUNK, "timm_model_name": "test_convnext", "timm_pool": ""}},
        "visual.trunk.norm_pre",
        None,
    ),
    "mean": ({"vision_cfg": {**VIT, "pool_type": "avg"}}, "visual.ln_post", 1),
    "coca": (
        {
            "vision_cfg": {**VIT, **POOLED},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
            "custom_text": True,
        },
        "visual.transformer",
        1,
    ),
}


@pytest.fixture
def named(tmp_path: Path) -> Callable[[str], str]:
    def make(name: str) -> str:
        file = tmp_path / f"tiny-{name}.json"
        file.write_text(json.dumps({"embed_dim": 16, "text_cfg": TEXT, **OPEN_CLIP[name][0]}))
        open_clip.add_model_config(file)
        return file.stem

    return make


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_models_of_open_clip_are_found_whole(name: str, named: Callable[[str], str]) -> None:
    called = named(name)
    network = load_network(f"open_clip:{called}", weights="random")
    _, layer, prefix = OPEN_CLIP[name]
    assert (network.layer, network.layout_options[2]) == (layer, prefix)
    network.check()
    model, _, transform = open_clip.create_model_and_transforms(called)
    model.eval().load_state_dict(network.texts.module.state_dict())
    tokenizer = open_clip.get_tokenizer(called)
    inputs = torch.stack([transform(picture) for picture in photographs()])
    with torch.no_grad():
        pictures = model.encode_image(inputs, normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    torch.testing.assert_close(network.forward(inputs).embedding, pictures, rtol=0, atol=1e-5)
    np.testing.assert_allclose(network.embed_texts(TEXTS), texts, rtol=0, atol=1e-5)
    mine = np.stack([network.preprocess(picture) for picture in photographs()])
    assert isinstance(network.preprocess, Preprocess)
    np.testing.assert_allclose(mine, inputs, rtol=0, atol=1e-5)
    by_hand = EmbeddingNetwork.from_open_clip(model, transform, tokenizer)
    assert by_hand.layer == layer
    assert by_hand.preprocess == network.preprocess
    np.testing.assert_allclose(by_hand.embed_texts(TEXTS), texts, rtol=0, atol=1e-5)
    assert EmbeddingNetwork.from_open_clip(model, transform).texts is None


def test_weights_of_open_clip_in_a_file(named: Callable[[str], str], tmp_path: Path) -> None:
    called = named("vit")
    model = open_clip.create_model(called)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    inputs = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        expected = unit(model.eval().encode_image(inputs))
    by_tag = load_network(f"open_clip:{called}:{tmp_path / 'weights.pt'}")
    by_file = load_network(f"open_clip:{called}", weights=tmp_path / "weights.pt")
    for network in (by_tag, by_file):
        torch.testing.assert_close(network.forward(inputs).embedding, expected)


def test_a_whole_picture_between_bars(named: Callable[[str], str]) -> None:
    model = open_clip.create_model(named("vit")).eval()
    settings = open_clip.transform.PreprocessCfg(size=64, resize_mode="longest", fill_color=255)
    transform = open_clip.transform.image_transform_v2(settings, is_train=False)
    preprocess = EmbeddingNetwork.from_open_clip(model, transform).preprocess
    assert isinstance(preprocess, CustomPreprocess)
    # 200 x 100 becomes 64 x 32, between bars of 16 rows: 50 of the picture's.
    assert preprocess.extent(200, 100) == (0, -50, 200, 150)
    row = preprocess(Image.new("RGB", (200, 100)))[0, :, 32]
    assert np.flatnonzero(np.diff(row)).tolist() == [15, 47]


# sentence-transformers


@pytest.mark.parametrize("name", ["clip", "dinov2", "vit_dense"])
def test_models_of_sentence_transformers_are_found_whole(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    model: Any = made.sentences(name)
    model.save(str(tmp_path / "saved"), create_model_card=False)
    by_name = load_network(f"st:{tmp_path / 'saved'}")
    by_hand = EmbeddingNetwork.from_sentence_transformers(model)
    pictures = photographs(((made.SIDE,) * 2,) * 2)  # nothing to resize, so no rounding
    inputs = np.stack([by_hand.preprocess(picture) for picture in pictures])
    expected = unit(torch.from_numpy(model.encode(pictures)))
    for network in (by_name, by_hand):
        torch.testing.assert_close(network.forward(inputs).embedding, expected, rtol=0, atol=1e-5)
        if name == "clip":
            texts = model.encode(TEXTS, normalize_embeddings=True)
            np.testing.assert_allclose(network.embed_texts(TEXTS), texts, rtol=0, atol=1e-5)
        else:
            assert network.texts is None
    by_name.check()
    random = load_network(f"st:{tmp_path / 'saved'}", weights="random", seed=3)
    assert not torch.allclose(random.forward(inputs).embedding, expected, atol=1e-2)


def test_a_build_from_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from embedcam.cli import main

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(photographs(((80, 70), (90, 64), (70, 70), (64, 99)))):
        picture.rotate(90 * number).save(pictures / f"{number}.png")
    monkeypatch.chdir(folder)  # a folder named from here is found from anywhere
    assert main(["build", str(pictures), str(tmp_path / "index"), "--network", "hf:clip"]) == 0
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["network"]["loading"]["network"] == f"hf:{folder / 'clip'}"
    assert "Loading weights" not in capsys.readouterr().err
