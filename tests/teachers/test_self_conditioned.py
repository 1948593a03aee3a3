"""Self-conditioning of train_diffusion.py's network, and the network as a teacher.

Alone: python -m pytest tests/teachers/test_self_conditioned.py
"""

import json

import diffusers
import pytest
import torch
from data_helper import refused

import generate_synthetic
import train_diffusion
from common import diffusion, files
from published.datasets import DATASETS
from teachers.load import load_diffusion
from teachers.unet import EDMUNet

DIGITS = DATASETS["digits"]
TINY = "--train-steps 3 --channels 8 16 --batch-size 32 --eval-every 3".split()


def build(*flags, perturbed=False):
    """An untrained network of train_diffusion.py; perturbed: its projection is not 0."""
    torch.manual_seed(0)
    args = train_diffusion.parse_args([*TINY, "--layers-per-block", "2", *flags])
    args.val_size = DIGITS.val_size
    net = train_diffusion.build_network(DIGITS, args).eval()
    if perturbed:
        for parameter in net.self_conditioning.parameters():
            torch.nn.init.normal_(parameter)
    return net


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    return noisy.to(dtype), torch.tensor([0.05, 1.0, 20.0], dtype=dtype), torch.tensor([3, 0, 10])


def denoised(net, dtype=torch.float32):
    noisy, sigma, labels = inputs(dtype)
    return diffusion.edm_denoise(net, noisy, sigma, labels, 0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory of three training steps."""
    out = tmp_path_factory.mktemp("self-conditioned") / "net"
    argv = [*TINY, "--self-conditioning", "--out-dir", str(out)]
    train_diffusion.main(train_diffusion.parse_args(argv))
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_it_starts_as_the_plain_network(precision):
    """To the bit, also in its gradients."""
    plain, conditioned = build(), build("--self-conditioning")
    gradients = []
    results = []
    for net in (plain, conditioned):
        net.to(memory_format=torch.channels_last)
        if precision == "bf16":
            net.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            output = denoised(net)
        output.sum().backward()
        results.append(output)
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert torch.equal(*results)
    own = gradients[1].keys() - gradients[0].keys()
    assert own == {"self_conditioning.weight", "self_conditioning.bias"}
    assert all(gradients[1][name].abs().max() > 0 for name in own)
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_the_decoder_is_told_what_the_middle_found():
    """The plain network of diffusers, whose up blocks get emb + W h + b by hooks; by loops."""
    net = build("--self-conditioning", perturbed=True).double()
    weights = net.state_dict()
    weight, bias = weights.pop("self_conditioning.weight"), weights.pop("self_conditioning.bias")
    plain = build().double()
    plain.load_state_dict(weights)
    without = denoised(plain, torch.float64)
    added = []

    def look(module, args, output):
        added.append(torch.zeros(len(output), len(bias), dtype=torch.float64))
        for image in range(len(output)):
            for unit in range(len(bias)):
                total = bias[unit]
                for channel in range(output.shape[1]):
                    total = total + weight[unit, channel] * output[image, channel].mean()
                added[0][image, unit] = total

    def tell(module, args):
        h, skips, emb = args
        return h, skips, emb + added[0]

    with torch.no_grad():
        plain.mid_block.register_forward_hook(look)
        for block in plain.up_blocks:
            block.register_forward_pre_hook(tell)
        expected = denoised(plain, torch.float64)
        assert torch.allclose(denoised(net, torch.float64), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(without, expected, rtol=1e-3)


def test_the_gradient_flows_through_what_the_middle_found():
    """Against finite differences: an encoder weight moves the output through h as well."""
    net = build("--self-conditioning", perturbed=True).double()
    weight = net.mid_block.resnets[1].conv2.weight
    output = denoised(net, torch.float64).square().sum()
    (gradient,) = torch.autograd.grad(output, weight)
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight[0, 0, 1, 1] += step
            ends.append(denoised(net, torch.float64).square().sum().item())
            weight[0, 0, 1, 1] -= step
    assert gradient[0, 0, 1, 1].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_features_of_the_decoder_depend_on_it_and_leave_no_trace():
    model = EDMUNet(build("--self-conditioning", perturbed=True))
    plain = EDMUNet(build())
    noise, _, _ = inputs()
    x = torch.rand(3, 1, 8, 8)
    blocks = ["mid_block", "up_blocks.0.resnets.0", "up_blocks.1.resnets.1"]
    with torch.no_grad():
        before = denoised(model.net)
        found = model.features(x, 0.1, None, blocks, noise)
        others = plain.features(x, 0.1, None, blocks, noise)
        model.features(x[:1] / 2, 3.0, None, ["mid_block"], noise[:1])
        again = model.features(x, 0.1, None, blocks, noise)
        assert torch.equal(denoised(model.net), before)
    assert [torch.equal(a, b) for a, b in zip(found, others)] == [True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_what_was_written_is_opened(trained, tmp_path):
    """The averaged network: the same outputs, for features, images and as a start."""
    net = build("--self-conditioning", "--layers-per-block", "1")
    net.load_state_dict(files.load(trained / "last.pt", {})["ema"])
    net.to(memory_format=torch.channels_last)
    model = load_diffusion(str(trained), "cpu")
    assert model.net.self_conditioning.weight.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(denoised(model.net), denoised(net))
    assert (model.num_classes, model.label_dropout, model.val_size) == (10, 0.1, 200)
    assert len(load_diffusion(str(trained), "cpu", "bf16").sha256) == 64
    argv = ["--diffusion", str(trained), "--n-images", "20", "--n-steps", "2"]
    argv += ["--out-dir", str(tmp_path / "set")]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    assert (tmp_path / "set" / "manifest.json").exists()
    argv = [*TINY, "--init", str(trained), "--out-dir", str(tmp_path / "on")]
    words = "another network, one of them alone is of --self-conditioning"
    refused(lambda: train_diffusion.main(train_diffusion.parse_args(argv)), words)
    train_diffusion.main(train_diffusion.parse_args([*argv, "--self-conditioning"]))


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "UNet2DModel",
            "weights do not fit the settings (unexpected keys: self_conditioning.bias)",
        ),
        ("SelfConditioned", "config.json: a SelfConditioned, expected a UNet2DModel"),
        (7, "config.json: a 7, expected a UNet2DModel"),
        (["SelfConditionedUNet"], "expected a UNet2DModel"),
        (None, "config.json: no diffusers network, expected a UNet2DModel"),
    ],
)
def test_a_damaged_class_is_one_line(name, words, trained, tmp_path):
    config = json.loads((trained / "config.json").read_text()) | {"_class_name": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(trained / weights)
    refused(lambda: load_diffusion(str(tmp_path), "cpu"), words)


@pytest.mark.parametrize(
    "entry, value",
    [("mid_block_type", None), ("block_out_channels", [8]), ("num_class_embeds", None)]
    + [("time_embedding_dim", 5), ("down_block_types", ["SkipDownBlock2D"] * 2)],
)
def test_damaged_settings_are_one_line(entry, value, trained, tmp_path):
    config = json.loads((trained / "config.json").read_text()) | {entry: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(trained / weights)
    refused(lambda: load_diffusion(str(tmp_path), "cpu"), str(tmp_path))


def test_weights_of_a_plain_network_do_not_fit(diffusion_dir, trained, tmp_path):
    (tmp_path / "config.json").symlink_to(trained / "config.json")
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).symlink_to(f"{diffusion_dir}/{name}")
    words = "weights do not fit the settings (missing keys: self_conditioning.bias)"
    refused(lambda: load_diffusion(str(tmp_path), "cpu"), words)


def test_diffusers_alone_says_what_it_lacks(trained):
    """It opens the plain part, and names what it leaves out."""
    _, info = diffusers.UNet2DModel.from_pretrained(str(trained), output_loading_info=True)
    keys = {"self_conditioning.weight", "self_conditioning.bias"}
    assert set(info["unexpected_keys"]) == keys
