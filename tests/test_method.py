"""The two training scripts' equations and schedules against plain formulae. Alone: python -m pytest
tests/test_method.py
"""

import copy
import inspect
import math
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import train_at
import train_at_aux
from common import attacks, data, models
from common.run import make_average, update_average
from published.datasets import DATASETS
from teachers.load import load_diffusion


def logits_and_labels(n=5, k=4):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, k, generator=generator, dtype=torch.float64) * 2
    return (
        logits,
        logits + torch.randn(n, k, generator=generator, dtype=torch.float64),
        torch.randint(0, k, (n,), generator=generator),
    )


def softmax(z):
    return [math.exp(v) / sum(math.exp(w) for w in z) for v in z]


def slow_smoothed_ce(logits, y, smoothing):
    """0.9 on the target's negative log likelihood + 0.1 times the mean over all classes, at
    smoothing 0.1.
    """
    total = 0.0
    for z, label in zip(logits.tolist(), y.tolist()):
        nll = [-math.log(p) for p in softmax(z)]
        total += (1 - smoothing) * nll[label] + smoothing * sum(nll) / len(nll)
    return total / len(y)


def slow_kl(logits, logits_adv):
    total = 0.0
    for z, z_adv in zip(logits.tolist(), logits_adv.tolist()):
        total += sum(p * math.log(p / q) for p, q in zip(softmax(z), softmax(z_adv)))
    return total / len(logits)


def args_of(*argv):
    return train_at.parse_args(list(argv))


@pytest.fixture
def in_float64(monkeypatch):
    """The scripts raise logits to float32; here they stay in float64, so that formulae can be
    compared to 1e-12.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def test_trades_loss(in_float64):
    logits, logits_adv, y = logits_and_labels()
    loss, parts = train_at.at_loss(
        logits, logits_adv, y, args_of("--beta", "5", "--label-smoothing", "0.1")
    )
    assert math.isclose(parts["loss_clean"].item(), slow_smoothed_ce(logits, y, 0.1), rel_tol=1e-12)
    assert math.isclose(parts["loss_robust"].item(), slow_kl(logits, logits_adv), rel_tol=1e-12)
    assert math.isclose(
        loss.item(),
        slow_smoothed_ce(logits, y, 0.1) + 5 * slow_kl(logits, logits_adv),
        rel_tol=1e-12,
    )


def test_trades_gradient_flows_through_both_sides(in_float64):
    """The base code does not detach p_clean in the loss: the clean logits' gradient has a KL part,
    by finite differences.
    """
    logits, logits_adv, y = logits_and_labels()
    args = args_of("--beta", "3")
    for which in (0, 1):
        pair = [logits.clone(), logits_adv.clone()]
        pair[which].requires_grad_(True)
        (gradient,) = torch.autograd.grad(train_at.at_loss(*pair, y, args)[0], pair[which])
        bumped = [[z.clone() for z in (logits, logits_adv)] for _ in range(2)]
        bumped[0][which][1, 2] += 1e-6
        bumped[1][which][1, 2] -= 1e-6
        numeric = (
            train_at.at_loss(*bumped[0], y, args)[0] - train_at.at_loss(*bumped[1], y, args)[0]
        ).item() / 2e-6
        assert math.isclose(gradient[1, 2].item(), numeric, rel_tol=1e-5)


def test_trades_special_cases():
    logits, logits_adv, y = logits_and_labels()
    standard = train_at.at_loss(logits, None, y, args_of("--loss", "standard"))[0]
    assert torch.equal(train_at.at_loss(logits, logits_adv, y, args_of("--beta", "0"))[0], standard)
    assert train_at.at_loss(logits, logits, y, args_of())[1]["loss_robust"].abs() < 1e-7


def test_pgd_at_loss(in_float64):
    _, logits_adv, y = logits_and_labels()
    loss, parts = train_at.at_loss(
        None, logits_adv, y, args_of("--loss", "pgd", "--label-smoothing", "0.2")
    )
    assert math.isclose(loss.item(), slow_smoothed_ce(logits_adv, y, 0.2), rel_tol=1e-12)
    assert parts["loss_clean"] == 0


@pytest.mark.parametrize("warmup", [0.0, 0.025, 0.3, 1.0])
def test_schedule_is_torchs_one_cycle(warmup):
    """For every number of epochs from 1 to 400. Where the peak is the very first epoch, torch
    divides by zero; ours begins at the peak.
    """
    for epochs in range(1, 401):
        args = args_of("--epochs", str(epochs), "--lr", "0.2", "--warmup-fraction", str(warmup))
        if warmup * epochs == 1:
            assert train_at.one_cycle(0, args) == (0.2, 0.85)
            continue
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.2, total_steps=epochs, pct_start=warmup
        )
        for epoch in range(epochs):
            group = optimizer.param_groups[0]
            lr, momentum = train_at.one_cycle(epoch, args)
            assert math.isclose(lr, group["lr"], rel_tol=1e-9, abs_tol=1e-12), (epochs, epoch)
            assert math.isclose(momentum, group["momentum"], rel_tol=1e-9), (epochs, epoch)
            optimizer.step()
            if epoch < epochs - 1:
                scheduler.step()


def test_schedule_has_the_base_recipes_landmarks():
    args = args_of("--epochs", "400", "--lr", "0.2")
    for epoch, lr in ((1, 0.008), (10, 0.2), (200, 0.104), (300, 0.031)):  # counted from 1
        assert train_at.one_cycle(epoch - 1, args)[0] == pytest.approx(lr, abs=5e-4)
    assert train_at.one_cycle(0, args)[1] == pytest.approx(0.95) and train_at.one_cycle(9, args)[
        1
    ] == pytest.approx(0.85)
    assert train_at.one_cycle(399, args)[1] == pytest.approx(0.95)


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_schedule_of_few_epochs_is_finite_and_below_the_peak(epochs):
    args = args_of("--epochs", str(epochs), "--lr", "0.2")
    for epoch in range(epochs):
        lr, momentum = train_at.one_cycle(epoch, args)
        assert 0 < lr <= 0.2 and 0.85 <= momentum <= 0.95


def test_the_average_is_dm_ats():
    """A plain average in float64, by DM-AT's rule, whose steps count from 1: a copy
    before the warm-up is over, then weights (1 + d) / (10 + d) up to the decay.
    """
    args = args_of("--ema-decay", "0.995")
    decays = [train_at.ema_decay_at(step, 39_200, args) for step in range(1, 39_201)]
    assert set(decays[:979]) == {0.0}  # steps 1 to 979 of 2.5 %
    assert decays[979:982] == [1 / 10, 2 / 11, 3 / 12]
    assert decays[-1] == 0.995 and decays == sorted(decays)
    model = nn.Linear(1, 1, bias=False).double()
    ema = make_average(model)
    plain = 0.0
    for step in range(1, 41):
        weight = math.sin(step)
        since = step - 0.025 * 400
        decay = min(0.995, (1 + since) / (10 + since)) if since >= 0 else 0.0
        plain = decay * plain + (1 - decay) * weight
        with torch.no_grad():
            model.weight.fill_(weight)
        update_average(ema, model, train_at.ema_decay_at(step, 400, args))
        assert math.isclose(ema.weight.item(), plain, rel_tol=1e-12)


def test_parameter_groups_cover_everything_once_and_spare_batchnorm():
    model, head = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), nn.Linear(2, 3)
    decayed, spared = models.parameter_groups([model, head], 5e-4, biases=True)
    assert [id(p) for p in spared["params"]] == [id(p) for p in model[1].parameters()]
    assert {id(p) for p in decayed["params"]} == {
        id(p) for p in (*model[0].parameters(), *head.parameters())
    }
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0)
    decayed, spared = models.parameter_groups([model, head], 5e-4, biases=False)  # adamw
    assert [p.ndim for p in decayed["params"]] == [4, 2] and [p.ndim for p in spared["params"]] == [
        1
    ] * 4


def test_alignment_is_the_mean_cosine():
    torch.manual_seed(0)
    head, features = nn.Linear(3, 4), [torch.randn(5, 3), torch.randn(5, 3)]
    targets = torch.randn(5, 4)
    cosines = []
    for f in features:
        for a, b in zip(head(f).tolist(), targets.tolist()):
            dot = sum(p * q for p, q in zip(a, b))
            cosines.append(
                dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))
            )
    args = train_at_aux.parse_args([])
    loss = train_at_aux.alignment_loss(head, features, targets, args)
    assert loss.item() == pytest.approx(1 - sum(cosines) / 10, abs=1e-6)
    assert train_at_aux.cosine_loss(targets, 3 * targets).item() == pytest.approx(0, abs=1e-6)


def test_contrastive_loss_is_infonce():
    """Against -log of the own target's share, plainly in float64."""
    torch.manual_seed(0)
    head, features, targets = (
        nn.Linear(3, 4),
        [torch.randn(5, 3), torch.randn(5, 3)],
        torch.randn(5, 4),
    )
    losses = []
    for f in features:
        a, b = (
            v.detach().double() / v.detach().double().norm(dim=1, keepdim=True)
            for v in (head(f), targets)
        )
        shares = torch.exp(a @ b.T / 0.1)
        losses += [-math.log(shares[i, i] / shares[i].sum()) for i in range(5)]
    args = train_at_aux.parse_args(["--align-loss", "contrastive"])
    loss = train_at_aux.alignment_loss(head, features, targets, args)
    assert loss.item() == pytest.approx(sum(losses) / 10, rel=1e-5)
    one_image = train_at_aux.contrastive_loss(head(features[0][:1]), targets[:1])
    assert one_image.item() == pytest.approx(0)  # there is nothing to tell it from
    output = torch.randn(5, 4)
    in_float32 = train_at_aux.contrastive_loss(output, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(train_at_aux.contrastive_loss(output, targets), in_float32)


def teacher_of(diffusion_dir, *argv):
    args = train_at_aux.parse_args(["--block", "mid_block", *argv])
    return train_at_aux.Teacher(load_diffusion(diffusion_dir, "cpu"), args)


def test_targets_are_the_frozen_networks_centred_features_of_the_noised_clean_image(diffusion_dir):
    teacher = teacher_of(diffusion_dir, "--sigma", "0.2")
    x = torch.rand(3, 1, 8, 8)
    y = torch.tensor([1, 2, 3])
    noise = teacher.noise(3, 0, "teacher", 5)
    assert noise.shape == x.shape
    expected = torch.randn(x.shape, generator=data.stream(0, "teacher", 5))
    assert torch.equal(noise, expected)
    teacher.mean = torch.randn(16)
    targets = teacher.targets(x, y, noise)
    feats = teacher.network.features(x, 0.2, None, ["mid_block"], noise)[0]
    assert torch.equal(targets, feats - teacher.mean) and not targets.requires_grad
    labelled = teacher_of(diffusion_dir, "--sigma", "0.2", "--teacher-label", "true")
    told = teacher.network.features(x, 0.2, y, ["mid_block"], noise)[0]
    assert torch.equal(labelled.targets(x, y, noise), told) and not torch.equal(told, feats)


def test_target_mean_is_that_of_the_training_images(diffusion_dir):
    images, labels = data.load_train(DATASETS["digits"], None, 400)[0]
    teacher = teacher_of(diffusion_dir, "--sigma", "0.01")
    noise = torch.zeros(600, 1, 8, 8)
    noiseless = teacher.network.features(data.to_x(images), 0.01, None, ["mid_block"], noise)[0]
    teacher.center(images, labels, seed=0, rank=0, world_size=1)
    assert torch.allclose(teacher.mean, noiseless.mean(0), rtol=0.02, atol=1e-3)


def test_target_mean_is_of_the_first_10_000_images():
    """Over a network whose feature is the image itself. The last 300 of 10,300 are white."""

    class Identity:
        device = torch.device("cpu")
        noise_shape = (1, 1, 1)
        default_block = "x"
        default_sigma = 1.0

        def features(self, x, sigma, label, blocks, noise):
            return [x.flatten(1)]

    teacher = train_at_aux.Teacher(Identity(), train_at_aux.parse_args([]))
    images = np.random.default_rng(0).integers(0, 100, (10_300, 1, 1, 1), dtype=np.uint8)
    images[10_000:] = 255
    teacher.center(images, np.zeros(10_300, np.int64), seed=0, rank=0, world_size=1)
    assert teacher.mean.item() == pytest.approx(images[:10_000].mean() / 255, rel=1e-4)


def test_the_default_place_of_our_own_networks(diffusion_dir):
    network = load_diffusion(diffusion_dir, "cpu")
    assert (network.default_block, network.default_sigma) == ("up_blocks.0.resnets.0", 0.1)


@pytest.mark.parametrize("label", ["none", "true"])
def test_every_third_image_is_aligned(label, diffusion_dir, synthetic_dir, tmp_path, monkeypatch):
    """One step of the script itself against plain code in float64: loss and gradient.

    The features that are aligned come from a pass of their own: no other loss has a gradient there.
    """
    seen = {"feats": [], "losses": []}
    loss_of, align, load = (
        train_at_aux.adversarial_loss,
        train_at_aux.alignment_loss,
        train_at_aux.load_teacher,
    )

    def with_features(model, twin, x, y, *others):
        loss, metrics, x_adv, feats = loss_of(model, twin, x, y, *others)
        feats[0].retain_grad()
        seen["feats"].append((x, y, feats[0]))
        return loss, metrics, x_adv, feats

    def with_head(head, *others):
        seen["head"] = head
        seen["losses"].append(align(head, *others))
        return seen["losses"][-1]

    def with_teacher(*others):
        seen["teacher"] = load(*others)
        return seen["teacher"]

    monkeypatch.setattr(train_at_aux, "adversarial_loss", with_features)
    monkeypatch.setattr(train_at_aux, "alignment_loss", with_head)
    monkeypatch.setattr(train_at_aux, "load_teacher", with_teacher)
    # The rate is as good as 0: the head's weights after the step are those in it.
    argv = "--epochs 1 --epoch-images 14 --batch-size 14 --accumulate 2 --loss pgd --align clean"
    argv += " --n-steps 1 --eval-n-steps 1 --lr 1e-30 --block mid_block --teacher-every 3"
    argv += f" --teacher-label {label}"
    argv += f" --teacher {diffusion_dir} --synthetic {synthetic_dir} --out-dir {tmp_path / 'run'}"
    train_at_aux.main(train_at_aux.parse_args(argv.split()))

    teacher = seen["teacher"]
    noise = torch.randn(14, 1, 8, 8, generator=data.stream(0, "teacher", 0))
    head = copy.deepcopy(seen["head"]).double()
    head.zero_grad()
    for part, (x, y, feats) in enumerate(seen["feats"]):
        f = feats.detach().double().requires_grad_(True)
        losses = []
        for i in (0, 3, 6):
            one = noise[2 * i + part][None]
            told = y[i : i + 1] if label == "true" else None
            (target,) = teacher.network.features(
                x[i : i + 1], teacher.sigma, told, ["mid_block"], one
            )
            target = (target[0] - teacher.mean).double()
            h = head(f[i])
            losses.append(1 - (h @ target) / (h @ h).sqrt() / (target @ target).sqrt())
        loss = sum(losses) / 3
        (loss / 2).backward()
        assert seen["losses"][part].item() == pytest.approx(loss.item(), abs=1e-6)
        assert (feats.grad - f.grad).norm() < 1e-5 * f.grad.norm()
        assert not feats.grad[[1, 2, 4, 5]].any() and feats.grad[[0, 3, 6]].any()
    for mine, plain in zip(seen["head"].parameters(), head.parameters()):
        assert (mine.grad - plain.grad).norm() < 1e-5 * plain.grad.norm()


def test_head_is_a_three_layer_silu_mlp():
    args = train_at_aux.parse_args(["--head-width", "256"])
    head = train_at_aux.alignment_head(64, 48, args)
    assert [type(m).__name__ for m in head] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)] == [
        (256, 64),
        (256, 256),
        (48, 256),
    ]


def test_trades_with_running_statistics_attacks_first(in_float64):
    """Against plain code in TRADES' order: the attack in eval mode, then the two passes of the loss
    in train mode. The other order would attack statistics that its own batch has moved.
    """
    torch.manual_seed(0)
    ours = models.build("wrn-10-1", DATASETS["digits"]).double().train()
    plain = copy.deepcopy(ours)
    x, y = torch.rand(32, 1, 8, 8).double(), torch.arange(32) % 10
    start = attacks.random_start(x.shape, "linf", 0.15, torch.Generator().manual_seed(0))
    args = args_of("--attack-bn", "running", "--n-steps", "3")
    twin = attacks.make_twin(ours, "running", "fp32")
    loss, _, x_adv = train_at.adversarial_loss(ours, twin, x, y, start, args)
    loss.backward()

    plain.eval()
    target = plain(x).softmax(1).detach()
    x_plain = (x + start).clamp(0, 1)
    for _ in range(3):
        x_plain.requires_grad_(True)
        distance = F.kl_div(plain(x_plain).log_softmax(1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(distance, x_plain)
        stepped = x_plain.detach() + args.step_size * gradient.sign()
        x_plain = torch.min(torch.max(stepped, x - 0.15), x + 0.15).clamp(0, 1)
    plain.train()
    logits, logits_adv = plain(x), plain(x_plain)
    log_p, log_p_adv = logits.log_softmax(1), logits_adv.log_softmax(1)
    expected = F.cross_entropy(logits, y, label_smoothing=0.1)
    expected = expected + 5 * (log_p.exp() * (log_p - log_p_adv)).sum(1).mean()
    expected.backward()

    assert torch.equal(x_adv, x_plain)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-12)
    for mine, theirs in zip(ours.buffers(), plain.buffers()):
        assert torch.allclose(mine, theirs)


def test_the_shared_clean_pass_is_exact():
    """One clean pass for both the attack's reference and the loss gives the gradients of plain code
    with a pass for each.
    """
    torch.manual_seed(0)
    ours = models.build("wrn-10-1", DATASETS["digits"])
    plain = copy.deepcopy(ours)
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    start = attacks.random_start(x.shape, "linf", 0.15, torch.Generator().manual_seed(0))

    logits = ours(x)
    attack = dict(norm="linf", eps=0.15, step_size=0.05, n_steps=3, loss="kl")
    twin = attacks.make_twin(ours, "batch", "fp32")
    x_adv = attacks.pgd(twin, x, y, start, reference=logits.detach(), **attack)
    train_at.at_loss(logits, ours(x_adv), y, args_of())[0].backward()

    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0  # batch statistics, running ones untouched
    with torch.no_grad():
        target = plain(x).softmax(1)
    x_plain = (x + start).clamp(0, 1)
    for _ in range(3):
        x_plain.requires_grad_(True)
        F.kl_div(plain(x_plain).log_softmax(1), target, reduction="sum").backward()
        stepped = x_plain.detach() + 0.05 * x_plain.grad.sign()
        x_plain = torch.min(torch.max(stepped, x - 0.15), x + 0.15).clamp(0, 1)
    for norm in norms:
        norm.momentum = 0.1
    plain.zero_grad()
    train_at.at_loss(plain(x), plain(x_plain), y, args_of())[0].backward()

    assert (x_adv - x_plain).abs().gt(
        1e-6
    ).float().mean() < 0.01  # rounding may turn the sign of a vanishing gradient
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=2e-4), name
    for (name, a), b in zip(ours.named_buffers(), plain.buffers()):
        if "running" in name:
            assert torch.allclose(a, b, atol=1e-4), name


def test_shared_functions_are_word_for_word_the_same():
    """The two scripts repeat each other on purpose; what they share may not drift."""
    changed = {"parse_args", "check_flags", "adversarial_loss", "check_sizes", "main"}
    functions = dict(inspect.getmembers(train_at, inspect.isfunction))
    shared = {name for name in functions if functions[name].__module__ == "train_at"} - changed
    assert {"at_loss", "attack_in_training", "one_cycle", "set_schedule", "validate"} <= shared
    for name in shared:
        source = inspect.getsource(functions[name])
        assert source == inspect.getsource(getattr(train_at_aux, name)), name


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_two_scripts_have_one_recipe(dataset):
    """DRA's own flags apart, whatever the network."""
    for flags in ([], ["--model", "vit-b-2"]):
        both = (
            vars(script.parse_args(["--dataset", dataset, *flags]))
            for script in (train_at, train_at_aux)
        )
        plain, aligned = both
        shared = plain.keys() - {"out_dir"}
        assert {key: aligned[key] for key in shared} == {key: plain[key] for key in shared}


def test_the_recipe_of_digits():
    args = train_at.parse_args([])
    names = ("model", "n_steps", "epochs", "batch_size", "eval_n_steps", "eval_every", "lr")
    assert [getattr(args, name) for name in names] == ["wrn-10-1", 5, 100, 128, 20, 10, 0.2]


def test_the_diff_of_the_two_scripts_is_small():
    """It shows DRA and nothing else: hardly a line of train_at.py is changed."""
    diff = subprocess.run(
        ["diff", "train_at.py", "train_at_aux.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    removed = [line for line in diff if line.startswith("<")]
    added = [line for line in diff if line.startswith(">")]
    assert len(removed) <= 25
    assert len(removed) + len(added) <= 190
