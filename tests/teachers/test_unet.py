"""The UNet2DModel of train_diffusion.py as a teacher, and features without the rest of a network.

Alone: python -m pytest tests/teachers/test_unet.py
"""

import diffusers
import pytest
import torch

from teachers import sampling
from teachers.load import load_diffusion
from teachers.unet import EDMUNet, unet_blocks


@pytest.fixture
def net():
    """An untrained network for three classes, in float64."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=[8, 16],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        norm_num_groups=4,
        layers_per_block=2,
        attention_head_dim=8,
        num_class_embeds=4,
    )
    net.register_to_config(sigma_data=0.5, label_dropout=0.1)
    return net.double().eval()


def normal(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)


def test_diffusers_own_euler_agrees(diffusion_dir):
    """First-order sampling by diffusers' scheduler and by ours coincide on a saved network."""
    model = load_diffusion(diffusion_dir, "cpu")
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=model.net.config.sigma_data, rho=7
    )
    scheduler.set_timesteps(5)
    y = torch.tensor([1, 2])
    x = normal(2).float() * scheduler.sigmas[0]
    x_diffusers = x.clone()
    sigmas = sampling.sigma_steps(5, 0.002, 80, 7).tolist()
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x_diffusers, t)
            output = model.net(scaled, t, class_labels=y).sample
            x_diffusers = scheduler.step(output, t, x_diffusers).prev_sample
            slope = (x - model.denoise(x, sigmas[i], y)) / sigmas[i]
            x = x + (sigmas[i + 1] - sigmas[i]) * slope
    assert torch.allclose(x, x_diffusers, atol=2e-4)


def test_diffusers_loads_what_training_saved(diffusion_dir):
    net = diffusers.UNet2DModel.from_pretrained(diffusion_dir)
    model = load_diffusion(diffusion_dir, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model.net.parameters()))
    assert (model.num_classes, model.image_size, model.channels) == (10, 8, 1)
    assert model.label_dropout == 0.1
    assert not model.net.training and not any(p.requires_grad for p in model.net.parameters())


def test_no_label_is_the_null_label(net):
    model = EDMUNet(net)
    noisy, sigmas = normal(3), torch.tensor([0.03, 1.0, 30.0])
    null = torch.full((3,), 3)
    with torch.no_grad():
        unlabelled = model.denoise(noisy, sigmas)
        assert torch.equal(unlabelled, model.denoise(noisy, sigmas, null))
        assert not torch.equal(unlabelled, model.denoise(noisy, sigmas, torch.zeros_like(null)))


def test_blocks_are_listed_in_the_order_they_run(net):
    ran = []
    names = unet_blocks(net)
    for name in names:

        def hook(module, inputs, output, name=name):
            ran.append(name)

        net.get_submodule(name).register_forward_hook(hook)
    EDMUNet(net).denoise(normal(3), 1.0)
    assert ran == names
    assert "down_blocks.1.attentions.0" in names and "up_blocks.0.attentions.2" in names


def test_features_equal_a_whole_pass_and_skip_the_rest(net):
    model = EDMUNet(net)
    ran = []
    outputs = {}
    for name, module in net.named_modules():

        def hook(module, inputs, output, name=name):
            ran.append(name)
            outputs[name] = output

        module.register_forward_hook(hook)
    n_hooks = sum(len(module._forward_hooks) for module in net.modules())
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    noise = normal(3)
    blocks = ["up_blocks.0.resnets.1", "mid_block"]  # not in the order they run
    later = {"up_blocks.1.resnets.0.norm1", "conv_out"}
    with torch.no_grad():
        model.denoise(2 * x - 1 + 0.4 * noise, 0.4)
        assert later <= set(ran)
        expected = [outputs[name].mean((2, 3)) for name in blocks]
        ran.clear()
        features = model.features(x, 0.4, None, blocks, noise)
    assert not later & set(ran)
    assert all(torch.equal(a, b) for a, b in zip(features, expected))
    assert [feature.shape for feature in features] == [(3, 16), (3, 16)]
    assert sum(len(module._forward_hooks) for module in net.modules()) == n_hooks
