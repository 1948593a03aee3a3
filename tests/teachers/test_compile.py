"""--compile of a teacher: equal features, whole graphs, and none compiled anew in later steps.

Alone: python -m pytest tests/teachers/test_compile.py
"""

from functools import partial

import pytest
import torch
from diffusers_helper import tiny_ddpm, tiny_dit, tiny_unet
from edm2_helper import EDM2_CONFIGS, edm2_dir, random_edm2
from edm_helper import random_edm
from flow_helper import jit_checkpoint, jit_tensors, sit_tensors, tiny_vae

from teachers import jit, sit
from teachers.edm import EDMNetwork
from teachers.edm2 import EDM2
from teachers.load import freeze, load_diffusion


def opened(family, folder, diffusion_dir):
    """A small teacher of a family, with random weights."""
    path = str(folder / "out")
    if family == "train_diffusion.py":
        return load_diffusion(diffusion_dir, "cpu")
    if family in ("EDM2", "ADM"):
        net = EDM2(random_edm2(EDM2_CONFIGS["pixels"], torch.float32))
        if family == "ADM":
            net = EDMNetwork(random_edm("adm", torch.float32))
        freeze(net, "cpu")
        return net
    if family == "EDM2 on latents":
        path = edm2_dir(folder / "edm2", EDM2_CONFIGS["latents"])
    if family == "DDPM":
        tiny_ddpm(path, tiny_unet(num_class_embeds=None))
    if family == "DiT":
        tiny_dit(path)
    if family == "SiT":
        tiny_vae(folder / "vae")
        torch.save(sit_tensors(), folder / "SiT.pt")
        sit.convert(str(folder / "SiT.pt"), str(folder / "vae"), path)
    if family == "JiT":
        torch.save(jit_checkpoint(jit_tensors()), folder / "JiT.pth")
        jit.convert(str(folder / "JiT.pth"), path)
    return load_diffusion(path, "cpu")


@torch.no_grad()
def features(model, step):
    """Of the three images of a step, at the default block and at the first."""
    torch.manual_seed(step)
    x = torch.rand(3, model.channels, model.image_size, model.image_size)
    noise = torch.randn(3, *model.noise_shape)
    feats = []
    for block in (model.default_block, model.blocks[0]):
        feats += model.features(x, model.default_sigma, None, [block], noise)
    return feats


def assert_close(found, expected):
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


FAMILIES = ["train_diffusion.py", "DDPM", "ADM", "EDM2", "EDM2 on latents", "DiT", "SiT", "JiT"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_whole_graphs(family, tmp_path, diffusion_dir, monkeypatch):
    """The tracer is the real one; its backend runs eagerly. A break would be an error."""
    model = opened(family, tmp_path, diffusion_dir)
    expected = [features(model, step) for step in range(4)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=eager, fullgraph=True))
    model.compile()
    assert_close(features(model, 0), expected[0])
    n_graphs = len(graphs)
    assert 0 < n_graphs <= len(model.blocks) + 1
    has_vae = family in ("EDM2 on latents", "DiT", "SiT")
    assert len(model.modules) == 1 + has_vae
    # An instance has a forward of its own where it is compiled.
    assert all("forward" in vars(vae.encoder) for vae in model.modules[1:])
    for step in (1, 2, 3):
        assert_close(features(model, step), expected[step])
    assert len(graphs) == n_graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_the_real_compiler_gives_equal_features(tmp_path, diffusion_dir):
    model = opened("JiT", tmp_path, diffusion_dir)
    expected = features(model, 0)
    model.compile()
    assert_close(features(model, 0), expected)
