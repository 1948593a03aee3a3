"""What makes training fast or large leaves its losses as they are: precision, compilation,
accumulation, fused updates.

And what a run may start or go on with: other weights, another number of processes. Alone: python -m
pytest tests/test_switches.py
"""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import DIGITS, assert_equal_states, python, read_log
from test_train import GOLDEN, TINY, run_at, run_aux
from torch.utils._python_dispatch import TorchDispatchMode

import analyze
import evaluate
import extract_features
import generate_synthetic
import train_at
import train_at_aux
import train_diffusion
from common import UserError, attacks, data, files, models
from common.run import autocast
from published.datasets import DATASETS
from published.synthetic import open_synthetic
from published.weights import load_classifier


def golden(script):
    return json.loads(GOLDEN.read_text())[script]


def losses(path, key="loss"):
    return [line[key] for line in read_log(path)]


def test_bf16_keeps_the_golden_losses_and_the_state_in_fp32(tmp_path, diffusion_dir, synthetic_dir):
    """To 0.005: eight bits of mantissa in the passes; loss, weights, averages and optimiser state
    stay float32.
    """
    state = run_at(tmp_path / "at", "--precision", "bf16")
    assert losses(tmp_path / "at") == pytest.approx(golden("train_at"), abs=5e-3) and losses(
        tmp_path / "at"
    ) != golden("train_at")
    assert all(t.dtype == torch.float32 for t in state["model"].values() if t.is_floating_point())
    run_aux(
        tmp_path / "aux",
        diffusion_dir,
        "--synthetic",
        synthetic_dir,
        "--align",
        "both",
        "--precision",
        "bf16",
    )
    assert losses(tmp_path / "aux") == pytest.approx(golden("train_at_aux"), abs=2e-2)
    cosines = [1 - loss for loss in losses(tmp_path / "aux", "loss_aux")]
    assert cosines == pytest.approx(golden("align"), abs=2e-2)


def test_the_default_precision_is_that_of_the_device_and_the_task(monkeypatch):
    def defaults():
        evaluated = ["--checkpoint", "best.pt"]
        analyzed = ["--model", "a=best.pt"]
        return [
            train_at_aux.parse_args(["--dataset", "imagenet"]).precision,
            train_diffusion.parse_args([]).precision,
            generate_synthetic.parse_args([]).precision,
            extract_features.parse_args([]).precision,
            evaluate.parse_args(evaluated).precision,
            analyze.parse_args(analyzed).precision,
        ]

    assert defaults() == ["fp32"] * 6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert defaults() == ["bf16"] * 4 + ["tf32"] * 2
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert defaults() == ["fp32"] * 6


class Watch(TorchDispatchMode):
    """Counts casts of 3 x 3 weights to bf16, and keeps the types that operations compute in."""

    def __init__(self):
        super().__init__()
        self.n_casts = 0
        self.types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "_to_copy" and result.dtype == torch.bfloat16:
            self.n_casts += result.shape[-1] == 3
        if name == "_foreach_copy_":
            self.n_casts += sum(tensor.shape[-1] == 3 for tensor in args[0])
        if name in ("convolution", "native_batch_norm", "addmm", "_log_softmax", "mean"):
            self.types.add(
                (name, args[0].dtype, args[1].dtype if torch.is_tensor(args[1]) else None)
            )
        return result


@pytest.mark.parametrize("n_steps", ["1", "4"])
def test_bf16_is_for_convolutions_alone(n_steps):
    """The statistics and weights of BatchNorm, the last layer and the losses are float32. A weight
    is cast twice in a step, for the attack and for the loss, whatever the number of passes.
    """
    args = train_at.parse_args(["--n-steps", n_steps, "--precision", "bf16"])
    model = models.build("wrn-10-1", DIGITS)
    twin = attacks.make_twin(model, args.attack_bn, args.precision)
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    with Watch() as watch:
        attacks.update_twin(twin, model)
        with autocast(x.device, args.precision):
            loss, *_ = train_at.adversarial_loss(model, twin, x, y, torch.zeros_like(x), args)
        loss.backward()
    n_weights = sum(p.shape[-1] == 3 for p in model.parameters() if p.ndim == 4)
    assert watch.n_casts == 2 * n_weights == 14
    kinds = {name: set() for name, *_ in watch.types}
    for name, *dtypes in watch.types:
        kinds[name].add(tuple(dtypes))
    assert kinds["convolution"] == {(torch.bfloat16, torch.bfloat16)}
    assert kinds["native_batch_norm"] == {(torch.bfloat16, torch.float32)}
    assert {first for first, _ in kinds["addmm"] | kinds["_log_softmax"]} == {torch.float32}
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["wrn-10-1", "preact-18", "resnet-18"])
def test_features_are_averaged_over_space_in_float32(name):
    """They are no numbers of bfloat16, as an average in bf16 would be."""
    model = models.build(name, DATASETS["cifar10"])
    x = torch.rand(2, 3, 32, 32)
    with autocast(x.device, "bf16"):
        _, feats = model(x, with_features=True)
    assert feats.dtype == torch.float32
    assert (feats != feats.bfloat16().float()).float().mean() > 0.9


def test_compiled_losses_are_those_without_the_compiler(tmp_path):
    """To 1e-3, in one epoch; what is saved has no trace of the compiler."""
    state = run_at(tmp_path / "run", "--compile", "--epochs", "1", "--n-steps", "1")
    plain = run_at(tmp_path / "plain", "--epochs", "1", "--n-steps", "1")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
    assert state["model"].keys() == plain["model"].keys()


@pytest.mark.parametrize(
    "flags",
    [
        "--align both --accumulate 2 --attack-bn running",
        "--loss pgd --attack apgd --align clean --accumulate 2 --mixup 0.5",
        "--loss pgd --align both --precision bf16",
        "--norm l2 --align both --precision bf16 --attack-bn running",
    ],
)
def test_no_flags_make_the_compiler_give_up(flags, tmp_path, monkeypatch, diffusion_dir):
    """Where a function is compiled anew too often, torch.compile goes on without it and says so.
    Here that is an error. The tracer is the real one, its backend runs eagerly.
    """
    flags += " --epochs 2"
    torch._dynamo.reset()
    attacks._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run_aux(tmp_path / "run", diffusion_dir, "--compile", *flags.split())
    attacks._compiled.cache_clear()
    run_aux(tmp_path / "plain", diffusion_dir, *flags.split())
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=2e-3)


def test_without_a_compiler_compile_is_one_line(tmp_path):
    argv = ["train_at.py", *TINY, "--compile", "--out-dir", tmp_path / "run"]
    done = python(*argv, expect=2, env={"CXX": "/nowhere/g++"}, real=True)
    assert done.stderr.strip().splitlines()[-1].startswith("train_at.py: error: --compile: ")
    assert not (tmp_path / "run").exists()


def without_batchnorm(monkeypatch):
    from ranks_helper import without_batch_statistics

    build = models.build
    monkeypatch.setattr(models, "build", lambda *args: without_batch_statistics(build(*args)))


@pytest.mark.parametrize("script", ["at", "aux"])
def test_accumulated_parts_add_up_to_the_batch(script, tmp_path, monkeypatch, diffusion_dir):
    """Without batch statistics, four parts of a batch give the loss and the weights of the whole,
    to rounding.
    """
    without_batchnorm(monkeypatch)
    states = []
    for parts in ("1", "4"):
        argv = ["--accumulate", parts, "--epochs", "2"]
        states.append(
            run_at(tmp_path / parts, *argv)
            if script == "at"
            else run_aux(tmp_path / parts, diffusion_dir, *argv)
        )
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), abs=1e-4)
    for key, value in states[0]["model"].items():
        assert torch.allclose(value, states[1]["model"][key], atol=1e-4), key
    with pytest.raises(
        UserError, match="--batch-size 200: not divisible by 1 processes with --accumulate 3"
    ):
        run_at(tmp_path / "x", "--accumulate", "3")


def test_fused_updates_are_the_same_updates(tmp_path, monkeypatch, request):
    """The optimisers are fused; torch's plain loops over the parameters give the golden losses too,
    to 1e-4.
    """
    for name in ("SGD", "AdamW"):
        real = getattr(torch.optim, name)
        monkeypatch.setattr(
            torch.optim, name, lambda *a, real=real, **k: real(*a, **k | {"fused": False})
        )
    run_at(tmp_path / "sgd")
    assert losses(tmp_path / "sgd") == pytest.approx(golden("train_at"), abs=1e-4)
    run_at(tmp_path / "fused", "--optimizer", "adamw", "--lr", "0.001", "--epochs", "1")
    monkeypatch.undo()
    run_at(tmp_path / "plain", "--optimizer", "adamw", "--lr", "0.001", "--epochs", "1")
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


# ------------------------------------------------------------------------------------------ recipes


def assert_settings(args, **expected):
    assert {name: getattr(args, name) for name in expected} == expected


def test_the_base_schedule_over_all_its_steps():
    """39,200 steps of the CIFAR-10 recipe, against the order of things in DM-AT's code.

    There torch's OneCycleLR steps once per epoch of 98 steps. The average copies the model for the
    first 2.5 % of the steps, then follows it with min(0.995, (1 + d) / (10 + d)).
    """
    args = train_at.parse_args(["--dataset", "cifar10"])
    assert_settings(
        args,
        model="wrn-28-10",
        loss="trades",
        beta=5,
        label_smoothing=0.1,
        mixup=0,
        cutmix=0,
        eps=8 / 255,
        step_size=2 / 255,
        n_steps=10,
        attack_bn="batch",
        optimizer="sgd",
        epochs=400,
        batch_size=512,
        lr=0.2,
        weight_decay=5e-4,
        clip_norm=None,
        bn_momentum=0.01,
        ema_decay=0.995,
        val_size=None,  # open_dataset knows it
        eval_every=1,
        eval_n_steps=40,
    )
    steps_per_epoch = math.ceil(args.epoch_images / args.batch_size)  # as main has it
    optimizer = torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=400, pct_start=0.025
    )
    step, train_steps = 0, 400 * steps_per_epoch  # step: finished ones
    assert train_steps == 39_200
    for epoch in range(400):
        group = optimizer.param_groups[0]
        for _ in range(steps_per_epoch):
            lr, momentum = train_at.one_cycle(step // steps_per_epoch, args)
            assert math.isclose(lr, group["lr"], rel_tol=1e-9, abs_tol=1e-12) and math.isclose(
                momentum, group["momentum"], rel_tol=1e-9
            )
            step += 1
            since = step - 0.025 * train_steps
            expected = 0.0 if step < 980 else min(0.995, (1 + since) / (10 + since))
            assert train_at.ema_decay_at(step, train_steps, args) == expected
        optimizer.step()
        if epoch < 399:
            scheduler.step()


def test_the_batch_of_the_base_recipe_is_154_real_and_358_synthetic(synthetic_dir):
    args = train_at.parse_args(["--dataset", "cifar10", "--synthetic", synthetic_dir])
    images, labels = np.zeros((1000, 8, 8, 1), np.uint8), np.full(1000, 3)
    synthetic = open_synthetic([synthetic_dir], DIGITS)
    batches = data.make_batches(DIGITS, (images, labels), args, "cpu", 0, 1, synthetic)
    x, _ = batches(0)
    is_real = (x == 0).flatten(1).all(1)
    assert (int(is_real.sum()), int((~is_real).sum())) == (154, 358)


def test_warmup_and_cosine():
    """Linear to the peak over the warm-up, half a cosine to the final rate: against the plain
    formula at every step.
    """
    args = train_at.parse_args(["--dataset", "imagenet"])
    assert_settings(
        args,
        loss="pgd",
        attack="apgd",
        n_steps=2,
        attack_bn="running",
        eps=4 / 255,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        optimizer="adamw",
        lr=1e-3,
        final_lr=5e-6,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        ema_decay=0.9999,
    )
    rates = [train_at.warmup_cosine(step, 1000, args) for step in range(1000)]
    assert rates[:100] == pytest.approx([1e-3 * (s + 1) / 100 for s in range(100)])
    assert rates[100:] == pytest.approx(
        [
            5e-6 + (1e-3 - 5e-6) * (1 + math.cos(math.pi * (s - 100) / 899)) / 2
            for s in range(100, 1000)
        ]
    )
    assert rates[-1] == pytest.approx(5e-6) and max(rates) == rates[99] == rates[100]
    args.warmup_fraction = 0
    assert train_at.warmup_cosine(0, 10, args) == pytest.approx(1e-3)
    assert all(0 < train_at.warmup_cosine(s, n, args) <= 1e-3 for n in (1, 2, 3) for s in range(n))


@pytest.mark.parametrize("script", [train_at, train_at_aux])
def test_rates_move_by_the_step_with_adamw_and_by_the_epoch_with_sgd(script):
    weights = [torch.zeros(1, requires_grad=True)]
    adamw = torch.optim.AdamW([{"params": weights}, {"params": []}])
    sgd = torch.optim.SGD([{"params": weights}, {"params": []}])
    of_imagenet = script.parse_args(["--dataset", "imagenet"])
    of_cifar = script.parse_args(["--dataset", "cifar10", "--epochs", "10"])
    for step in range(1000):
        script.set_schedule(adamw, step, 100, 1000, of_imagenet)
        expected = script.warmup_cosine(step, 1000, of_imagenet)
        assert [group["lr"] for group in adamw.param_groups] == [expected] * 2
        script.set_schedule(sgd, step, 100, 1000, of_cifar)
        expected = script.one_cycle(step // 100, of_cifar)
        for group in sgd.param_groups:
            assert (group["lr"], group["momentum"]) == expected


def test_transformers_of_torchvision_too_but_where_the_data_set_has_a_recipe():
    for name in ("vit_b_16", "swin_t", "convnext_tiny"):
        args = train_at.parse_args(["--dataset", "cifar10", "--model", name])
        assert (args.optimizer, args.lr, args.clip_norm) == ("adamw", 1e-3, 1.0)
        args = train_at.parse_args(["--dataset", "imagenet", "--model", name])
        assert (args.optimizer, args.warmup_fraction, args.clip_norm) == ("adamw", 0.1, None)


def test_vits_have_a_recipe_of_their_own():
    vit, wrn = (
        train_at_aux.parse_args(["--dataset", "cifar10", "--model", name])
        for name in ("vit-b-2", "wrn-70-16")
    )
    assert (vit.optimizer, vit.lr, vit.weight_decay, vit.batch_size) == ("adamw", 1e-3, 0.05, 512)
    assert (wrn.optimizer, wrn.lr) == ("sgd", 0.2)
    assert (
        train_at.parse_args(["--dataset", "cifar10", "--model", "vit-b-2", "--lr", "0.3"]).lr == 0.3
    )


def test_adamw_and_a_vit_learn(tmp_path):
    """ViT-S/2 on digits, its own recipe: the loss falls, the weights stay finite, the checkpoint
    evaluates.
    """
    argv = "--model vit-s-2 --epochs 10 --batch-size 16 --n-steps 1".split()
    argv += "--eval-n-steps 1 --eval-every 5".split()
    argv += ["--out-dir", str(tmp_path / "vit"), *"--val-size 20 --n-train 16 --lr 0.0003".split()]
    train_at.main(train_at.parse_args(argv))
    assert losses(tmp_path / "vit")[-1] < losses(tmp_path / "vit")[0] - 0.1
    model, state = load_classifier(str(tmp_path / "vit" / "best.pt"), DIGITS, "cpu")
    assert state["model_name"] == "vit-s-2" and model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_apgd_mixing_and_adamw_as_for_imagenet(tmp_path, diffusion_dir):
    """The ImageNet recipe's parts on digits: CE on mixed images under APGD-2, resumed as if nothing
    had happened.
    """
    argv = "--loss pgd --attack apgd --attack-bn running --optimizer adamw --lr 0.003".split()
    argv += ["--mixup", "0.8", "--cutmix", "1.0"]
    straight = run_aux(tmp_path / "straight", diffusion_dir, *argv)
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0]
    real, calls = attacks.apgd, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise ZeroDivisionError
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(attacks, "apgd", dying)
        run_aux(tmp_path / "cut", diffusion_dir, *argv)
    assert_equal_states(run_aux(tmp_path / "cut", diffusion_dir, *argv), straight)
    unmixed = run_aux(tmp_path / "unmixed", diffusion_dir, *argv, "--mixup", "0", "--cutmix", "0")
    assert not torch.equal(unmixed["model"]["logits.weight"], straight["model"]["logits.weight"])


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--attack", "apgd"], "give --attack pgd"),
        (
            ["--teacher-label", "true", "--loss", "pgd", "--mixup", "0.8"],
            "mixed images have no true label",
        ),
        (["--optimizer", "lion"], "--optimizer"),
        (["--precision", "fp16"], "--precision"),
    ],
)
def test_combinations_that_mean_nothing(argv, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train_at_aux.parse_args(argv)
    printed = capsys.readouterr().err.strip()
    assert exit_info.value.code == 2 and words in printed and len(printed.splitlines()) == 1


# ------------------------------------------------------------------------------ beginnings and ends


def test_init_starts_from_other_weights(tmp_path, capsys):
    """From a DM-AT file and from best.pt: the first validation already knows the classes."""
    first = tmp_path / "first"
    argv = "--loss standard --epochs 8 --batch-size 200 --lr 0.05 --eval-every 1 --eval-n-steps 2"
    train_at.main(train_at.parse_args([*argv.split(), "--out-dir", str(first)]))
    best = files.load(first / "best.pt", {})
    foreign = tmp_path / "weights-best.pt"
    weights = {f"module.0.{name}": tensor for name, tensor in best["weights"].items()}
    torch.save({"model_state_dict": weights, "epoch": 3}, foreign)
    tiny_steps = "--epochs 1 --lr 1e-6 --warmup-fraction 0 --init".split()
    own_start = run_at(tmp_path / "own", *tiny_steps, str(first / "best.pt"))
    foreign_start = run_at(tmp_path / "foreign", *tiny_steps, str(foreign))
    assert_equal_states(own_start["model"], foreign_start["model"])
    # After steps too small to learn anything it is still the same model, BatchNorm's statistics
    # included.
    started = files.load(tmp_path / "own" / "best.pt", {})["val_clean_acc"]
    assert started == pytest.approx(best["val_clean_acc"], abs=0.1)
    assert best["val_clean_acc"] > 0.2

    def n_correct(name, *argv):
        out = tmp_path / f"{name}.json"
        flags = [*argv, "--attack", "clean", "--out", str(out)]
        evaluate.main(evaluate.parse_args(["--checkpoint", *flags]))
        return json.loads(out.read_text())["clean_correct"]

    own = n_correct("own", str(first / "best.pt"))
    assert own == n_correct("foreign", str(foreign), "--model", "wrn-10-1")
    assert own > 150  # of 797, ten classes
    assert "note: trained against" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no model is named for its weights"):
        evaluate.main(evaluate.parse_args(["--checkpoint", str(foreign)]))

    # A changed file is noticed.
    best["weights"]["logits.bias"] += 1
    files.save(best, first / "best.pt")
    with pytest.raises(UserError, match="holds another run.*init_sha256"):
        run_at(tmp_path / "own", *tiny_steps, str(first / "best.pt"))


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_resume_with_another_number_of_processes(ranks, tmp_path, diffusion_dir):
    """The same global batch on one and on two processes, in turn: the weights of an uninterrupted
    run, to rounding.
    """
    argv = [
        *TINY,
        "--teacher",
        diffusion_dir,
        *"--block mid_block --batch-size 100 --epochs 3".split(),
    ]
    straight = tmp_path / "straight"
    python("tests/ranks_helper.py", "train_at_aux.py", "groupnorm", *argv, "--out-dir", straight)
    cut = tmp_path / "cut"
    stop = {"STOP_AFTER": "12"}  # attacks: eight steps, a validation, and some of the second epoch
    python(
        "tests/ranks_helper.py",
        "train_at_aux.py",
        "groupnorm",
        *argv,
        "--out-dir",
        cut,
        ranks=ranks[0],
        env=stop,
        expect=1,
    )
    assert files.load(cut / "last.pt", {})["step"] == 8
    python(
        "tests/ranks_helper.py",
        "train_at_aux.py",
        "groupnorm",
        *argv,
        "--out-dir",
        cut,
        ranks=ranks[1],
    )
    one, other = (files.load(path / "last.pt", {}) for path in (straight, cut))
    assert one["step"] == other["step"] == 24
    for key, value in one["model"].items():
        assert torch.allclose(value, other["model"][key], atol=1e-4), key


def test_download_is_asked_for_once(tmp_path, monkeypatch):
    """--download fetches into --data-dir before anything is read; digits cannot be fetched and says
    so.
    """
    with pytest.raises(UserError, match="--download: digits cannot be fetched"):
        run_at(tmp_path / "run", "--download")
    assert DATASETS["cifar10"].download and DATASETS["imagenet"].download is None
