"""The training scripts as wholes: golden losses, exact resume, what aux-weight 0 means, what stops
a run.

Alone: python -m pytest tests/test_train.py. golden.json holds the losses of a tiny run; it may
change only in a commit that says why (rewrite it with: GOLDEN=write python -m pytest
tests/test_train.py -k golden).
"""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_equal_states, read_log

import train_at
import train_at_aux
import train_diffusion
from common import UserError, attacks, files

TINY = (
    "--epochs 4 --warmup-fraction 0.25 --batch-size 200 --n-steps 2"
    " --eval-every 1 --eval-n-steps 2 --lr 0.05"
).split()
GOLDEN = ROOT / "tests" / "golden.json"


def run_at(out_dir, *argv):
    train_at.main(train_at.parse_args([*TINY, "--out-dir", str(out_dir), *argv]))
    return files.load(out_dir / "last.pt", {})


def run_aux(out_dir, teacher, *argv):
    train_at_aux.main(
        train_at_aux.parse_args(
            [*TINY, "--teacher", teacher, "--block", "mid_block", "--out-dir", str(out_dir), *argv]
        )
    )
    return files.load(out_dir / "last.pt", {})


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "at"
    return path, run_at(path)


def test_golden_losses(tmp_path, plain_run, diffusion_dir, synthetic_dir):
    """The losses of tiny runs, to 1e-4 on any machine; the diffusion model is untrained, but
    seeded.
    """
    aux_dir = tmp_path / "dm_at_dra"
    run_aux(aux_dir, diffusion_dir, "--synthetic", synthetic_dir, "--align", "both")
    found = {
        "train_at": [line["loss"] for line in read_log(plain_run[0])],
        "train_at_aux": [line["loss"] for line in read_log(aux_dir)],
        "align": [1 - line["loss_aux"] for line in read_log(aux_dir)],
    }
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for key, values in golden.items():
        assert found[key] == pytest.approx(values, abs=1e-4), key


def test_runs_are_deterministic_and_learn(tmp_path, plain_run):
    path, state = plain_run
    assert_equal_states(run_at(tmp_path / "again"), state)
    assert read_log(tmp_path / "again") == read_log(path)
    losses = [line["loss"] for line in read_log(path)]
    assert losses[-1] < losses[0] - 0.1 and all(map(math.isfinite, losses))
    assert (
        run_at(tmp_path / "other", "--seed", "1")["model"]["init_conv.weight"]
        .ne(state["model"]["init_conv.weight"])
        .any()
    )


def test_weight_zero_gives_the_very_weights_of_train_at(tmp_path, plain_run, diffusion_dir):
    """Bit for bit: DRA's randomness has streams of its own, and its head no say in clipping or
    decay of the classifier.
    """
    state = run_aux(tmp_path / "aux", diffusion_dir, "--aux-weight", "0", "--teacher-every", "3")
    for key in ("model", "ema", "best", "step"):
        assert_equal_states(state[key], plain_run[1][key])
    one = run_aux(tmp_path / "one", diffusion_dir, "--aux-weight", "1")
    assert not torch.equal(
        one["model"]["init_conv.weight"], plain_run[1]["model"]["init_conv.weight"]
    )


@pytest.mark.parametrize(
    "loss,align",
    [("trades", "clean"), ("trades", "both"), ("pgd", "adv"), ("pgd", "clean"), ("pgd", "both")],
)
def test_weight_zero_whatever_is_aligned(loss, align, tmp_path, diffusion_dir):
    """A clean pass that only the alignment needs (PGD-AT) moves no running statistics."""
    argv = ["--epochs", "1", "--loss", loss]
    plain = run_at(tmp_path / "at", *argv)
    zero = run_aux(tmp_path / "aux", diffusion_dir, *argv, "--align", align, "--aux-weight", "0")
    for key in ("model", "ema"):
        assert_equal_states(zero[key], plain[key])


def test_contrastive_alignment_is_another_run_and_learns(tmp_path, diffusion_dir):
    states = [
        run_aux(tmp_path / kind, diffusion_dir, "--align-loss", kind)
        for kind in ("cosine", "contrastive")
    ]
    assert not torch.equal(
        states[0]["model"]["init_conv.weight"], states[1]["model"]["init_conv.weight"]
    )
    log = read_log(tmp_path / "contrastive")
    assert log[-1]["loss_aux"] < log[0]["loss_aux"]
    assert all(-1 <= line["val_align"] <= 1 for line in log)  # a cosine for either loss


def test_shuffled_targets_are_those_of_other_images(tmp_path, diffusion_dir, monkeypatch):
    """The control sees the very same targets, noise and all, in another order."""
    real = train_at_aux.alignment_loss
    seen = {"true": [], "shuffled": []}
    for name, flags in (("true", []), ("shuffled", ["--shuffle-targets"])):

        def keep(head, feats, targets, args, name=name):
            seen[name].append(targets.clone())
            return real(head, feats, targets, args)

        monkeypatch.setattr(train_at_aux, "alignment_loss", keep)
        run_aux(tmp_path / name, diffusion_dir, *flags)
    assert len(seen["true"]) == len(seen["shuffled"]) == 16  # steps
    for i in range(4):
        a, b = seen["true"][i], seen["shuffled"][i]
        assert torch.equal(a.sort(0).values, b.sort(0).values)
        assert (a == b).all(1).sum() < 10
    log = read_log(tmp_path / "true")
    assert log[-1]["loss_aux"] < log[0]["loss_aux"]


VARIANTS = {
    "pgd-at": ["--loss", "pgd"],
    "l2": ["--norm", "l2"],
    "eval-mode attack": ["--attack-bn", "running"],
    "other seed": ["--seed", "5"],
    "clipping": ["--clip-norm", "0.01"],
    "another batch size": ["--batch-size", "150"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_has_its_effect(name, tmp_path, plain_run):
    state = run_at(tmp_path / "run", *VARIANTS[name])
    assert not torch.equal(state["model"]["logits.weight"], plain_run[1]["model"]["logits.weight"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--align", "clean"],
        ["--align", "both"],
        ["--loss", "pgd", "--align", "both"],
        ["--teacher-label", "true"],
    ],
)
def test_every_alignment_has_its_effect(argv, tmp_path, diffusion_dir):
    argv = ["--epochs", "1", *argv]
    base = [a for a in argv if a not in ("--align", "clean", "both", "--teacher-label", "true")]
    one, other = (
        run_aux(tmp_path / "one", diffusion_dir, *argv),
        run_aux(tmp_path / "other", diffusion_dir, *base),
    )
    assert not torch.equal(one["head"]["0.weight"], other["head"]["0.weight"])


class Stop(Exception):
    """Stands for a process that dies."""


@pytest.mark.parametrize("script", ["at", "aux"])
@pytest.mark.parametrize("where", ["in an epoch", "after best.pt, before last.pt"])
def test_resume_equals_no_interruption(
    script, where, tmp_path, plain_run, diffusion_dir, synthetic_dir, monkeypatch
):
    """Stopped, then started by the same command: the same weights, averages, optimiser state, best
    score and log lines.
    """
    argv = ["--synthetic", synthetic_dir, "--teacher-every", "3"] if script == "aux" else []

    def start(name):
        return (
            run_at(tmp_path / name)
            if script == "at"
            else run_aux(tmp_path / name, diffusion_dir, *argv)
        )

    straight = plain_run[1] if script == "at" else start("straight")
    straight_log = read_log(plain_run[0] if script == "at" else tmp_path / "straight")
    module, name, last_call = files, "save", 4  # the second last.pt
    if where == "in an epoch":
        module, name, last_call = attacks, "pgd", 18  # an attack of the third epoch
    real = getattr(module, name)
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == last_call:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)
    with pytest.raises(Stop):
        start("cut")
    monkeypatch.undo()
    partial = files.load(tmp_path / "cut" / "last.pt", {})["step"]
    assert 0 < partial < straight["step"]
    assert_equal_states(start("cut"), straight)
    assert read_log(tmp_path / "cut") == straight_log
    best = files.load(tmp_path / "cut" / "best.pt", {})
    assert [best["val_robust_acc"], best["val_clean_acc"]] == straight["best"]


def test_diffusion_training_resumes_exactly(tmp_path, monkeypatch):
    def start(name):
        argv = [
            *"--train-steps 9 --eval-every 3 --channels 8 16 --batch-size 16 --out-dir".split(),
            str(tmp_path / name),
            "--self-conditioning",
        ]
        train_diffusion.main(train_diffusion.parse_args(argv))
        return files.load(tmp_path / name / "last.pt", {})

    straight, real, calls = start("straight"), train_diffusion.edm_loss, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 7:
            raise Stop
        return real(*args)

    monkeypatch.setattr(train_diffusion, "edm_loss", dying)
    with pytest.raises(Stop):
        start("cut")
    monkeypatch.undo()
    assert_equal_states(start("cut"), straight)
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "straight")
    weights = [
        (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("straight", "cut")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("script", ["at", "aux", "diffusion"])
def test_sigterm_ends_the_run_after_its_step(
    script, tmp_path, plain_run, diffusion_dir, monkeypatch, capsys
):
    """In mid-epoch: a checkpoint, one line, status 0; the same command goes on."""

    def start(name):
        if script == "diffusion":
            argv = "--train-steps 9 --eval-every 4 --channels 8 16 --batch-size 16".split()
            train_diffusion.main(
                train_diffusion.parse_args([*argv, "--out-dir", str(tmp_path / name)])
            )
            return files.load(tmp_path / name / "last.pt", {})
        return (
            run_at(tmp_path / name) if script == "at" else run_aux(tmp_path / name, diffusion_dir)
        )

    module, function, at = (
        (train_diffusion, "edm_loss", 6) if script == "diffusion" else (attacks, "pgd", 7)
    )
    straight, real, calls = (
        plain_run[1] if script == "at" else start("straight"),
        getattr(module, function),
        [],
    )

    def noticed(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, function, noticed)
    cut = start("cut")
    monkeypatch.undo()
    assert (
        f"stopped by SIGTERM after step {cut['step']} of {straight['step']}"
        in capsys.readouterr().out
    )
    assert 0 < cut["step"] < straight["step"]
    assert_equal_states(start("cut"), straight)
    log = read_log(tmp_path / "cut")
    straight_log = read_log(plain_run[0] if script == "at" else tmp_path / "straight")
    # Means over training steps are of those since the restart; all else is as without.
    means = {"loss", "loss_aux", "loss_clean", "loss_robust", "grad_norm"}
    assert [line["step"] for line in log] == [line["step"] for line in straight_log]
    for line, straight_line in zip(log, straight_log):
        assert {k: line[k] for k in line.keys() - means} == {
            k: straight_line[k] for k in straight_line.keys() - means
        }
    assert log[-1] == straight_log[-1]


@pytest.mark.parametrize("moment", ["early", "late"])
def test_kill_9_and_run_again(moment, tmp_path, plain_run):
    """A real process, a real SIGKILL, between checkpoints (early) or while they are written in
    quick succession (late).
    """
    for attempt in range(5):  # a write takes milliseconds: the signal may come after it
        out = tmp_path / f"run{attempt}"
        argv = [sys.executable, "train_at.py", *TINY, "--out-dir", str(out)]
        process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and not (out / "last.pt").exists():
            time.sleep(0.0005)
        while (
            moment == "late" and process.poll() is None and not (out / "last.pt.writing").exists()
        ):
            pass
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and (
            moment == "early" or (out / "last.pt.writing").exists()
        ):
            break
    else:
        pytest.fail("no kill fell into a write")
    assert_equal_states(run_at(out), plain_run[1])
    assert read_log(out) == read_log(plain_run[0])


def test_finished_run_is_left_alone_and_another_is_refused(plain_run, capsys):
    path, _ = plain_run
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    run_at(path)
    assert "finished, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another run.*beta is 5.0 there, 6.0 here"):
        run_at(path, "--beta", "6")
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


def test_run_directory_explains_itself(plain_run):
    path, state = plain_run
    names = {p.name for p in path.iterdir()}
    assert {"args.json", "env.json", "log.jsonl", "last.pt", "best.pt", "samples.png"} <= names
    assert (path / "train_at.py").read_bytes() == (ROOT / "train_at.py").read_bytes()
    assert (path / "git.diff").exists()
    args = json.loads((path / "args.json").read_text())
    assert args["script"] == "train_at.py" and args["lr"] == 0.05 and args["eps"] == 0.15
    assert json.loads((path / "env.json").read_text())["torch"] == torch.__version__
    line = read_log(path, drop=())[-1]
    metrics = "loss loss_clean loss_robust grad_norm lr clean_acc robust_acc"
    times = "images_per_s data_wait seconds"
    assert set(line) == {"step", *metrics.split(), *times.split()}
    assert line["loss"] == pytest.approx(line["loss_clean"] + 5 * line["loss_robust"], rel=1e-5)
    assert state["best"][0] == max(entry["robust_acc"] for entry in read_log(path))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    real, calls = train_at.at_loss, []

    def failing(logits, logits_adv, y, args):
        calls.append(1)
        loss, parts = real(logits, logits_adv, y, args)
        return (loss * float("nan") if len(calls) == 7 else loss), parts

    monkeypatch.setattr(train_at, "at_loss", failing)
    with pytest.raises(UserError, match="steps 5 to 8: loss, gradient or weights not finite"):
        run_at(tmp_path / "run")
    state = files.load(tmp_path / "run" / "last.pt", {})
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())


def test_best_checkpoint_is_the_best_average_on_validation(plain_run):
    path, state = plain_run
    best = files.load(path / "best.pt", {})
    log = {line["step"]: line for line in read_log(path)}
    assert log[best["step"]]["robust_acc"] == best["val_robust_acc"] == state["best"][0]
    import safetensors.torch

    exported = safetensors.torch.load_file(path / "best.safetensors")
    assert_equal_states(exported, dict(best["weights"]))
