"""The cost model: FLOP by hand, of real steps; estimates in runs/*.sh up to date. Alone: python -m pytest tests/test_costs.py"""

import math
import re
import subprocess

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import evaluate
import train_at
import train_at_aux
import train_diffusion
from common import attacks, autoattack, cli, data, models
from runs import costs

SCRIPTS = sorted(p for p in ROOT.glob("runs/*.sh") if "# estimate: " in p.read_text())
CIFAR = ["--dataset", "cifar10"]


def test_a_small_network_counts_as_by_hand():
    """Strides, padding, bias, groups and a transposed convolution; torch's own formula is wrong for the weights of grouped ones."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16 -> 8
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1, groups=4, bias=False),
        nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2),  # 8 -> 16
        nn.AvgPool2d(16),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    macs = [3 * 8 * 9 * 64, 8 * 9 * 64, 2 * 12 * 64, 12 * 3 * 4 * 64, 6 * 5]
    for device in ("cpu", "meta"):
        passes = costs.passes_of(network.to(device), torch.rand(2, 3, 16, 16, device=device))
        assert passes.forward == passes.gradient == 2 * sum(macs)
        assert passes.backward == 2 * (2 * sum(macs) - macs[0])  # no gradient of the images


def test_wide_resnet_counts_as_by_hand():
    """WRN-28-10 at 32 pixels: twelve blocks of two 3 x 3 convolutions, a 1 x 1 shortcut per group."""
    macs, first = 0, 32 * 32 * 9 * 3 * 16
    for side, cin, cout in ((32, 16, 160), (16, 160, 320), (8, 320, 640)):
        macs += side**2 * (9 * cin * cout + 7 * 9 * cout * cout + cin * cout)
    macs += first + 640 * 10
    passes = costs.classifier_passes("wrn-28-10", "cifar10")
    assert passes.forward == passes.gradient == 2 * macs
    assert passes.backward == 2 * (2 * macs - first)
    assert macs == pytest.approx(5.2e9, rel=0.01)


def test_other_classifiers_count_as_published():
    """GMAC that torchvision's documentation states, which counts no attention products."""
    for name, gmac in (("convnext_tiny", 4.46), ("vit_b_16", 17.56), ("swin_b", 15.43)):
        assert costs.classifier_passes(name, "imagenet").forward / 2e9 == pytest.approx(gmac, rel=0.02)


def test_the_cut_teacher_is_cheaper_than_the_whole():
    """And the published shapes are right: their sizes in the papers of DDPM, ADM and DiT, and this project's notes on DDPM++."""
    sizes = {"edm-cifar10-32x32-uncond-vp.pkl": 55.7e6, "edm-imagenet-64x64-cond-adm.pkl": 296e6, "hub:google/ddpm-cifar10-32": 35.7e6}
    for name in (*sizes, "hub:facebook/DiT-XL-2-256"):
        network = costs.public_network(name)
        blocks = network.model.blocks
        cuts = [network.cut(block)[0] for block in (blocks[0], network.model.default_block, blocks[-1])]
        assert 0 < cuts[0] < cuts[1] < cuts[2] <= network.encoder + network.whole
        if name in sizes:
            assert sum(p.numel() for p in network.model.net.parameters()) == pytest.approx(sizes[name], rel=0.002)
    ddpmpp = costs.public_network("edm-cifar10-32x32-uncond-vp.pkl")
    assert ddpmpp.whole / 2e9 == pytest.approx(21.2, abs=0.05)
    assert ddpmpp.cut("dec.16x16_block1")[0] / 2e9 == pytest.approx(8.9, abs=0.06)
    assert ddpmpp.cut("dec.16x16_block1")[1] == 256
    assert costs.public_network("hub:facebook/DiT-XL-2-256").whole / 2e9 == pytest.approx(118.6, rel=0.002)


class Counting(TorchDispatchMode):
    """FLOP by torch's own formulae, also through torch.autograd.grad."""

    flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        self.flop += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        return result


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--attack-bn running --align both",
        "--loss pgd --align both --n-steps 3",
        "--loss pgd --attack apgd --attack-bn running --n-steps 2",
        "--loss standard --align clean",
    ],
)
def test_a_step_costs_what_its_parts_say(argv):
    """A real step of train_at_aux.py, and of train_at.py, on a small network."""
    spec, batch = data.DATASETS["digits"], 2
    teacher = costs.own_network(train_diffusion.parse_args(["--channels", "8", "16"]))
    args = train_at_aux.parse_args(["--block", teacher.default_block, "--sigma", "0.1", "--head-width", "32", *argv.split()])
    network, passes = costs.Network(teacher), costs.classifier_passes(args.model, "digits")
    network.x, network.noise = (torch.rand(1, 1, 8, 8) for _ in range(2))
    cut, width = network.cut(args.block)
    model, head = models.build(args.model, spec), train_at_aux.alignment_head(passes.num_features, args.head_width, width)
    x, y, start = torch.rand(batch, 1, 8, 8), torch.tensor([1, 2]), torch.zeros(batch, 1, 8, 8)

    with Counting() as counting:
        targets = train_at_aux.teacher_targets(teacher, x, y, torch.randn_like(x), 0, args)
        loss, _, _, features = train_at_aux.adversarial_loss(model, model, x, y, start, args)
        (loss - train_at_aux.alignment(head, features, targets)).backward()
    parts = costs.step_parts(args, passes, cut, costs.head_flop(passes.num_features, args.head_width, width))
    # Where a clean pass serves the alignment alone, nothing comes back through the last layer.
    unused = 2 * 2 * passes.num_features * spec.num_classes if "clean, for DRA" in parts else 0
    assert counting.flop == batch * (sum(parts.values()) - unused)

    with Counting() as counting:
        train_at.adversarial_loss(model, model, x, y, start, args)[0].backward()
    assert counting.flop == batch * sum(costs.step_parts(args, passes).values())


def test_the_recipe_of_cifar10():
    """TRADES with PGD-10: 26 times a forward pass; DRA adds the cut teacher and the head; 39,200 steps."""
    passes = costs.classifier_passes("wrn-28-10", "cifar10")
    args = train_at.parse_args(CIFAR)
    assert costs.train_steps(args) == 400 * 98
    assert sum(costs.step_parts(args, passes).values()) == pytest.approx(26 * passes.forward, rel=0.001)
    row = costs.training_row(train_at_aux.parse_args([*CIFAR, "--teacher", "edm-cifar10-32x32-uncond-vp.pkl"]), True, {})
    cut, width = costs.public_network("edm-cifar10-32x32-uncond-vp.pkl").cut("dec.16x16_block1")
    head = 3 * 2 * (640 * 2048 + 2048**2 + 2048 * width)
    assert row.dra == pytest.approx((cut + head) / (26 * passes.forward), rel=0.001)
    step = row.per_image * 512 * 39_200
    validation = 400 * 1024 * (82 + 1) * passes.forward  # PGD-40, two passes; one for the alignment
    assert row.flop == {"fp32": pytest.approx(step + validation + 11_024 * cut, rel=1e-6), "bf16": 0}
    half = costs.training_row(train_at.parse_args([*CIFAR, "--precision", "bf16"]), False, {})
    assert half.flop["fp32"] == pytest.approx(400 * 1024 * 82 * passes.forward, rel=1e-6) and half.flop["bf16"] > 10 * half.flop["fp32"]


def test_data_and_own_network_are_as_the_scripts_have_them(diffusion_dir):
    import diffusers

    train, held_out = data.load_train(data.DATASETS["digits"], None, 200)
    assert costs.N_IMAGES["digits"] == (len(train[1]) + len(held_out[1]), len(data.load_test(data.DATASETS["digits"], None)[1]))
    assert set(costs.N_IMAGES) == set(data.DATASETS)
    theirs = diffusers.UNet2DModel.from_pretrained(diffusion_dir)
    ours = costs.own_network(train_diffusion.parse_args(["--channels", "8", "16"])).net
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    network = costs.Network(costs.own_network(train_diffusion.parse_args(["--channels", "8", "16"])))
    network.x, network.noise = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
    assert 2.5 * network.whole < network.training < 3 * network.whole


class Robust(nn.Module):
    """A linear classifier that no attack of tiny radius fools; counts its passes."""

    forwards = backwards = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 10)
        self.bias = torch.zeros(10).index_fill(0, torch.tensor([0]), 20.0)

    def forward(self, x):
        self.forwards += 1
        logits = self.linear(x.flatten(1)) + self.bias
        if logits.requires_grad:
            logits.register_hook(self.count_backward)
        return logits

    def count_backward(self, gradient):
        self.backwards += 1


def test_autoattack_makes_the_passes_that_are_counted():
    """Forward and backward passes on one robust image in l2, where every proposal of Square changes something."""
    model = Robust().eval().requires_grad_(False)
    args = evaluate.parse_args(["--checkpoint", "-", "--eps", "0.01", "--norm", "l2", "--attack", "autoattack"])
    x, y = torch.rand(1, 3, 8, 8), torch.tensor([0])
    for name in evaluate.ATTACKS["autoattack"][1]:
        autoattack.attack(name, model, x, y, norm="l2", eps=0.01, seed=0)
    forwards = costs.attack_flop(args, costs.Passes(forward=1, gradient=0, backward=0))
    assert forwards <= model.forwards <= forwards + 50
    assert model.backwards == costs.attack_flop(args, costs.Passes(forward=0, gradient=1, backward=0))
    args = evaluate.parse_args(["--checkpoint", "-", "--attack", "pgd", "--n-steps", "4", "--n-restarts", "3"])
    model.forwards = model.backwards = 0
    starts = [torch.zeros_like(x)] * args.n_restarts
    attacks.pgd(model, x, y, starts, norm="linf", eps=0.01, step_size=0.01, n_steps=args.n_steps, loss="margin")
    assert model.forwards == costs.attack_flop(args, costs.Passes(1, 0, 0))
    assert model.backwards == costs.attack_flop(args, costs.Passes(0, 1, 0))


@pytest.mark.parametrize("path", sorted(ROOT.glob("runs/*.sh")), ids=lambda p: p.name)
def test_run_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_estimates_in_run_scripts_are_those_of_now(path):
    """Every command that costs anything has one; `python -m runs.costs --update` writes them anew."""
    lines, default = path.read_text().splitlines(), costs.parse_args([])
    rows = costs.rows_of(path)
    assert [n for n, _ in rows] == [n for n, line in enumerate(lines) if "# estimate: " in line]
    for number, row in rows:
        written = float(costs.ESTIMATE.search(lines[number])[1].replace(",", ""))
        assert written == pytest.approx(row.hours(default.peaks["H100"], default.utilisation), rel=0.01), lines[number]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_rows_are_evaluated_and_have_directories_of_their_own(path):
    """No two commands write one directory, and what a command reads from out/, a command above it has written."""
    found = list(costs.commands(path))
    made = []
    for _, _, argv in found:
        for flag in ("--checkpoint", "--classifier", "--teacher", "--diffusion", "--synthetic"):
            for value in argv[argv.index(flag) + 1 :] if flag in argv else []:
                if value.startswith("-"):
                    break
                assert not value.startswith("out/") or re.sub(r"/best\.pt$", "", value) in made, value
        made += [argv[argv.index("--out-dir") + 1]] if "--out-dir" in argv else argv[-1:] if argv[0] == "convert" else []
        made += ["out/diffusion-svhn"] if argv[:2] == ["--dataset", "svhn"] and "--channels" in argv else []
    assert len(made) == len(set(made))
    evaluated = {argv[argv.index("--checkpoint") + 1] for _, script, argv in found if script == "evaluate"}
    trained = {argv[argv.index("--out-dir") + 1] for _, script, argv in found if script.startswith("train_at")}
    assert {folder for folder in trained if "/ablation/" not in folder and not folder.endswith("/standard")} == {
        name.removesuffix("/best.pt") for name in evaluated
    }


def test_main_prints_a_table_and_updates_the_comments(tmp_path, capsys, monkeypatch):
    script = tmp_path / "digits.sh"
    script.write_text("python train_diffusion.py\npython train_at_aux.py  # estimate: 9,999 H100-hours; a word\n  python train_at.py\n")
    monkeypatch.setattr(costs, "print_networks", lambda: None)
    costs.main(costs.parse_args([str(script), "--update", "--peak-tflops", "B200:fp32=75", "B200:bf16=2250"]))
    printed = capsys.readouterr().out
    assert "ESTIMATE" in printed and "2 x MAC" in printed and "one B200, hours" in printed
    assert re.search(r"\| out/train_at_aux-digits \| .* \| \d+\.\d% \| ", printed)
    rows = costs.rows_of(script)
    args = costs.parse_args([])
    hours = [costs.digits(row.hours(args.peaks["H100"], args.utilisation)) for _, row in rows]
    assert script.read_text().splitlines() == [
        f"python train_diffusion.py  # estimate: {hours[0]} H100-hours",
        f"python train_at_aux.py  # estimate: {hours[1]} H100-hours; a word",
        "  python train_at.py",
    ]
    assert [costs.digits(v) for v in (0.01234, 0.1234, 9.999, 123.4, 12345)] == ["0.0123", "0.123", "10.00", "123", "12,300"]
    assert rows[1][1].hours({"fp32": 1e12, "bf16": 1e15}, 0.5) == pytest.approx(rows[1][1].total / 5e11 / 3600)
    assert math.isclose(sum(rows[1][1].flop.values()), rows[1][1].flop["fp32"])


@pytest.mark.parametrize(
    "text, named",
    [
        ("python train_at_aux.py --dataset cifar10 --teacher out/nowhere\n", "out/nowhere"),
        ("python evaluate.py --dataset cifar10 --checkpoint out/nowhere/best.pt\n", "out/nowhere"),
        ("python -m common.edm convert data/unknown.pkl out/unknown\n", "data/unknown.pkl"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, text, named):
    (tmp_path / "run.sh").write_text(text)
    with pytest.raises(cli.UserError, match=re.escape(named)):
        costs.rows_of(tmp_path / "run.sh")


def test_bad_flags_are_named(capsys):
    for argv in (["--peak-tflops", "H100"], ["--peak-tflops", "B200:bf16=2250"], ["--peak-tflops", "H100:bf16=0"], ["--utilisation", "0"]):
        with pytest.raises(SystemExit):
            costs.parse_args(argv)
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(cli.UserError, match="nowhere.sh"):
        costs.rows_of("nowhere.sh")
