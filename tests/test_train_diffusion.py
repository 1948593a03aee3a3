"""train_diffusion.py: its loss against the paper's formula, and its randomness.

Alone: python -m pytest tests/test_train_diffusion.py
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import read_log
from diffusers_helper import tiny_ddpm

import train_diffusion
from common import UserError, data, files
from generate_synthetic import check_generates
from published.datasets import DATASETS
from teachers.load import load_diffusion

DIGITS = DATASETS["digits"]
TINY = "--train-steps 2 --channels 8 16 --batch-size 64".split()


def train(out, *flags):
    """Two steps on digits, and the network that they leave."""
    train_diffusion.main(train_diffusion.parse_args([*TINY, "--out-dir", str(out), *flags]))
    return load_diffusion(str(out), "cpu")


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """A network trained without any label, on squares of 2 x 2 pixels: (directory, model)."""
    out = tmp_path_factory.mktemp("unlabelled") / "net"
    return str(out), train(out, "--n-labels", "0", "--patch", "2", "--imbalance", "4")


def test_loss_is_edms():
    """The weighted loss is the squared error between F and its target (paper, equation 8)."""
    args = train_diffusion.parse_args(["--channels", "8", "16"])
    spec = dataclasses.replace(DATASETS["digits"], num_classes=3)
    torch.manual_seed(0)
    net = train_diffusion.build_network(spec, args).double().eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3])
    normal = torch.tensor([-1.0, 0.2, 2.5], dtype=torch.float64)
    sd = 0.5
    with torch.no_grad():
        losses = train_diffusion.edm_loss(net, x, labels, normal, noise, args)
        for i in range(3):
            sigma = math.exp(-1.2 + 1.2 * normal[i].item())
            root = math.sqrt(sigma**2 + sd**2)
            c_skip = sd**2 / root**2
            c_out = sigma * sd / root
            c_noise = torch.tensor(math.log(sigma) / 4, dtype=torch.float64)
            noisy = x[i : i + 1] + sigma * noise[i : i + 1]
            output = net(noisy / root, c_noise, class_labels=labels[i : i + 1]).sample
            target = (x[i : i + 1] - c_skip * noisy) / c_out
            expected = (output - target).pow(2).mean().item()
            assert math.isclose(losses[i].item(), expected, rel_tol=1e-9)


def test_the_rate_and_the_average_at_every_step():
    args = train_diffusion.parse_args(
        "--train-steps 1000 --warmup-steps 100 --lr 1 --ema-decay 0.9".split()
    )
    for step in range(1000):
        expected = min(1, (step + 1) / 100) * math.cos(math.pi * step / 2000) ** 2
        assert train_diffusion.lr_at(step, args) == pytest.approx(expected)
    decays = [train_diffusion.ema_decay_at(step, args) for step in range(1, 1001)]
    assert decays == pytest.approx([min(0.9, step / (9 + step)) for step in range(1, 1001)])


def test_validation_is_of_the_average_on_held_out_images(tmp_path):
    train(tmp_path, "--val-size", "50")
    (line,) = read_log(tmp_path)
    args = train_diffusion.parse_args([*TINY, "--val-size", "50"])
    net = train_diffusion.build_network(DIGITS, args).eval()
    state = files.load(tmp_path / "last.pt", {"ema": dict, "net": dict})
    _, (images, labels) = data.load_train(DIGITS, None, 50)
    generator = data.stream(0, "edm-validation", 0)
    normal = torch.randn(50, generator=generator)
    noise = torch.randn(50, 1, 8, 8, generator=generator)
    y = torch.from_numpy(labels)
    found = {}
    for name in ("ema", "net"):
        net.load_state_dict(state[name])
        with torch.no_grad():
            x = 2 * data.to_x(images) - 1
            found[name] = train_diffusion.edm_loss(net, x, y, normal, noise, args).mean().item()
    assert line["val_loss"] == pytest.approx(found["ema"], rel=1e-5)
    assert abs(found["net"] / found["ema"] - 1) > 1e-4


def test_labels_are_dropped_at_the_rate_asked_for():
    args = train_diffusion.parse_args(["--label-dropout", "0.3"])
    args.batch_size = 5000
    x, y = torch.zeros(5000, 1, 2, 2), torch.arange(5000) % 10
    labels, normal, noise = train_diffusion.draw(7, x, y, slice(None), 10, args)
    dropped = labels == 10
    assert abs(dropped.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 5000)
    assert torch.equal(labels[~dropped], y[~dropped])
    assert abs(normal.mean()) < 0.06 and abs(noise.std() - 1) < 0.02


def test_the_first_images_alone_have_labels(tmp_path, monkeypatch):
    """Of the training images that are not held out; the others have the null label, 10."""
    (images, labels), _ = data.load_train(DIGITS, None, DIGITS.val_size)
    label_of = {images[i].tobytes(): int(labels[i]) if i < 30 else 10 for i in range(len(images))}
    seen = []
    real = train_diffusion.edm_loss

    def edm_loss(net, x, labels, *args):
        pixels = ((x + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        seen.extend((label_of.get(image.tobytes()), int(y)) for image, y in zip(pixels, labels))
        return real(net, x, labels, *args)

    monkeypatch.setattr(train_diffusion, "edm_loss", edm_loss)
    flags = ["--n-labels", "30", "--label-dropout", "0", "--eval-every", "99"]
    train(tmp_path / "out", *flags, "--train-steps", "20")
    training = seen[: 20 * 64]  # then come the held-out images
    assert all(expected == y for expected, y in training)
    assert {y for _, y in training} == set(range(11))


@pytest.mark.parametrize("n_labels, n_rows", [(0, 100), (3, 100 + 31 * 3), (40, 100), (100, 100)])
def test_images_with_labels_are_about_half(n_labels, n_rows):
    images = np.arange(100)
    labels = np.arange(100) % 10
    seen, seen_labels = train_diffusion.partly_labelled(images, labels, n_labels, 10)
    assert len(seen) == n_rows and set(seen.tolist()) == set(range(100))
    assert (seen_labels == np.where(seen < n_labels, seen % 10, 10)).all()
    counts = np.bincount(seen, minlength=100)
    assert (counts[n_labels:] == 1).all() and len(set(counts[:n_labels].tolist())) <= 1
    if n_rows > 100:
        assert 0.45 < (seen_labels < 10).mean() < 0.55


def test_a_network_without_labels(unlabelled):
    """It has features, and cannot generate images of a class."""
    _, model = unlabelled
    assert model.num_classes == 0
    x = torch.rand(3, 1, 8, 8)
    model.check_teaches("it", DIGITS, with_labels=False)
    (feats,) = model.features(x, 0.1, None, [model.default_block], torch.randn(3, 1, 8, 8))
    assert feats.shape[0] == 3 and feats.isfinite().all()
    with pytest.raises(UserError, match="without labels"):
        check_generates(model, "it", DIGITS, with_labels=True)


def test_squares_of_pixels(unlabelled):
    """Each place of the network has the four pixels of a square: D by a loop over the places."""
    _, model = unlabelled
    net = model.net.double()
    noisy = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    sigma, sd = 0.7, 0.5
    squares = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    root = math.sqrt(sigma**2 + sd**2)
    for row in range(4):
        for column in range(4):
            square = noisy[:, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            squares[:, :, row, column] = square.reshape(2, 4) / root
    c_noise = torch.full((2,), math.log(sigma) / 4, dtype=torch.float64)
    with torch.no_grad():
        denoised = model.denoise(noisy, sigma)
        null = torch.zeros(2, dtype=torch.long)
        output = net(squares, c_noise, class_labels=null).sample
    for row in range(8):
        for column in range(8):
            channel = 2 * (row % 2) + column % 2
            expected = noisy[:, 0, row, column] * sd**2 / root**2
            expected = expected + sigma * sd / root * output[:, channel, row // 2, column // 2]
            assert torch.allclose(denoised[:, 0, row, column], expected, rtol=1e-9)
    net.float()


def test_labels_begin_as_the_null_label(unlabelled, tmp_path, monkeypatch):
    """--init from a network without labels; then the weights are those of --init."""
    directory, source = unlabelled
    args = train_diffusion.parse_args([*TINY, "--patch", "2", "--init", directory])
    args.val_size = DIGITS.val_size
    net = train_diffusion.build_network(DIGITS, args)
    assert train_diffusion.load_init(net, args, DIGITS, 0) == source.sha256
    weights = source.net.state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, weights[name].expand(tensor.shape)), name
    model = train(tmp_path / "labelled", "--patch", "2", "--init", directory, "--n-labels", "50")
    check_generates(model, "it", DIGITS, with_labels=True)
    again = train(tmp_path / "again", "--patch", "2", "--init", str(tmp_path / "labelled"))
    assert again.num_classes == 10


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--n-labels", "801"], "--n-labels 801: only 800 training images"),
        (
            ["--init", "DIR", "--channels", "8", "8", "--patch", "2"],
            "do not fit the settings (unexp",
        ),
        (["--init", "DIR"], "conv_in.weight is 8x4x3x3, expected 8x1x3x3"),
        (["--init", "DIR", "--patch", "2", "--sigma-data", "1"], "another --sigma-data"),
        (["--patch", "3"], "2 resolutions of --patch 3 do not divide 8 pixels"),
        (["--patch", "8"], "do not divide 8 pixels"),
    ],
)
def test_what_does_not_fit_is_one_line(flags, words, unlabelled, tmp_path):
    flags = [unlabelled[0] if flag == "DIR" else flag for flag in flags]
    with pytest.raises(UserError) as info:
        train(tmp_path / "out", *flags)
    assert words in str(info.value) and "\n" not in str(info.value)
    assert not (tmp_path / "out").exists()


def test_a_network_of_others_is_no_start(tmp_path):
    tiny_ddpm(tmp_path / "ddpm")
    with pytest.raises(UserError, match="ddpm: not of this script"):
        train(tmp_path / "out", "--init", str(tmp_path / "ddpm"))


def test_a_finished_run_can_be_checked(tmp_path, capsys):
    argv = [*TINY, "--out-dir", str(tmp_path / "run")]
    train_diffusion.main(train_diffusion.parse_args(argv))
    train_diffusion.main(train_diffusion.parse_args([*argv, "--check"]))
    assert "finished, nothing to do" in capsys.readouterr().out
