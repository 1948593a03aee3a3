"""The cost model of docs/costs.md: FLOP by hand and by publication; the tables."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from torch import nn

import train_at_aux
from benchmarks import accuracy, cost, measure
from common import UserError, files
from evaluation import autoattack


def forward_flop(name, dataset):
    model, x, _ = cost.classifier(name, dataset)
    return cost.count(lambda: model(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_small_network_counts_as_by_hand(device):
    """Strides, padding, bias and groups: torch's formula is wrong for grouped weights."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16 x 16 pixels become 8 x 8
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1, groups=4, bias=False),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    macs = [3 * 8 * 9 * 64, 8 * 9 * 64, 2 * 12 * 64, 12 * 5]
    network.to(device)
    x = torch.rand(1, 3, 16, 16, device=device)
    assert cost.count(lambda: network(x)) == 2 * sum(macs)
    output = network(x).sum()
    assert cost.count(output.backward) == 2 * (2 * sum(macs) - macs[0])  # without the images'
    network.requires_grad_(False)
    output_of_x = network(x.requires_grad_(True)).sum()
    assert cost.count(lambda: torch.autograd.grad(output_of_x, x)) == 2 * sum(macs)


def test_a_wide_resnet_counts_as_by_hand():
    """WRN-28-10: three groups of four blocks of two 3 x 3 convolutions, with 1 x 1 shortcuts."""
    macs = 32 * 32 * 9 * 3 * 16 + 640 * 10
    for size, n_in, n_out in ((32, 16, 160), (16, 160, 320), (8, 320, 640)):
        macs += size**2 * (9 * n_in * n_out + 7 * 9 * n_out * n_out + n_in * n_out)
    assert forward_flop("wrn-28-10", "cifar10") == 2 * macs


@pytest.mark.parametrize("name, gmac", [("convnext_tiny", 4.46), ("vit_b_16", 17.56)])
def test_other_classifiers_count_as_published(name, gmac):
    """By torchvision's documentation, which counts no products of attention."""
    assert forward_flop(name, "imagenet") / 2e9 == pytest.approx(gmac, rel=0.02)


@pytest.mark.parametrize(
    "name, dataset, whole, cut",
    [
        ("DDPM++", "cifar10", 21.2, 8.9),
        ("DiT-XL/2", "imagenet", 118.6, 59.3),
        ("JiT-B/16", "imagenet", 25.2, 12.05),
        ("EDM2-img64-s", "imagenet", 100.8, 41.8),
    ],
)
def test_diffusion_networks_count_as_published(name, dataset, whole, cut):
    """In GMAC; a teacher's target costs less than a whole pass."""
    _, _, flop, _ = cost.generation("", name, 1, 1)
    assert flop[name] / 2e9 == pytest.approx(whole, rel=0.005)
    _, x, _ = cost.classifier("wrn-28-10", dataset)
    args = train_at_aux.parse_args(["--dataset", dataset])
    flop = cost.teacher_flop(name, x, args)
    assert flop[name] / 2e9 == pytest.approx(cut, rel=0.01)


@pytest.mark.parametrize(
    "name, millions", [("DDPM++", 55.7), ("EDM2-img64-s", 280), ("JiT-B/16", 131)]
)
def test_networks_have_as_many_parameters_as_published(name, millions):
    """By the papers of EDM, EDM2 and JiT."""
    with torch.device("meta"):
        net = cost.build_diffusion(name).net
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.003)


def test_dra_on_imagenet_costs_a_quarter_more_at_most():
    """With the default teacher and K; with EDM2-S, 5 is the least K that does."""
    ratios = []
    for teacher, k in (("JiT-B/16", 2), ("EDM2-img64-s", 5), ("EDM2-img64-s", 4)):
        flags = f"--dataset imagenet --teacher-every {k}"
        _, _, flop, _ = cost.training("", flags, teacher)
        ratios.append(sum(flop.values()) / flop["convnext_tiny"])
    default = train_at_aux.parse_args(["--dataset", "imagenet"])
    assert (default.teacher, default.teacher_every) == ("out/jit-b-16", 2)
    assert ratios == pytest.approx([1.17, 1.235, 1.294], abs=0.01)


class Robust(nn.Module):
    """A linear classifier that no attack of tiny radius fools. Counts its passes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 10)
        self.bias = torch.zeros(10)
        self.bias[0] = 20
        self.forwards = 0
        self.backwards = 0

    def forward(self, x):
        self.forwards += 1
        logits = self.linear(x.flatten(1)) + self.bias
        if logits.requires_grad:
            logits.register_hook(self.count_backward)
        return logits

    def count_backward(self, gradient):
        self.backwards += 1


def test_the_hour_is_counted_with_the_flags_of_its_script():
    script = (ROOT / "runs/cifar10_hour.sh").read_text().replace("\\\n  ", "")
    for flags in (cost.HOUR_UNET, cost.HOUR_CLASSIFIER, cost.HOUR_DRA):
        words = flags.removeprefix("--dataset cifar10 ").split(" --teacher out ")
        for part in words:
            assert part.removeprefix("--dataset cifar10 ") in script
    assert f"--n-images 100000 --n-steps {(23 + 1) // 2}" in script


def test_autoattack_makes_the_passes_that_are_counted():
    """One robust image in l2, where every proposal of Square changes something."""
    model = Robust().eval().requires_grad_(False)
    x = torch.rand(1, 3, 8, 8)
    y = torch.tensor([0])
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        autoattack.attack(name, model, x, y, norm="l2", eps=0.01, seed=0)
    passes = model.forwards + model.backwards
    assert cost.AUTOATTACK_PASSES <= passes <= cost.AUTOATTACK_PASSES + 50


def test_a_gradient_of_an_image_costs_as_much_as_a_forward_pass():
    """As AUTOATTACK_PASSES assumes."""
    for name, dataset in (("wrn-28-10", "cifar10"), ("convnext_tiny", "imagenet")):
        model, x, _ = cost.classifier(name, dataset)
        model.requires_grad_(False)
        output = model(x.requires_grad_(True)).sum()
        assert cost.count(output.backward) == forward_flop(name, dataset)


@pytest.mark.parametrize(
    "flags, n_passes",
    [
        # Ten steps of the attack, of two passes, and two passes of the loss that cost three.
        ("--dataset cifar10", 10 * 2 + 2 * 3),
        # The attack's two steps and its last point, and one pass of the loss.
        ("--dataset imagenet", 2 * 2 + 1 + 3),
    ],
)
def test_a_step_costs_what_its_passes_cost(flags, n_passes):
    args = train_at_aux.parse_args(flags.split())
    _, _, flop, _ = cost.training("", flags)
    expected = n_passes * forward_flop(args.model, args.dataset)
    assert flop[args.model] == pytest.approx(expected, rel=0.004)


def test_a_row_of_the_recipe_of_cifar10():
    """DRA adds the cut teacher to the same 39,200 steps of 512 images."""
    _, n, flop, _ = cost.training("", "--dataset cifar10")
    _, n_with_dra, flop_with_dra, _ = cost.training("", "--dataset cifar10", "DDPM++")
    assert n == n_with_dra == 39_200 * 512
    assert flop_with_dra["wrn-28-10"] == flop["wrn-28-10"]
    assert list(flop_with_dra) == ["wrn-28-10", "DDPM++", "VAE"]
    assert flop_with_dra["VAE"] == 0
    for precision, peak in cost.PEAK.items():
        share = cost.SHARES["wide convolutions"][precision]
        expected = n * flop["wrn-28-10"] / (peak * share) / 3600
        assert cost.hours(n, flop, precision, cost.SHARES) == pytest.approx(expected)


def test_the_document_holds_what_the_commands_write(tmp_path):
    text = files.read_text(measure.DOCUMENT)
    copy = str(tmp_path / "costs.md")
    files.write_text(text, copy)
    shares = cost.measured_shares(str(ROOT / "benchmarks/gpu-h100.json"))
    files.write_between(copy, "python -m benchmarks.cost", f"{cost.table(shares)}\n")
    table = measure.table(files.read_json(measure.STORE))
    files.write_between(copy, "python -m benchmarks", f"{table}\n")
    assert files.read_text(copy) == text


def test_a_document_without_the_lines_is_named(tmp_path):
    files.write_text("# Costs\n", str(tmp_path / "costs.md"))
    with pytest.raises(UserError, match="costs.md: lacks the lines"):
        files.write_between(str(tmp_path / "costs.md"), "python -m benchmarks", "")


def test_the_document_holds_the_shares_that_are_assumed():
    text = files.read_text(measure.DOCUMENT)
    for family, share in cost.SHARES.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {family} (")]
        fp32 = round(100 * share["fp32"])
        bf16 = round(100 * share["bf16"])
        assert f"| {fp32} % and {bf16} % |" in line


def test_ratios_are_medians_over_rounds_and_misses_are_named():
    row = measure.compare("a", "b", ours=[1, 2, 4], reference=[2, 2, 2], target=1.5)
    assert (row["ratio"], row["low"], row["high"], row["rounds"]) == (1, 0.5, 2, 3)
    dear = measure.compare("a", "b", [1, 2, 4], [2, 2, 2], 1.5, "the cost")
    assert (dear["ratio"], dear["low"], dear["high"]) == (1, 0.5, 2)
    where = {"environment": {"device": "cpu", "threads": 2, "torch": "2"}}
    printed = measure.table({"a": {**row, **where}, "b": {**dear, **where}})
    assert "| a | b | 1.00 times as fast | 0.50 to 2.00 | 3 | at least 1.5: **missed** |" in printed
    assert "| a | b | 1.00 times the cost | 0.50 to 2.00 | 3 | at most 1.5: met |" in printed


def test_precisions_are_compared_seed_by_seed(tmp_path):
    """The interval is that of the paired differences: -1, 0 and 1 point."""
    robust = {"fp32": [0.80, 0.90, 0.70], "bf16": [0.79, 0.90, 0.71]}
    for precision, values in robust.items():
        for seed, value in enumerate(values):
            path = tmp_path / precision / str(seed) / accuracy.RESULT
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"clean": 0.95, "robust": value}))
    text = accuracy.table(str(tmp_path))
    assert "| clean | 95.00 | 95.00 | +0.00 (+0.00 to +0.00) |" in text
    assert "| robust, APGD-CE+T | 80.00 | 80.00 | +0.00 (-2.48 to +2.48) |" in text
    assert text.endswith("3 seeds, 797 test images.")
    shutil.rmtree(tmp_path / "bf16" / "2")
    path = tmp_path / "bf16" / "1" / accuracy.RESULT
    with pytest.raises(UserError, match="3 runs in fp32 and 2 in bf16"):
        accuracy.table(str(tmp_path))
    path.write_text('{"clean": 1}')
    with pytest.raises(UserError, match="a result of evaluate.py"):
        accuracy.table(str(tmp_path))


def test_shares_that_were_measured_count(tmp_path):
    path = tmp_path / "gpu.json"
    utilisation = {family: {} for family in cost.SHARES}
    utilisation["wide convolutions"] = {"bf16": 0.15, "tf32": 0.4}
    found = {"toy": False, "utilisation": utilisation}
    path.write_text(json.dumps(found))
    shares = cost.measured_shares(str(path))
    assert shares["wide convolutions"] == {"fp32": 0.6, "bf16": 0.15}
    assert shares["transformers"] == cost.SHARES["transformers"]
    flop = {"wrn-28-10": 1e9}
    assert cost.hours(1e6, flop, "bf16", shares) == 2 * cost.hours(1e6, flop, "bf16", cost.SHARES)
    for change in (
        {"toy": True},
        {"utilisation": {}},
        {"utilisation": utilisation | {"transformers": 3}},
        {"utilisation": utilisation | {"transformers": {"bf16": 0}}},
        {"utilisation": utilisation | {"transformers": {"bf16": "x"}}},
    ):
        path.write_text(json.dumps(found | change))
        with pytest.raises(UserError, match="gpu.json.*a result of `make gpu` on a GPU"):
            cost.measured_shares(str(path))
