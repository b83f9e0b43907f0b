"""LeGrad beside its authors' code; it pins an old open_clip, so it has an environment of its own.

python -m venv legrad && legrad/bin/pip install legrad_torch einops . pytest
"""

import warnings

import numpy as np
import pytest
import torch

from embedcam import Similarity, cam_for
from embedcam.network import EmbeddingNetwork

pytestmark = pytest.mark.peers


def test_legrad_is_its_authors_up_to_their_scaling(capsys) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        legrad = pytest.importorskip("legrad", exc_type=ImportError)
        open_clip = pytest.importorskip("open_clip")
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 48, "head_width": 16}
        text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
        model = open_clip.model.CLIP(
            16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)
        )
        for values in model.visual.parameters():
            torch.nn.init.normal_(values, 0.02, 0.3)
        image, reference = torch.randn(1, 3, 32, 32), torch.randn(1, 16)
        reference = reference / reference.norm()
        network = EmbeddingNetwork(model.eval().visual, "transformer.resblocks.2.ln_1")
        ours = cam_for(network, image, Similarity(reference[0].numpy()), "legrad", progress=False)
        theirs = legrad.LeWrapper(model, layer_index=0).compute_legrad(reference, image)
    grid = torch.from_numpy(ours.grid_cam)[None]
    resized = torch.nn.functional.interpolate(grid, scale_factor=8, mode="bilinear")[0, 0].numpy()
    scaled = (resized - resized.min()) / (resized.max() - resized.min())
    np.testing.assert_allclose(scaled, theirs.detach()[0, 0], atol=2e-5)
