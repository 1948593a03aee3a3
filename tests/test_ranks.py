"""Two gloo processes do what one does. Alone: python -m pytest tests/test_ranks.py

Training equals one process at the same global batch on a network without batch statistics
(ranks_helper.py swaps BatchNorm for GroupNorm); with BatchNorm, the ranks end bit-equal.
Generation, extraction and evaluation are byte-equal.
"""

import json

import numpy as np
import pytest
import torch
from conftest import assert_equal_states, python, read_log

from common import UserError, files, run

SHORT = "--epochs 2 --batch-size 100 --n-steps 2 --eval-every 1 --eval-n-steps 2 --lr 0.05".split()


@pytest.mark.parametrize("script", ["train_at.py", "train_at_aux.py"])
def test_training_on_two_ranks_equals_one(script, tmp_path, diffusion_dir, synthetic_dir):
    argv = [*SHORT, "--synthetic", synthetic_dir]
    if script == "train_at_aux.py":
        argv += ["--teacher", diffusion_dir, "--block", "mid_block"]
    states = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        parts = (
            ["--accumulate", "2"] if ranks == 2 and script == "train_at_aux.py" else []
        )  # gradients meet in the last part alone
        python(
            "tests/ranks_helper.py",
            script,
            "groupnorm",
            *argv,
            *parts,
            "--out-dir",
            out,
            ranks=ranks,
        )
        states.append(files.load(out / "last.pt", {}))
    for key, value in states[0]["model"].items():
        assert torch.allclose(value, states[1]["model"][key], atol=1e-5), key
    for one, two in zip(*(read_log(tmp_path / str(r)) for r in (1, 2))):
        assert one == pytest.approx(two, abs=1e-3)


def test_which_images_have_a_target(tmp_path, diffusion_dir):
    """It depends on processes x --accumulate alone, and an image's noise on neither."""
    argv = [*SHORT, "--teacher", diffusion_dir, "--block", "mid_block", "--teacher-every", "2"]
    argv += "--epochs 1 --epoch-images 300 --warmup-fraction 1".split()
    states = []
    for ranks, accumulate in ((1, "2"), (2, "1"), (1, "1")):
        out = tmp_path / f"{ranks}-{accumulate}"
        flags = [*argv, "--accumulate", accumulate, "--out-dir", out]
        python("tests/ranks_helper.py", "train_at_aux.py", "groupnorm", *flags, ranks=ranks)
        states.append(files.load(out / "last.pt", {})["head"])
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-5), key
    assert not torch.allclose(states[0]["0.weight"], states[2]["0.weight"], atol=1e-5)


def test_ranks_end_bit_equal_and_rank_0_alone_writes(tmp_path, diffusion_dir):
    """The real command, BatchNorm and all; each rank leaves a digest of its model, average and
    head.
    """
    out = tmp_path / "run"
    argv = [*SHORT, "--teacher", diffusion_dir, "--block", "mid_block", "--out-dir", out]
    python(
        "tests/ranks_helper.py",
        "train_at_aux.py",
        "digest",
        *argv,
        ranks=2,
        env={"DIGESTS": str(tmp_path)},
    )
    digests = [json.loads((tmp_path / f"digest-{rank}.json").read_text()) for rank in (0, 1)]
    assert digests[0] == digests[1] and len(digests[0]) > 50
    assert any("running_mean" in key for key in digests[0])
    assert len([p for p in out.iterdir() if p.name.startswith("events")]) == 1
    assert [line["step"] for line in read_log(out)] == [8, 16]


AVERAGES = """
import sys
from types import SimpleNamespace
sys.path.insert(0, ".")
import torch
from common import run
rank, world_size, device = run.start_processes("fp32")
models = [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(2)]
for model in models:
    model.running_mean += rank
    model.running_var *= 1 + 2 * rank
run.average_batchnorm(*models)
for model in models:
    assert (model.running_mean == 0.5).all() and (model.running_var == 2).all()
    assert (model.weight == 1).all() and model.num_batches_tracked == 0
in_files, in_memory = SimpleNamespace(files=True), SimpleNamespace(files=False)
assert run.read_once(lambda spec, split: (split, rank), in_files, "train") == ("train", 0)
assert run.read_once(lambda spec, split: (split, rank), in_memory, "train") == ("train", rank)
calls = SharedList(sys.argv[1])
run.rank_0_first(calls.add, rank)
assert calls.read() == ["0", "1"]
run.end_processes()
"""
SHARED_LIST = """
import time
class SharedList:
    def __init__(self, path):
        self.path = path
    def add(self, rank):
        time.sleep(1 - rank)
        with open(self.path, "a") as file:
            file.write(f"{rank} ")
    def read(self):
        return open(self.path).read().split()
"""


def test_ranks_share_statistics_and_listed_files(tmp_path):
    (tmp_path / "averages.py").write_text(SHARED_LIST + AVERAGES)
    python(tmp_path / "averages.py", tmp_path / "calls", ranks=2)


OWN_DIRECTORIES = """
import os, sys
sys.path.insert(0, ".")
from types import SimpleNamespace
from common import cli, run
run.SEEN_WITHIN = 1
def main(args):
    rank, _, device = run.start_processes("fp32")
    os.chdir(f"{sys.argv[1]}/{rank}")
    training = run.Run(__file__, SimpleNamespace(out_dir="run", check=False), {}, rank, device)
    run.end_processes()
cli.run_script(main, None)
"""


def test_a_directory_that_not_all_ranks_see_is_refused(tmp_path):
    """Each node has its own: after an interruption the ranks would go on from different steps."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    (tmp_path / "own.py").write_text(OWN_DIRECTORIES)
    done = python(tmp_path / "own.py", tmp_path, ranks=2, expect=1)
    assert "run/args.json: not all processes see it; they need one file" in done.stderr


PATIENCE = """
import sys, time
sys.path.insert(0, ".")
import torch
from types import SimpleNamespace
from common import cli, run
def main(args):
    rank, world_size, device = run.start_processes("fp32")
    def load(spec):
        time.sleep(4)
        return "listed"
    assert run.read_once(load, SimpleNamespace(files=True)) == "listed"
    time.sleep(4 * rank)
    run.barrier()
    print("both waits are over", flush=True)
    time.sleep(8 * rank)
    run.sum_over_ranks(torch.zeros(1))
cli.run_script(main, None)
"""


def test_a_step_waits_for_minutes_and_a_barrier_for_longer(tmp_path):
    """With a time-out of 3 seconds in a step."""
    (tmp_path / "patience.py").write_text(PATIENCE)
    env = {"RANK_TIMEOUT_MINUTES": "0.05"}
    done = python(tmp_path / "patience.py", ranks=2, expect=1, env=env)
    assert done.stdout.count("both waits are over") == 2
    assert "error: another process is gone, or did not answer within" in done.stderr


def test_diffusion_training_on_two_ranks_equals_one(tmp_path):
    """To rounding, which Adam enlarges where a gradient is nearly zero."""
    argv = "--train-steps 8 --eval-every 4 --channels 8 16 --batch-size 32".split()
    argv += ["--self-conditioning"]
    for ranks in (1, 2):
        python("train_diffusion.py", *argv, "--out-dir", tmp_path / str(ranks), ranks=ranks)
    one, two = (files.load(tmp_path / str(ranks) / "last.pt", {}) for ranks in (1, 2))
    for key, value in one["ema"].items():
        assert torch.allclose(value, two["ema"][key], atol=3e-4), key
    for line, other in zip(*(read_log(tmp_path / str(ranks)) for ranks in (1, 2))):
        assert line == pytest.approx(other, rel=1e-4)


# train_at.py, with an attack in the second epoch that fails.
STOPS = """
import sys
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
import train_at
from common import attacks
real = attacks.pgd
calls = []
def pgd(*args, **kwargs):
    calls.append(1)
    return real(*args, **kwargs) if len(calls) < 12 else 1 / 0
attacks.pgd = pgd
train_at.main(train_at.parse_args(sys.argv[1:]))
"""


def test_resume_under_two_ranks(tmp_path):
    """Cut after its first epoch and started again under two ranks: the weights and the log of two
    ranks without a cut.
    """
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    python("train_at.py", *SHORT, "--out-dir", straight, ranks=2)
    (tmp_path / "stop.py").write_text(STOPS)
    done = python(tmp_path / "stop.py", "train_at.py", *SHORT, "--out-dir", cut, ranks=2, expect=1)
    assert "ZeroDivisionError" in done.stderr and files.load(cut / "last.pt", {})["step"] == 8
    python("train_at.py", *SHORT, "--out-dir", cut, ranks=2)
    assert_equal_states(files.load(cut / "last.pt", {}), files.load(straight / "last.pt", {}))
    assert read_log(cut) == read_log(straight)


def test_an_error_of_another_rank_alone_is_printed(tmp_path):
    program = (
        "import sys; sys.path.insert(0, '.'); from common import UserError, cli, run\n"
        "def wait(seconds): assert seconds == 15\n"
        "cli.time.sleep = wait\n"
        "def main(args):\n    rank, _, _ = run.start_processes('fp32')\n"
        "    if rank == 1: raise UserError('--flag 3: found by this rank alone')\n"
        "    run.barrier()\n"
        "cli.run_script(main, None)\n"
    )
    (tmp_path / "one.py").write_text(program)
    assert (
        "[rank 1] one.py: error: --flag 3: found by this rank alone"
        in python(tmp_path / "one.py", ranks=2, expect=1).stderr
    )


def test_generation_does_not_depend_on_ranks(tmp_path, diffusion_dir, synthetic_dir):
    argv = [
        "--diffusion",
        diffusion_dir,
        *"--n-images 64 --shard-size 24 --n-steps 3 --batch-size 16".split(),
    ]
    python("generate_synthetic.py", *argv, "--out-dir", tmp_path / "two", ranks=2)
    for path in sorted((tmp_path / "two").glob("*.npy")) + [tmp_path / "two" / "manifest.json"]:
        assert path.read_bytes() == (tmp_path.__class__(synthetic_dir) / path.name).read_bytes(), (
            path.name
        )
    assert len(list((tmp_path / "two").glob("*.npy"))) == 6
    # Which images are the most confident does not depend on ranks either.
    best = tmp_path / "at" / "best.pt"
    python("train_at.py", "--epochs", "1", "--n-steps", "1", "--out-dir", best.parent)
    selection = [*argv, "--classifier", best, "--keep-fraction", "0.5", "--out-dir"]
    chosen = []
    for ranks in (1, 2):
        python("generate_synthetic.py", *selection, tmp_path / f"best{ranks}", ranks=ranks)
        chosen.append(np.load(tmp_path / f"best{ranks}" / "selection.npy"))
    assert np.array_equal(*chosen) and len(chosen[0]) >= 32 and chosen[0][-1] >= 48

    # A shard is made again by two ranks, each of which has one of its batches.
    labels = np.load(tmp_path / "two" / "shard-00001-labels.npy")
    labels[-1] = 0
    np.save(tmp_path / "two" / "shard-00001-labels.npy", labels)
    again = ["--diffusion", diffusion_dir, "--out-dir", tmp_path / "two", "--verify", "1"]
    printed = python("generate_synthetic.py", *again, ranks=2, expect=1).stdout
    assert "images  equal to the bit: 24, 1,536 values\nlabels  DIFFERENT: 1 of 24\n" in printed


def test_extraction_does_not_depend_on_ranks(tmp_path, diffusion_dir):
    argv = [
        "--diffusion",
        diffusion_dir,
        *"--blocks mid_block up_blocks.0.resnets.0 --sigmas 0.1 0.5 --batch-size 64".split(),
    ]
    for ranks in (1, 2):
        python("extract_features.py", *argv, "--out-dir", tmp_path / str(ranks), ranks=ranks)
    names = sorted(p.name for p in (tmp_path / "1").glob("*.npy"))
    assert len(names) == 3 * (2 * 2 + 1)
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_evaluation_does_not_depend_on_ranks(tmp_path):
    python("train_at.py", *SHORT, "--out-dir", tmp_path / "run")
    for ranks in (1, 2):
        argv = [
            "--checkpoint",
            tmp_path / "run" / "best.pt",
            *"--attack apgd --eps 0.03 --n-images 50 --batch-size 30".split(),
        ]
        argv += ["--sanity-images", "10"]
        python("evaluate.py", *argv, "--out", tmp_path / f"{ranks}.json", ranks=ranks)
    one, two = (np.load(tmp_path / f"{ranks}.npz") for ranks in (1, 2))
    for key in one.files:
        assert np.array_equal(one[key], two[key]), key
    assert 0 < one["robust"].sum() < 50


def test_a_process_without_a_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    for name, value in (torchrun | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match="--nproc_per_node: process 2 of this node has no GPU, torch sees 1"
    ):
        run.start_processes("fp32")
