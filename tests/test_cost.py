"""The cost model of docs/costs.md: FLOP by hand, by publication, and of real training steps."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_at
import train_at_aux
import train_diffusion
from benchmarks import cost, measure
from common import UserError, files, models
from evaluation import autoattack
from published.datasets import DATASETS
from teachers.unet import EDMUNet


def test_a_small_network_counts_as_by_hand():
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
    for device in ("cpu", "meta"):
        passes = cost.passes_of(network.to(device), torch.rand(1, 3, 16, 16, device=device))
        assert passes.forward == 2 * sum(macs)
        assert passes.input_gradient == 2 * sum(macs)
        assert passes.weight_gradient == 2 * (2 * sum(macs) - macs[0])  # without the images'


def test_a_wide_resnet_counts_as_by_hand():
    """WRN-28-10: three groups of four blocks of two 3 x 3 convolutions, with 1 x 1 shortcuts."""
    first = 32 * 32 * 9 * 3 * 16
    macs = first + 640 * 10
    for size, n_in, n_out in ((32, 16, 160), (16, 160, 320), (8, 320, 640)):
        macs += size**2 * (9 * n_in * n_out + 7 * 9 * n_out * n_out + n_in * n_out)
    passes, num_features = cost.classifier("wrn-28-10", "cifar10")
    assert num_features == 640
    assert passes.forward == passes.input_gradient == 2 * macs
    assert passes.weight_gradient == 2 * (2 * macs - first)


@pytest.mark.parametrize("name, gmac", [("convnext_tiny", 4.46), ("vit_b_16", 17.56)])
def test_other_classifiers_count_as_published(name, gmac):
    """By torchvision's documentation, which counts no products of attention."""
    passes, _ = cost.classifier(name, "imagenet")
    assert passes.forward / 2e9 == pytest.approx(gmac, rel=0.02)


@pytest.mark.parametrize(
    "name, parameters, whole, cut, feature",
    [
        ("DDPM++", 55.7e6, 21.2, 8.9, 256),
        ("ADM", 296e6, 109.7, 45.0, 576),
        ("DiT-XL/2", None, 118.6, 59.3, 1152),
    ],
)
def test_diffusion_networks_count_as_published(name, parameters, whole, cut, feature):
    """GMAC, and parameters by the papers of EDM and ADM; a cut network costs less than a whole."""
    flop, num_targets = cost.diffusion_flop(name)
    assert flop["whole"] / 2e9 == pytest.approx(whole, rel=0.005)
    assert flop["cut"] / 2e9 == pytest.approx(cut, rel=0.01)
    assert num_targets == feature
    if parameters:
        with torch.device("meta"):
            net = cost.build_diffusion(name).net
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.002)


class Counting(TorchDispatchMode):
    """Counts FLOP by torch's formulae, in torch.autograd.grad too."""

    flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula:
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize(
    "flags", ["", "--loss pgd", "--loss pgd --attack apgd --attack-bn running --n-steps 2"]
)
def test_a_step_costs_what_its_parts_say(flags):
    """Real steps of train_at.py and train_at_aux.py, and a validation, on small networks."""
    spec = DATASETS["digits"]
    args = train_at_aux.parse_args(flags.split())
    passes, num_features = cost.classifier(args.model, "digits")
    model = models.build(args.model, spec)
    x = torch.rand(2, 1, 8, 8)
    y = torch.tensor([1, 2])
    start = torch.zeros_like(x)
    with Counting() as counting:
        train_at.adversarial_loss(model, model, x, y, start, args)[0].backward()
    assert counting.flop == 2 * sum(cost.step_flop(args, passes))

    tiny = train_diffusion.parse_args(["--channels", "8", "16"])
    network = EDMUNet(train_diffusion.build_network(spec, tiny))
    network.net.eval().requires_grad_(False)
    teacher = train_at_aux.Teacher(network, args)
    with Counting() as counting:
        targets = teacher.targets(x, y, torch.randn_like(x))
    cut = counting.flop
    head = train_at_aux.alignment_head(num_features, targets.shape[1], args)
    with Counting() as counting:
        loss, _, _, feats = train_at_aux.adversarial_loss(model, model, x, y, start, args)
        targets = teacher.targets(x, y, torch.randn_like(x))
        (loss + train_at_aux.alignment_loss(head, feats, targets, args)).backward()
    head_flop = cost.head_flop(num_features, targets.shape[1], args)
    assert counting.flop == cut + 2 * (sum(cost.step_flop(args, passes)) + head_flop)

    model.eval().requires_grad_(False)
    with Counting() as counting:
        train_at.validate(model, x, y, start, args, rank=0, world_size=1)
    assert counting.flop == 2 * cost.validation_flop(args, passes)


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


def test_autoattack_makes_the_passes_that_are_counted():
    """One robust image in l2, where every proposal of Square changes something."""
    model = Robust().eval().requires_grad_(False)
    x = torch.rand(1, 3, 8, 8)
    y = torch.tensor([0])
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        autoattack.attack(name, model, x, y, norm="l2", eps=0.01, seed=0)
    forwards = cost.autoattack_flop(cost.Passes(1, 0, 0))
    backwards = cost.autoattack_flop(cost.Passes(0, 1, 0))
    assert forwards <= model.forwards <= forwards + 50
    assert model.backwards == backwards


def test_a_row_of_the_recipe_of_cifar10():
    """TRADES with PGD-10 costs 26 forward passes; DRA adds the cut teacher and the head."""
    passes, _ = cost.classifier("wrn-28-10", "cifar10")
    plain = cost.training("", "--dataset cifar10")
    aligned = cost.training("", "--dataset cifar10", "DDPM++")
    assert plain.attack + plain.loss == pytest.approx(26 * passes.forward, rel=0.001)
    flop, _ = cost.diffusion_flop("DDPM++")
    head = 3 * 2 * (640 * 2048 + 2048**2 + 2048 * 256)
    assert aligned.diffusion == flop["cut"] + head
    train = 39_200 * 512 * (plain.attack + plain.loss)
    validation = 400 * 1024 * (2 * 40 + 2) * passes.forward
    wide = cost.UTILISATION["wide convolutions"]
    hours = {kind: cost.PEAK[kind] * wide[kind] * 3600 for kind in cost.PEAK}
    assert plain.hours("fp32") == pytest.approx((train + validation) / hours["fp32"])
    bf16 = train / hours["bf16"] + validation / hours["fp32"]
    assert plain.hours("bf16") == pytest.approx(bf16)


def test_the_document_holds_what_the_commands_write(tmp_path):
    text = files.read_text(measure.DOCUMENT)
    copy = str(tmp_path / "costs.md")
    files.write_text(text, copy)
    measure.write_between("python -m benchmarks.cost", cost.table(), copy)
    measure.write_between(
        "python -m benchmarks", measure.table(files.read_json(measure.STORE)), copy
    )
    assert files.read_text(copy) == text


def test_a_document_without_the_lines_is_named(tmp_path):
    files.write_text("# Costs\n", str(tmp_path / "costs.md"))
    with pytest.raises(UserError, match="costs.md: lacks the lines"):
        measure.write_between("python -m benchmarks", "", str(tmp_path / "costs.md"))


def test_numbers_are_written_in_three_digits():
    values = {0.01234: "0.0123", 0.1234: "0.123", 9.999: "10.0", 123.4: "123", 12345: "12,300"}
    for value, text in values.items():
        assert cost.digits(value) == text


def test_ratios_are_medians_over_rounds_and_misses_are_named():
    row = measure.compare("a", "b", ours=[1, 2, 4], reference=[2, 2, 2], target=1.5)
    assert (row["ratio"], row["low"], row["high"], row["rounds"]) == (1, 0.5, 2, 3)
    dear = measure.compare("a", "b", [1, 2, 4], [2, 2, 2], 1.5, "the cost")
    assert (dear["ratio"], dear["low"], dear["high"]) == (1, 0.5, 2)
    where = {"environment": {"device": "cpu", "threads": 2, "torch": "2"}}
    printed = measure.table({"a": {**row, **where}, "b": {**dear, **where}})
    assert "| a | b | 1.00 times as fast | 0.50 to 2.00 | 3 | at least 1.5: **missed** |" in printed
    assert "| a | b | 1.00 times the cost | 0.50 to 2.00 | 3 | at most 1.5: met |" in printed
