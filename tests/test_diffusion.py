"""EDM preconditioning, loss and sampler against formulae; features without the rest of the network.

Alone: python -m pytest tests/test_diffusion.py
"""

import math

import diffusers
import numpy as np
import pytest
import torch

import extract_features
import generate_synthetic
import train_diffusion
from common import cli, data, diffusion


def tiny_net(classes=3, **kwargs):
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownBlock2D", "AttnDownBlock2D"], up_block_types=["AttnUpBlock2D", "UpBlock2D"])
    size = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=2)
    net = diffusers.UNet2DModel(num_class_embeds=classes + 1, attention_head_dim=8, **size, **blocks, **kwargs)
    net.register_to_config(sigma_data=0.5, label_dropout=0.1)
    return net.double().eval()


def noisy_batch(n=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0.03, 1.0, 30.0][:n], dtype=torch.float64)


def test_preconditioning_is_edms():
    """D = c_skip x + c_out F(c_in x; ln(sigma)/4), table 1 of the paper, image by image."""
    net, (noisy, sigmas), sd = tiny_net(), noisy_batch(), 0.5
    labels = torch.tensor([0, 2, 3])
    with torch.no_grad():
        fast = diffusion.edm_denoise(net, noisy, sigmas, labels, sd)
        for i, sigma in enumerate(sigmas.tolist()):
            c_skip = sd**2 / (sigma**2 + sd**2)
            c_out = sigma * sd / math.sqrt(sigma**2 + sd**2)
            c_in = 1 / math.sqrt(sigma**2 + sd**2)
            c_noise = torch.tensor(math.log(sigma) / 4, dtype=torch.float64)
            raw = net(c_in * noisy[i : i + 1], c_noise, class_labels=labels[i : i + 1]).sample
            assert torch.allclose(fast[i], (c_skip * noisy[i : i + 1] + c_out * raw)[0], rtol=1e-10, atol=1e-12)


def test_loss_is_edms():
    """The weighted loss is the plain squared error between F and its effective target (paper, equation 8)."""
    net, (noise, _), sd = tiny_net(), noisy_batch(), 0.5
    x, labels = torch.rand_like(noise) * 2 - 1, torch.tensor([0, 1, 3])
    normal = torch.tensor([-1.0, 0.2, 2.5], dtype=torch.float64)
    with torch.no_grad():
        losses = train_diffusion.edm_loss(net, x, labels, normal, noise, -1.2, 1.2, sd)
        for i in range(3):
            sigma = math.exp(-1.2 + 1.2 * normal[i].item())
            c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2)
            noisy = x[i : i + 1] + sigma * noise[i : i + 1]
            raw = net(
                noisy / math.sqrt(sigma**2 + sd**2), torch.tensor(math.log(sigma) / 4).double(), class_labels=labels[i : i + 1]
            ).sample
            target = (x[i : i + 1] - c_skip * noisy) / c_out
            assert math.isclose(losses[i].item(), (raw - target).pow(2).mean().item(), rel_tol=1e-9)


def test_labels_are_dropped_at_the_rate_asked_for():
    args = train_diffusion.parse_args(["--label-dropout", "0.3"])
    y = torch.arange(5000) % 10
    labels, normal, noise = train_diffusion.draw(args, 7, y, (5000, 1, 2, 2), 10, "cpu")
    dropped = labels == 10
    assert abs(dropped.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 5000)
    assert torch.equal(labels[~dropped], y[~dropped])
    assert abs(normal.mean()) < 0.06 and abs(noise.std() - 1) < 0.02


def gaussian_denoiser(std):
    """The exact denoiser of N(0, std^2) data: E[x | noisy]."""
    return lambda noisy, sigma: noisy * (std**2 / (std**2 + sigma**2))


def heun_error(n_steps, std=0.6):
    """Relative error of the sampler against the analytic solution x(0) = x(sigma_max) * std / sqrt(std^2 + sigma_max^2)."""
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampled = diffusion.heun(gaussian_denoiser(std), noise, diffusion.sigma_steps(n_steps, 0.002, 80, 7))
    exact = noise * 80 * std / math.sqrt(std**2 + 80**2)
    return ((sampled - exact).norm() / exact.norm()).item()


def test_heun_solves_the_gaussian_case_at_second_order():
    errors = [heun_error(n) for n in (32, 64, 128)]
    assert errors[2] < 1e-3
    for coarse, fine in zip(errors, errors[1:]):
        assert 3.5 < coarse / fine < 4.5  # halving the step quarters the error


def test_heun_calls_the_network_2n_minus_1_times():
    calls = []
    denoise = gaussian_denoiser(0.5)
    diffusion.heun(lambda x, s: calls.append(s) or denoise(x, s), torch.ones(1, 1, 1, 1), diffusion.sigma_steps(18, 0.002, 80, 7))
    assert len(calls) == 35 and calls[0] == pytest.approx(80) and calls[-1] == pytest.approx(0.002)


def test_churned_samples_keep_the_distribution():
    std, n = 0.6, 40_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    sampled = diffusion.heun(
        gaussian_denoiser(std),
        noise,
        diffusion.sigma_steps(256, 0.002, 80, 7),
        churn=20,
        churn_range=(0.05, 50),
        fresh_noise=lambda: torch.randn(noise.shape, generator=generator, dtype=torch.float64),
    )
    assert abs(sampled.std() - std) < 4 * std / math.sqrt(2 * n)
    assert abs(np.corrcoef(sampled.flatten(), noise.flatten())[0, 1]) < 0.95  # fresh noise did go in


def test_noise_levels_are_those_of_diffusers():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, rho=7)
    scheduler.set_timesteps(18)
    assert torch.allclose(diffusion.sigma_steps(18, 0.002, 80, 7), scheduler.sigmas.double(), rtol=1e-5)


def test_diffusers_own_euler_agrees(diffusion_dir):
    """First-order sampling by diffusers' scheduler and ours coincide on a saved network: same scale, same preconditioning."""
    model = diffusion.load_diffusion(diffusion_dir, "cpu")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=model.net.config.sigma_data, rho=7)
    scheduler.set_timesteps(5)
    y, noise = torch.tensor([1, 2]), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = noise * scheduler.sigmas[0]
    ours = theirs.clone()
    sigmas = diffusion.sigma_steps(5, 0.002, 80, 7).tolist()
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            raw = model.net(scheduler.scale_model_input(theirs, t), t, class_labels=y).sample
            theirs = scheduler.step(raw, t, theirs).prev_sample
            ours = ours + (sigmas[i + 1] - sigmas[i]) * (ours - model.denoise(ours, sigmas[i], y)) / sigmas[i]
    assert torch.allclose(ours, theirs, atol=2e-4)


def test_diffusers_loads_what_training_saved(diffusion_dir):
    net = diffusers.UNet2DModel.from_pretrained(diffusion_dir)
    model = diffusion.load_diffusion(diffusion_dir, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model.net.parameters()))
    assert (model.num_classes, model.image_size, model.channels, model.label_dropout) == (10, 8, 1, 0.1)
    assert not any(p.requires_grad for p in model.net.parameters()) and not model.net.training


def test_no_label_is_the_null_label():
    model, (noisy, sigmas) = diffusion.EDMUNet(tiny_net()), noisy_batch()
    with torch.no_grad():
        assert torch.equal(model.denoise(noisy, sigmas), model.denoise(noisy, sigmas, torch.full((3,), 3)))
        assert not torch.equal(model.denoise(noisy, sigmas), model.denoise(noisy, sigmas, torch.zeros(3, dtype=torch.long)))


def test_guidance_extrapolates_from_the_unconditional_denoiser():
    model, (noisy, _) = diffusion.EDMUNet(tiny_net()), noisy_batch()
    y = torch.tensor([0, 1, 2])
    with torch.no_grad():
        with_label, without = model.denoise(noisy, 0.7, y), model.denoise(noisy, 0.7)
        assert torch.equal(generate_synthetic.guided(model, y, 1)(noisy, 0.7), with_label)
        assert torch.allclose(generate_synthetic.guided(model, y, 2.5)(noisy, 0.7), without + 2.5 * (with_label - without), atol=1e-10)
        assert torch.allclose(generate_synthetic.guided(model, y, 0)(noisy, 0.7), without, atol=1e-10)


def test_blocks_are_listed_in_the_order_they_run():
    net, ran = tiny_net(), []
    names = diffusion.unet_blocks(net)
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
    noisy, sigmas = noisy_batch()
    diffusion.EDMUNet(net).denoise(noisy, sigmas)
    assert ran == names
    assert "down_blocks.1.attentions.0" in names and "up_blocks.0.attentions.2" in names


def test_features_equal_a_whole_pass_and_skip_the_rest():
    net = tiny_net()
    model, calls, whole = diffusion.EDMUNet(net), [], {}
    x, noise = torch.rand(3, 1, 8, 8, dtype=torch.float64), noisy_batch()[0]
    watched = [(n, m) for n, m in net.named_modules() if not list(m.children())]
    for name, module in watched:
        module.register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    asked = ["up_blocks.0.resnets.1", "mid_block"]  # not in the order they run
    with torch.no_grad():
        hooks = [net.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: whole.update({n: o})) for n in asked]
        model.denoise(2 * x - 1 + 0.4 * noise, 0.4)
        n_whole, later = len(calls), "up_blocks.1.resnets.0.norm1"
        assert later in calls and "conv_out" in calls
        for hook in hooks:
            hook.remove()
        calls.clear()
        features = model.features(x, 0.4, None, asked, noise)
    assert later not in calls and "conv_out" not in calls and len(calls) < n_whole
    for name, feature in zip(asked, features):
        assert torch.equal(feature, whole[name].mean((2, 3)))
    assert not any(m._forward_hooks for n, m in net.named_modules() if n in asked)  # no hook is left behind
    assert [f.shape[1] for f in features] == [16, 16]


def test_samples_depend_on_seed_id_and_churn_and_on_nothing_else(diffusion_dir):
    model = diffusion.load_diffusion(diffusion_dir, "cpu")

    def sample(ids, *argv):
        args = generate_synthetic.parse_args(["--diffusion", diffusion_dir, "--n-steps", "4", *argv])
        return generate_synthetic.sample(model, np.array(ids), args)[0].astype(int)

    base = sample([3, 4, 13])
    assert np.abs(sample([4]) - base[1:2]).max() <= 1  # alone or in a batch, up to rounding
    assert (base[0] != base[2]).any()  # two images of one class
    assert (sample([3], "--seed", "1") != base[:1]).any()
    churned = sample([3], "--s-churn", "20")
    assert (churned != base[:1]).any() and (churned == sample([3], "--s-churn", "20")).all()
    assert (sample([3], "--s-churn", "20", "--s-tmin", "90", "--s-tmax", "100") == base[:1]).all()  # no noise level lies there
    assert (sample([3], "--s-churn", "20", "--s-noise", "1.5") != churned).any()


def test_nearest_distances_are_those_of_a_slow_search():
    rng = np.random.default_rng(0)
    images, train = (rng.integers(0, 256, (n, 3, 3, 2), dtype=np.uint8) for n in (1100, 7))
    train[2] = images[5]
    slow = [min(np.sqrt((((a / 255.0) - (b / 255.0)) ** 2).sum()) for b in train) for a in images[:50]]
    fast = generate_synthetic.nearest_distances(images, train, "cpu")
    assert fast.shape == (1100,) and fast[:50].numpy() == pytest.approx(slow, abs=2e-3) and fast[5] < 2e-3


def test_memorisation_is_judged_by_the_images_trained_on(diffusion_dir, tmp_path, capsys):
    """Those after the held-out ones, and with --n-train only so many: the nearest of fewer images are farther."""
    spec, means = data.DATASETS["digits"], []
    for n_train in (None, 50):
        argv = ["--diffusion", diffusion_dir, "--n-images", "20", "--n-steps", "2", "--val-size", "300"]
        argv += ["--out-dir", str(tmp_path / str(n_train)), *(["--n-train", "50"] if n_train else [])]
        generate_synthetic.main(generate_synthetic.parse_args(argv))
        (train, _), _ = data.load_train(spec, "data", 300, n_train)
        means.append(generate_synthetic.nearest_distances(data.load_test(spec, "data")[0], train, "cpu").mean())
        assert f"test images {means[-1]:.3f};" in capsys.readouterr().out
    assert means[1] > means[0] + 0.1


def test_stored_features_are_those_of_a_direct_call(diffusion_dir, tmp_path):
    argv = [
        "--diffusion",
        diffusion_dir,
        "--blocks",
        "mid_block",
        "--sigmas",
        "0.3",
        "--batch-size",
        "100",
        "--n-draws",
        "2",
        "--out-dir",
        str(tmp_path / "f"),
    ]
    extract_features.main(extract_features.parse_args(argv))
    stored = np.load(tmp_path / "f" / "test-mid_block-sigma0.3.npy")
    model = diffusion.load_diffusion(diffusion_dir, "cpu")
    images, labels = data.load_test(data.DATASETS["digits"], None)
    ids = [0, 99, 100, 796]
    assert stored.shape == (797, 2, 16)
    streams = data.id_streams(0, "features-test", ids)
    for draw in (0, 1):
        noise = data.normal_of(streams, (1, 8, 8))
        direct = model.features(data.to_x(images[ids]), 0.3, None, ["mid_block"], noise)[0].numpy()
        assert stored[ids, draw] == pytest.approx(direct, abs=1e-5)
    assert np.abs(stored[:, 0] - stored[:, 1]).max() > 1e-3
    assert np.array_equal(np.load(tmp_path / "f" / "test-labels.npy"), labels)


def test_extraction_goes_on_batch_by_batch(diffusion_dir, tmp_path, monkeypatch):
    """Cut in the fifth batch, then under another set of blocks: nothing that is written is computed again, and the bytes are the same."""
    calls, real = [], extract_features.features_of

    def run(out, *blocks, stop=1000):
        def counted(model, images, ids, split, *args):
            calls.append(split)
            if len(calls) == stop:
                raise ZeroDivisionError
            return real(model, images, ids, split, *args)

        calls.clear()
        monkeypatch.setattr(extract_features, "features_of", counted)
        argv = [
            "--diffusion",
            diffusion_dir,
            "--blocks",
            *blocks,
            "--sigmas",
            "0.3",
            "--batch-size",
            "100",
            "--out-dir",
            str(tmp_path / out),
        ]
        extract_features.main(extract_features.parse_args(argv))

    run("whole", "mid_block", "up_blocks.0.resnets.0")
    assert calls.count("train") == 1 + 8  # one image for the width
    with pytest.raises(ZeroDivisionError):
        run("cut", "mid_block", stop=6)
    run("cut", "mid_block", "up_blocks.0.resnets.0")
    assert calls.count("train") == 1 + 8  # for the other block
    with pytest.raises(ZeroDivisionError):
        run("again", "mid_block", "up_blocks.0.resnets.0", stop=6)
    run("again", "mid_block", "up_blocks.0.resnets.0")
    assert calls.count("train") == 1 + 4
    with pytest.raises(ZeroDivisionError):
        run("lost", "mid_block", stop=6)
    for path in (tmp_path / "lost").glob("train-*0.3.npy.writing"):
        path.unlink()  # its flags are of no use then
    run("lost", "mid_block")
    assert (tmp_path / "lost" / "train-mid_block-sigma0.3.npy").read_bytes() == (
        tmp_path / "whole" / "train-mid_block-sigma0.3.npy"
    ).read_bytes()
    for path in (tmp_path / "whole").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    monkeypatch.setattr(extract_features, "features_of", real)
    (tmp_path / "again" / "test-mid_block-sigma0.3.npy").unlink()
    np.save(tmp_path / "again" / "x.npy", np.zeros(3))
    (tmp_path / "again" / "x.npy").rename(tmp_path / "again" / "test-mid_block-sigma0.3.npy.writing")
    with pytest.raises(cli.UserError, match=r"sigma0.3.npy.writing: found float64 \(3,\), expected float32"):
        run("again", "mid_block")
