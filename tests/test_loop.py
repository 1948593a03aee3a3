"""What the loop of the two training scripts does at each step, against plain code.

Alone: python -m pytest tests/test_loop.py
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, read_log
from test_train import TINY, run_at, run_aux
from torch import nn

import train_at
import train_at_aux
from common import attacks, data, files, models
from teachers.load import load_diffusion


def at_each_step(monkeypatch, look):
    """Call look(model) before each step, of the model in training."""
    update_twin = attacks.update_twin

    def look_and_update(twin, model):
        look(model)
        update_twin(twin, model)

    monkeypatch.setattr(attacks, "update_twin", look_and_update)


def test_the_average_is_that_of_the_weights_of_all_steps(tmp_path, monkeypatch):
    """By DM-AT's rule in float64; it is what is validated and what best.pt has."""
    weights = []
    at_each_step(monkeypatch, lambda model: weights.append(copy.deepcopy(model.state_dict())))
    state = run_at(tmp_path / "run")
    weights.append(state["model"])
    best = files.load(tmp_path / "run" / "best.pt", {})
    assert len(weights) == 17  # 16 steps
    for name in ("init_conv.weight", "logits.bias"):
        average = weights[0][name].double()
        for step in range(1, 17):
            since = step - 4  # a quarter is warm-up
            decay = min(0.995, (1 + since) / (10 + since)) if since >= 0 else 0.0
            average = decay * average + (1 - decay) * weights[step][name].double()
            if step == best["step"]:
                assert torch.allclose(best["weights"][name].double(), average, atol=1e-6)
        assert torch.allclose(state["ema"][name].double(), average, atol=1e-6)
        assert not torch.allclose(state["model"][name].double(), average, atol=1e-4)


class Linear(nn.Module):
    """Two classes. The logit of class 0 is w x + b for the pixels x of an image, that of 1 is 0."""

    def __init__(self, w, b):
        super().__init__()
        self.w = torch.tensor(w)
        self.b = b

    def forward(self, x):
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([score, torch.zeros_like(score)], 1)


@pytest.mark.parametrize("norm,length", [("linf", 3.5), ("l2", 2.5**0.5 * 1.5)])
def test_validation_has_the_accuracies_of_the_closed_form(norm, length):
    """An image is robust if its score is above eps times the dual norm of the weights."""
    w = [1.0, -0.5, 2.0, 0.0] if norm == "linf" else [1.5, -1.5, 0.75, 0.75]
    assert torch.tensor(w).norm(p={"linf": 1, "l2": 2}[norm]).item() == pytest.approx(length)
    model = Linear(w, b=-0.5 * sum(w))  # its boundary goes through grey
    eps = 0.1
    in_reach = [-0.3, -0.02, 0.2, 0.6, 0.9, 1.1, 1.5, 2.0, 1.01, 0.99]  # score / (eps * length)
    scores = torch.tensor(in_reach) * eps * length
    x = torch.full((10, 1, 2, 2), 0.5)
    x += (
        (scores - model(x)[:, 0])[:, None, None, None]
        * torch.tensor(w).view(1, 2, 2)
        / sum(v * v for v in w)
    )
    assert torch.allclose(model(x)[:, 0], scores, atol=1e-6)
    assert x.min() > eps and x.max() < 1 - eps  # the box does not bind
    y = torch.zeros(10, dtype=torch.int64)
    flags = f"--norm {norm} --eps {eps} --eval-n-steps 20 --val-size 10"
    args = train_at.parse_args(flags.split())
    start = attacks.random_start(x.shape, norm, eps, data.stream(0, "validation", 0))
    assert train_at.validate(model, x, y, start, 4, args) == pytest.approx((0.8, 0.4))
    args.eps = 0.05  # half the reach
    assert train_at.validate(model, x, y, start / 2, 4, args) == pytest.approx((0.8, 0.7))
    broken = Linear(w, b=math.nan)  # argmax would call its images class 0, which they are
    assert train_at.validate(broken, x, y, start, 4, args) == [0, 0]


@pytest.mark.parametrize("loss,expected", [("trades", 12), ("standard", 16)])
def test_the_best_checkpoint_is_the_most_robust_one(loss, expected, tmp_path, monkeypatch):
    """Of equals the more accurate one. Without an attack in training it is the most accurate."""
    accuracies = iter([(0.5, 0.2), (0.4, 0.3), (0.6, 0.3), (0.9, 0.1)])
    monkeypatch.setattr(train_at, "validate", lambda *args: next(accuracies))
    flags = f"--loss {loss} --epochs 4 --batch-size 200 --eval-every 1 --out-dir {tmp_path}/run"
    flags += "" if loss == "standard" else " --n-steps 1"
    train_at.main(train_at.parse_args(flags.split()))
    best = files.load(tmp_path / "run" / "best.pt", {})
    assert best["step"] == expected
    steps = {line["step"]: line for line in read_log(tmp_path / "run")}
    assert best["val_clean_acc"] == steps[expected]["clean_acc"]


@pytest.mark.parametrize("norm,eps", [("linf", 0.15), ("l2", 0.5)])
@pytest.mark.parametrize("loss", ["trades", "pgd"])
def test_the_attack_in_training_is_that_of_the_flags(loss, norm, eps):
    """TRADES' maximises the KL to the clean prediction, PGD-AT's the cross-entropy."""
    torch.manual_seed(0)
    model = models.build("wrn-10-1", DIGITS).train()
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    argv = ["--loss", loss, "--norm", norm, "--eps", str(eps), "--n-steps", "3"]
    args = train_at.parse_args(argv)
    start = attacks.random_start(x.shape, norm, eps, data.stream(0, "attack", 0))
    twin = attacks.make_twin(model, "batch", "fp32")
    x_adv = train_at.adversarial_loss(model, twin, x, y, start, args)[2]
    more = {"loss": "ce"}
    if loss == "trades":
        more = {"loss": "kl", "reference": model(x).detach()}
    settings = dict(norm=norm, eps=eps, step_size=eps / 4, n_steps=3)
    assert torch.equal(x_adv, attacks.pgd(twin, x, y, start, **settings, **more))
    distance = (x_adv - x).flatten(1).norm(p={"linf": math.inf, "l2": 2}[norm], dim=1)
    assert (distance <= eps + 1e-6).all() and distance.max() > 0.9 * eps


def gradients_of_first_step(script, monkeypatch, run):
    """[gradients of each module's parameters] as the optimiser gets them in the first step."""
    make_optimizer = script.make_optimizer
    seen = []

    def make_watched(modules, args):
        optimizer = make_optimizer(modules, args)

        def look(*_):
            parts = [[p.grad.clone() for p in module.parameters()] for module in modules]
            seen.append([torch.cat([g.flatten() for g in part]) for part in parts])

        optimizer.register_step_pre_hook(look)
        return optimizer

    monkeypatch.setattr(script, "make_optimizer", make_watched)
    run()
    monkeypatch.setattr(script, "make_optimizer", make_optimizer)
    return seen[0]


def test_clipping_is_of_the_classifier_alone(tmp_path, diffusion_dir, monkeypatch):
    flags = ["--aux-weight", "50", "--epochs", "1"]
    found = {}
    for name, more in (("free", []), ("clipped", ["--clip-norm", "0.1"])):
        found[name] = gradients_of_first_step(
            train_at_aux,
            monkeypatch,
            lambda name=name, more=more: run_aux(tmp_path / name, diffusion_dir, *flags, *more),
        )
    assert found["free"][0].norm() > 1
    assert found["clipped"][0].norm().item() == pytest.approx(0.1, rel=1e-4)
    expected = found["free"][0] * (0.1 / found["free"][0].norm())
    assert torch.allclose(found["clipped"][0], expected, atol=1e-6)
    assert torch.equal(found["clipped"][1], found["free"][1]) and found["free"][1].any()


def test_optimisers_have_the_settings_of_the_flags():
    model = models.build("wrn-10-1", DIGITS)
    n_batchnorm = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    args = train_at.parse_args("--lr 0.3 --weight-decay 0.01".split())
    sgd = train_at.make_optimizer([model], args)
    assert sgd.defaults["nesterov"] and sgd.defaults["momentum"] == 0.95
    flags = "--optimizer adamw --lr 0.3 --weight-decay 0.01"
    adamw = train_at.make_optimizer([model], train_at.parse_args(flags.split()))
    assert list(adamw.defaults["betas"]) == [0.9, 0.95]
    for optimizer, n_spared in ((sgd, 2 * n_batchnorm), (adamw, 2 * n_batchnorm + 1)):
        decayed, spared = optimizer.param_groups
        assert decayed["weight_decay"] == 0.01 and spared["weight_decay"] == 0
        assert len(spared["params"]) == n_spared  # weights and biases; adamw's also the last bias
        assert decayed["lr"] == spared["lr"] == 0.3
        assert len(decayed["params"] + spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("script", ["train_at", "train_at_aux"])
def test_batchnorm_begins_with_the_first_batch_unless_weights_were_loaded(
    script, tmp_path, monkeypatch, diffusion_dir
):
    """In every step the twin is brought up to date once."""
    momenta = []
    at_each_step(monkeypatch, lambda model: momenta.append(model.batchnorm.momentum))

    def train(name, *more):
        flags = ("--epochs", "1", *more)
        if script == "train_at":
            return run_at(tmp_path / name, *flags)
        return run_aux(tmp_path / name, diffusion_dir, *flags)

    train("run")
    assert momenta == [1.0, 0.01, 0.01, 0.01]
    momenta.clear()
    train("init", "--init", str(tmp_path / "run" / "best.pt"))
    assert momenta == [0.01] * 4


def test_the_loss_has_the_labels_of_the_mixed_images(tmp_path, monkeypatch):
    adversarial_loss = train_at.adversarial_loss
    mix = data.mix
    mixed, trained = [], []

    def watch_mix(*args):
        mixed.append(mix(*args))
        return mixed[-1]

    def watch_loss(model, twin, x, y, *others):
        trained.append((x, y))
        return adversarial_loss(model, twin, x, y, *others)

    monkeypatch.setattr(data, "mix", watch_mix)
    monkeypatch.setattr(train_at, "adversarial_loss", watch_loss)
    run_at(tmp_path / "run", "--epochs", "1", "--mixup", "0.8", "--cutmix", "1")
    assert len(mixed) == len(trained) == 4
    for (x_mixed, y_mixed), (x, y) in zip(mixed, trained):
        assert torch.equal(x, x_mixed) and torch.equal(y, y_mixed)
        assert y.shape == (200, 10) and torch.allclose(y.sum(1), torch.ones(200))


def test_all_randomness_comes_from_the_seed_and_the_step(
    tmp_path, diffusion_dir, synthetic_dir, monkeypatch
):
    """Each draw has a stream of the run's seed; those of a step are of that step."""
    seed_of = data.seed_of
    mix = data.mix
    drawn = {}
    mixed = []

    def watched(seed, use, step=0):
        drawn.setdefault(use, []).append((seed, step))
        return seed_of(seed, use, step)

    def watch_mix(*args):
        mixed.append(args[3:])
        return mix(*args)

    monkeypatch.setattr(data, "seed_of", watched)
    monkeypatch.setattr(data, "mix", watch_mix)
    flags = "--seed 5 --epochs 1 --mixup 0.8 --cutmix 0.5 --synthetic".split()
    run_aux(tmp_path / "run", diffusion_dir, *flags, synthetic_dir)
    assert {seed for pairs in drawn.values() for seed, _ in pairs} == {5}
    assert {"init", "head", "teacher-mean", "validation", "order"} <= drawn.keys()
    for use in ("attack", "augment", "synthetic", "mix", "teacher"):
        assert {step for _, step in drawn[use]} == {0, 1, 2, 3}, use
    assert [args[:2] for args in mixed] == [(0.8, 0.5)] * 4
    assert len({args[2] for args in mixed}) == 4


def test_the_weight_counts_once(tmp_path, diffusion_dir):
    """Of a run of one step: the alignment is the same, and the loss has it times the weight."""
    logs = []
    for weight in (1, 3):
        flags = ["--epochs", "1", "--epoch-images", "200", "--aux-weight", str(weight)]
        run_aux(tmp_path / str(weight), diffusion_dir, *flags)
        (log,) = read_log(tmp_path / str(weight))
        assert log["loss"] == pytest.approx(
            log["loss_clean"] + 5 * log["loss_robust"] + weight * log["loss_aux"], rel=1e-5
        )
        logs.append(log)
    assert logs[0]["loss_aux"] == pytest.approx(logs[1]["loss_aux"], rel=1e-6)


def test_the_logged_cosine_is_that_of_held_out_images(tmp_path, diffusion_dir):
    """Of model and head in training, at the end, with the one draw of noise that they keep."""
    flags = ["--epochs", "1", "--no-center-targets"]
    state = run_aux(tmp_path / "run", diffusion_dir, *flags)
    args = train_at_aux.parse_args([*TINY, "--teacher", diffusion_dir, "--block", "mid_block"])
    model = models.build("wrn-10-1", DIGITS).eval()
    model.load_state_dict(state["model"])
    teacher = train_at_aux.Teacher(load_diffusion(diffusion_dir, "cpu"), args)
    _, (images, labels) = data.load_train(DIGITS, None, 200)
    x = data.to_x(images)
    noise = teacher.noise(200, 0, "validation-teacher", 0)
    targets = teacher.targets(x, torch.from_numpy(labels), noise)
    head = train_at_aux.alignment_head(model.num_features, targets.shape[1], args)
    head.load_state_dict(state["head"])
    with torch.no_grad():
        cosines = F.cosine_similarity(head(model(x, with_features=True)[1]), targets)
    (line,) = read_log(tmp_path / "run")
    assert line["val_align"] == pytest.approx(cosines.mean().item(), abs=1e-5)
