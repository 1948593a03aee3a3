"""The acceptance run of benchmarks/gpu.py, at toy size and without a GPU.

Alone: python -m pytest tests/test_gpu_benchmark.py
"""

import itertools
import sys
from collections import Counter

import pytest
import torch
from conftest import python

import train_at
import train_at_aux
from benchmarks import gpu, train_step
from common import attacks, cli, files


@pytest.fixture
def run_gpu(monkeypatch, tmp_path, capsys):
    """run_gpu(*flags): (exit status, results, printed lines) of the run with --toy."""
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*flags):
        path = tmp_path / "made" / "gpu.json"
        status = 0
        try:
            cli.run_script(gpu.main, gpu.parse_args(["--toy", "--out", str(path), *flags]))
        except SystemExit as error:
            status = error.code
        return status, files.read_json(path), capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def only(monkeypatch):
    """only(names): let the run have these parts alone, further ones being {name: function}."""
    parts_of = gpu.parts

    def keep(names, **more):
        def parts(args):
            kept = [part for part in parts_of(args) if part[0] in names]
            return [(name, 1, function) for name, function in more.items()] + kept

        monkeypatch.setattr(gpu, "parts", parts)

    return keep


def test_without_a_gpu_it_is_one_line():
    done = python("-m", "benchmarks.gpu", expect=2)
    assert done.stderr == "gpu.py: error: no GPU: torch.cuda.is_available() is False\n"
    assert done.stdout == ""


def test_every_part_runs_at_toy_size(run_gpu, monkeypatch):
    """But for the compiler, which takes minutes here; test_switches.py has it."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))
    status, found, lines = run_gpu()
    parts = [name for name, *_ in gpu.parts(gpu.parse_args(["--toy"]))]
    assert list(found["parts"]) == parts
    assert len(parts) == len(set(parts)) == 27
    assert len(compiled) == 8
    assert status == 0, lines
    assert lines[-1] == "nothing failed; skipped: nothing"
    assert len(lines) == len(parts) + 3

    checks = ["equal losses", "equal runs", *[name for name in parts if "no waits" in name]]
    for name, record in found["parts"].items():
        assert record["status"] == ("passed" if name in checks else "done")
        assert record["peak_memory_gib"] == "no GPU"
    steps = [record for name, record in found["parts"].items() if name.startswith("step")]
    assert len(steps) == 16
    for record in steps:
        assert 0 < record["share_of_h100"] < 1
        assert 0 <= record["data_wait"] < 1
    assert found["utilisation"].keys() == found["assumed"].keys()
    assert found["utilisation"]["wide convolutions"].keys() == {"fp32", "tf32", "bf16"}
    assert all(found["utilisation"].values())


def test_the_share_of_the_peak():
    """A million FLOP an image at 989 million images a second are the 989 TFLOPS of bf16."""
    record = gpu.rate("wrn-28-10", "bf16", images_per_s=gpu.PEAK["bf16"] / 1e6, flop=0.5e6)
    assert record["share_of_h100"] == pytest.approx(0.5)


def test_the_first_record_of_a_family_counts():
    first = {"network": "wrn-28-10", "precision": "bf16", "share_of_h100": 0.3}
    second = first | {"share_of_h100": 0.1}
    teacher = {"teacher": first | {"network": "DDPM++", "share_of_h100": 0.2}}
    found = gpu.utilisation([first, second, teacher, {"status": "failed"}])
    families = [gpu.cost.FAMILIES[name] for name in ("wrn-28-10", "DDPM++")]
    assert [found[family] for family in families] == [{"bf16": 0.3}, {"bf16": 0.2}]


def test_the_clock_waits_for_the_gpu_before_and_after(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    gpu.seconds_of(lambda: calls.append("work"), 2)
    assert calls == ["wait", "work", "work", "wait"]


@pytest.mark.parametrize("script", [train_at, train_at_aux])
def test_the_step_that_is_measured_leaves_nothing_out(script, monkeypatch, tmp_path):
    """What a training script does once in a step is done once: else ratios would be too good."""
    calls = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    pieces = [(attacks, "update_twin"), (train_step, "update_average"), (torch.optim.SGD, "step")]
    pieces += [(torch.nn.utils, "get_total_norm"), (script, "adversarial_loss")]
    pieces += [(script, "alignment_loss")] if script is train_at_aux else []
    for piece in pieces:
        count(*piece)
    network = train_step.small_network() if script is train_at_aux else None
    flags = "--batch-size 16 --n-steps 1"
    flags += " --teacher none" if network else ""
    train_step.our_step(script, flags, str(tmp_path), network)()
    assert calls == {name: 1 for _, name in pieces}


def test_a_part_that_raises_is_recorded_and_the_others_run(run_gpu, only):
    def out_of_memory():
        raise torch.OutOfMemoryError("no memory\nmore of it")

    def interrupted():
        raise KeyboardInterrupt

    only(["environment"], large=out_of_memory)
    status, found, lines = run_gpu()
    assert status == 1
    assert list(found["parts"]) == ["large", "environment"]
    assert found["parts"]["large"]["status"] == "failed"
    assert found["parts"]["large"]["error"] == "no memory"
    assert found["parts"]["environment"]["status"] == "done"
    assert lines[-1] == "failed: large"
    only(["environment"], interrupted=interrupted)
    status, found, _ = run_gpu()
    assert status == 130


def test_parts_without_time_are_skipped(run_gpu):
    status, found, lines = run_gpu("--minutes", "0")
    assert status == 0
    assert {record["status"] for record in found["parts"].values()} == {"SKIP, no time left"}
    assert lines[0] == "environment: status SKIP, no time left"
    assert lines[-1].startswith("nothing failed; skipped: environment; equal losses; ")


def test_other_losses_fail_and_are_named(run_gpu, only, monkeypatch):
    """By 1 % from one computation to the next: too much for fp32."""
    real = train_at_aux.at_loss
    numbers = itertools.count()

    def drifting(*args):
        loss, metrics = real(*args)
        return loss * (1 + 0.01 * next(numbers)), metrics

    monkeypatch.setattr(train_at_aux, "at_loss", drifting)
    only(["environment", "equal losses"])
    status, found, lines = run_gpu()
    assert status == 1
    assert lines[-1] == "failed: equal losses"
    assert found["parts"]["equal losses"]["fp32"]["difference"] > gpu.TOLERANCE["fp32"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_fails(value, run_gpu, only, monkeypatch):
    real = gpu.loss_of
    precisions = itertools.count()

    def broken(*args):
        return value if next(precisions) == 2 else real(*args)

    monkeypatch.setattr(gpu, "loss_of", broken)
    only(["equal losses"])
    status, _, lines = run_gpu()
    assert (status, lines[-1]) == (1, "failed: equal losses")


class Finished:
    """A process that has ended. status, error: what it left."""

    status, error = 0, ""

    def __init__(self, command, **kwargs):
        self.returncode = self.status

    def communicate(self):
        return None, self.error


def test_runs_that_differ_fail_and_are_named(run_gpu, only, monkeypatch):
    def tensors_of(path):
        return [torch.zeros(2), torch.full((2,), float(path.endswith("bf16-2/last.pt")))]

    monkeypatch.setattr(gpu.subprocess, "Popen", Finished)
    monkeypatch.setattr(gpu, "tensors_of", tensors_of)
    only(["equal runs"])
    status, found, lines = run_gpu()
    assert (status, lines[-1]) == (1, "failed: equal runs")
    record = found["parts"]["equal runs"]
    assert record["fp32"] is True and record["bf16"] is False


@pytest.mark.parametrize("error, words", [("a\nb: error: c\n", "b: error: c"), ("", "")])
def test_a_run_that_ends_badly_is_told(error, words, run_gpu, only, monkeypatch):
    monkeypatch.setattr(gpu.subprocess, "Popen", Finished)
    monkeypatch.setattr(Finished, "status", 2)
    monkeypatch.setattr(Finished, "error", error)
    only(["equal runs"])
    status, found, lines = run_gpu()
    assert (status, lines[-1]) == (1, "failed: equal runs")
    assert found["parts"]["equal runs"]["error"] == f"train_at.py: status 2, {words}".strip()
