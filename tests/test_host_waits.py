"""A training step never makes a GPU wait for the host, or the host for a GPU.

Alone: python -m pytest tests/test_host_waits.py

There is no GPU here: what would wait on one is counted on the CPU. On a GPU, benchmarks/gpu.py lets
PyTorch itself raise an error where anything waits.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from edm2_helper import EDM2_CONFIGS, edm2_dir
from test_train import run_aux
from torch.utils._python_dispatch import TorchDispatchMode

import train_at_aux
from common import data
from common.run import Meters, Run
from teachers.load import load_diffusion

# The host reads a value, or the size of a result depends on one.
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim")


class Waits(TorchDispatchMode):
    """Names of the operations of this thread that would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS:
            self.names.append(name)
        if name == "lift_fresh":  # torch.tensor, as_tensor: a blocking copy of Python's numbers
            self.names.append(name)
        if name in ("index", "index_put", "index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            self.names += [f"{name} by a mask"] * len(masks)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Waits of the steps from the start of training to its first log line, and their copies."""
    waits = Waits()
    copies = []
    to, unpacked = torch.Tensor.to, data.unpacked

    def watched_to(tensor, *args, **kwargs):
        # Our own code alone: torch's moves what is on the device already.
        ours = "site-packages" not in sys._getframe(1).f_code.co_filename
        with_device = any(isinstance(arg, torch.device | str) for arg in args) or "device" in kwargs
        if ours and with_device and not kwargs.get("non_blocking"):
            waits.names.append("to(device)")
        return to(tensor, *args, **kwargs)

    def counted(*args):
        copies.append(1)
        return unpacked(*args)

    init = data.Batches.__init__

    def with_thread(self, *args, **kwargs):  # as for a GPU
        init(self, *args, **kwargs)
        self.thread = ThreadPoolExecutor(1)

    monkeypatch.setattr(data.Batches, "__init__", with_thread)
    start, means = Run.start, Meters.means

    def watched_start(self, train_steps):
        start(self, train_steps)
        monkeypatch.setattr(torch.Tensor, "to", watched_to)
        monkeypatch.setattr(data, "unpacked", counted)
        waits.__enter__()

    def watched_means(self):
        waits.__exit__(None, None, None)
        monkeypatch.setattr(torch.Tensor, "to", to)
        return means(self)

    mix = data.mix

    def unwatched_mix(*args):  # torchvision draws its weights on the CPU wherever the images are
        waits.__exit__(None, None, None)
        mixed = mix(*args)
        waits.__enter__()
        return mixed

    monkeypatch.setattr(data, "mix", unwatched_mix)
    monkeypatch.setattr(Run, "start", watched_start)
    monkeypatch.setattr(Meters, "means", watched_means)
    return waits, copies


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--precision bf16 --align both --shuffle-targets --clip-norm 1 --accumulate 2"
        " --teacher-every 3",
        "--loss pgd --attack apgd --attack-bn running --mixup 0.8 --cutmix 1 --align clean",
        "--align-loss contrastive --teacher-label true --norm l2 --optimizer adamw",
    ],
)
def test_no_step_waits(flags, waits, tmp_path, diffusion_dir, synthetic_dir):
    """Of DM-AT + DRA with every switch that changes what a step computes: one copy a step, and no
    read, mask or other copy up to the log line.
    """
    found, copies = waits
    argv = ["--synthetic", synthetic_dir, "--epochs", "2", "--eval-every", "2", *flags.split()]
    run_aux(tmp_path / "run", diffusion_dir, *argv)
    assert found.names == []
    assert len(copies) == 8


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool(x.isfinite().all()),
        lambda x: torch.tensor(1.0),
        lambda x: x.nonzero(),
    ],
)
def test_what_waits_is_seen(function):
    with Waits() as found:
        function(torch.ones(3))
    assert found.names


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_targets_of_edm2_wait_for_nothing(kind, tmp_path):
    teacher = load_diffusion(edm2_dir(tmp_path / "edm2", EDM2_CONFIGS[kind]), "cpu")
    x = torch.rand(2, teacher.channels, teacher.image_size, teacher.image_size)
    noise = torch.randn(2, *teacher.noise_shape)
    with torch.no_grad(), Waits() as found:
        teacher.features(x, teacher.default_sigma, None, [teacher.default_block], noise)
    assert found.names == []


def test_a_batch_arrives_whole_on_its_device():
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    labels = torch.tensor([7, -1])
    buffer = data.packed(images, labels, pin=False)
    x, y = data.unpacked(buffer, images.shape, "cpu")
    assert torch.equal(y, labels)
    assert torch.equal((255 * x).round().to(torch.uint8).permute(0, 2, 3, 1), images)
    assert {part.device.type for part in data.unpacked(buffer, images.shape, "meta")} == {"meta"}


def test_a_wait_in_a_step_is_seen(waits, monkeypatch, tmp_path, diffusion_dir):
    found, _ = waits
    real = train_at_aux.cosine_loss

    def reading(output, targets):
        loss = real(output, targets)
        loss.item()
        return loss

    monkeypatch.setattr(train_at_aux, "cosine_loss", reading)
    run_aux(tmp_path / "run", diffusion_dir, "--epochs", "1")
    assert found.names == ["_local_scalar_dense"] * 4
