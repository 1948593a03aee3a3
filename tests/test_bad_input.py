"""Every bad input: one clear line that names the culprit, exit status 2, nothing written before is
lost.

Alone: python -m pytest tests/test_bad_input.py
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, python

import evaluate
import train_at
import train_at_aux
from common import cli, files


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad") / "run"
    train_at.main(
        train_at.parse_args(
            ["--epochs", "1", "--n-steps", "1", "--eval-n-steps", "1", "--out-dir", str(path)]
        )
    )
    return path / "best.pt"


@pytest.fixture
def fails(capsys, monkeypatch, tmp_path):
    """fails(script, words, *argv): the script ends with status 2 and one line on stderr that holds
    all the words.
    """

    def check(script, words, *argv):
        module = importlib.import_module(script)
        monkeypatch.setattr("sys.argv", [f"{script}.py"])
        capsys.readouterr()
        argv = [str(a) for a in argv]
        if script != "evaluate" and "--out-dir" not in argv:
            argv += ["--out-dir", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as exit_info:
            cli.run_script(module.main, module.parse_args(argv))
        printed = capsys.readouterr().err.strip().splitlines()
        assert exit_info.value.code == 2
        assert len(printed) == 1, printed
        for word in words:
            assert word in printed[0], printed[0]

    return check


FLAGS = [
    ("train_at", ["--dataset", "cifar11"], ["--dataset", "cifar11", "digits"]),
    ("train_at", ["--model", "resnet18"], ["model 'resnet18'", "wrn-28-10"]),
    ("train_at", ["--eps", "8/0"], ["--eps", "8/0"]),
    ("train_at", ["--eps", "inf"], ["--eps", "finite"]),
    ("train_at", ["--eps", "-0.1"], ["--eps", "at least 0"]),
    ("train_at", ["--eps", "8"], ["--eps", "at most 1", "8/255"]),
    ("train_at_aux", ["--step-size", "2"], ["--step-size", "at most 1", "8/255"]),
    ("train_at", ["--loss", "standard", "--n-steps", "20"], ["--n-steps", "does nothing here"]),
    ("train_at", ["--init", ""], ["--init", "empty"]),
    ("train_at", ["--synthetic", ""], ["--synthetic", "empty"]),
    ("train_at", ["--epochs", "0"], ["--epochs", "at least 1"]),
    ("train_at", ["--epochs", "2.5"], ["--epochs", "whole number"]),
    ("train_at", ["--lr", "nan"], ["--lr", "nan"]),
    (
        "train_at",
        ["--synthetic", "x", "--synthetic-fraction", "1.5"],
        ["--synthetic-fraction", "between 0 and 1", "1.5"],
    ),
    ("train_at", ["--synthetic-fraction", "0.5"], ["--synthetic-fraction", "give --synthetic"]),
    ("train_at", ["--val-size", "1000"], ["--val-size 1000", "1000 training images"]),
    ("train_at", ["--bta", "1"], ["--bta"]),
    ("train_at", ["--synthetic", "nowhere"], ["nowhere/manifest.json", "no such file"]),
    ("train_at_aux", ["--teacher", "nowhere"], ["nowhere", "no such file or directory"]),
    ("train_at_aux", ["--loss", "standard"], ["--align", "--align clean"]),
    ("train_diffusion", ["--channels", "20", "40"], ["--channels", "multiples of 8"]),
    ("train_diffusion", ["--channels", "8", "8", "8", "8", "8"], ["--channels", "8 pixels"]),
    ("generate_synthetic", ["--diffusion", "nowhere"], ["nowhere", "no such file"]),
    ("generate_synthetic", ["--keep-fraction", "0.2"], ["--keep-fraction", "--classifier"]),
    ("generate_synthetic", ["--relabel"], ["--relabel", "--classifier"]),
    ("generate_synthetic", ["--classifier", "x.pt"], ["--classifier", "--relabel"]),
    (
        "generate_synthetic",
        ["--relabel", "--classifier", "x.pt", "--guidance-scale", "2"],
        ["--guidance-scale", "--guide"],
    ),
    ("generate_synthetic", ["--sigma-min", "90"], ["--sigma-min", "--sigma-max"]),
    ("extract_features", ["--diffusion", "nowhere"], ["nowhere", "no such file"]),
    (
        "train_at_aux",
        ["--teacher", "out/jit-b-16"],
        ["out/jit-b-16: no such directory", "python -m teachers.jit convert", "LTH14/JiT"],
    ),
    ("train_at_aux", ["--teacher", "nowhere.pkl"], ["nowhere.pkl: no such file"]),
    ("evaluate", ["--checkpoint", "nowhere.pt"], ["nowhere.pt", "no such file"]),
    ("evaluate", ["--checkpoint", "x.pt", "--attack", "fgsm"], ["--attack", "fgsm", "autoattack"]),
    ("evaluate", ["--checkpoint", "x.pt", "--out", "x.npz"], ["--out", "ends in .json"]),
    ("evaluate", [], ["--checkpoint"]),
    ("evaluate", ["--model", "diffusion-classifier"], ["--teacher", "needs a diffusion model"]),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--fresh-noise"],
        ["--fresh-noise", "does nothing here", "diffusion-head"],
    ),
    ("evaluate", ["--checkpoint", "x.pt", "--mean", "0"], ["--mean", "does nothing here"]),
    (
        "evaluate",
        "--checkpoint x.pt --dataset cifar10 --model preact-18 --mean 0 0".split(),
        ["--mean", "1 or 3"],
    ),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--report", "--attack", "pgd"],
        ["--report", "apgd or autoattack"],
    ),
    ("evaluate", ["--checkpoint", "x.pt", "--report", "--attack", "rand"], ["--report"]),
    ("evaluate", "--checkpoint x.pt --report --out x.json".split(), ["--out", "not --report"]),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--report", "--transfer-from", "y.pt"],
        ["--transfer-from", "not --report"],
    ),
    ("evaluate", ["--checkpoint", "x.pt", "--report", "--compile"], ["--compile", "not --report"]),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--report", "--export", "robustbench"],
        ["--report", "not --export"],
    ),
    (
        "evaluate",
        ["--model", "diffusion-classifier", "--teacher", "x", "--report"],
        ["--report", "diffusion-classifier"],
    ),
    ("evaluate", ["--compare", "a.npz", "b.npz", "--report"], ["--compare", "--report"]),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--norm", "l1", "--eps", "1", "--attack", "pgd"],
        ["--norm", "take apgd or autoattack"],
    ),
    ("evaluate", ["--checkpoint", "x.pt", "--attack", "transfer"], ["--transfer-from"]),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--eps", "0.1", "0.2", "--out", "x.json"],
        ["--out", "several --eps"],
    ),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--model", "diffusion-classifier", "--teacher", "y"],
        ["--checkpoint", "does nothing here"],
    ),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--model", "wrn-28-10", "--export", "robustbench"],
        ["--model", "not --export"],
    ),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--attack", "clean", "--eps", "0.1", "0.2"],
        ["--eps", "does nothing here", "an attack"],
    ),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--transfer-from", "y.pt", "--sanity-images", "0"],
        ["--transfer-from", "--sanity-images 0"],
    ),
    ("evaluate", ["--checkpoint", "x.pt", "--eps", "8"], ["--eps", "8, expected at most 1"]),
    ("extract_features", ["--probe", "--eps", "8"], ["--eps", "8, expected at most 1"]),
    ("train_at", ["--norm", "l2", "--eps", "128"], ["--eps", "128, expected at most 8 in l2"]),
    ("train_at_aux", ["--norm", "l2", "--step-size", "15"], ["--step-size", "at most 8 in l2"]),
    ("analyze", "--model a=x --norm l2 --eps 64".split(), ["--eps", "64, expected at most 8"]),
    (
        "evaluate",
        "--checkpoint x.pt --norm l1 --eps 3100 --dataset cifar10".split(),
        ["--eps", "3100, expected at most 3072"],
    ),
    ("evaluate", ["--checkpoint", "x.pt", "--eps", "0.15", "0.15001"], ["--eps", "one name"]),
    (
        "evaluate",
        ["--model", "diffusion-classifier", "--teacher", "x", "--keep-classes", "10"],
        ["--keep-classes", "less than 10"],
    ),
    (
        "evaluate",
        ["--compare", "a", "b", "--norm", "l1", "--export", "robustbench"],
        ["--compare", "no other flag", "--export --norm"],
    ),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--export", "robustbench", "--batch-size", "5"],
        ["--batch-size", "not --export"],
    ),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--attack", "rand", "--transfer-from", "y.pt"],
        ["--transfer-from", "--attack rand"],
    ),
    (
        "evaluate",
        ["--model", "diffusion-classifier", "--teacher", "x", "--fresh-noise"],
        ["--fresh-noise", "--attack rand"],
    ),
    ("evaluate", ["--compare", "a.npz"], ["--compare", "2 arguments"]),
    ("evaluate", ["--compare", "a.npz", "b.npz"], ["a.npz", "a per-image file"]),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--export", "robustbench"],
        ["results-x-apgd-linf-0.15.json", "no such file"],
    ),
    ("extract_features", ["--save-head", "x.pt"], ["--save-head", "one of --blocks"]),
    ("evaluate", ["--checkpoint", "x.pt", "--seed", str(2**64)], ["--seed", "4294967295"]),
    ("train_at", ["--dataset"], ["--dataset", "expected one argument"]),
    ("train_diffusion", ["--val-size", "1000"], ["--val-size 1000", "1000 training images"]),
    ("generate_synthetic", ["--rho", "0.001"], ["--rho", "at least 0.1"]),
    ("train_at", ["--loss", "pgd", "--mixup", "1e-300"], ["--mixup", "at least 0.01"]),
    (
        "train_at",
        ["--loss", "pgd", "--mixup", "1", "--batch-size", "1"],
        ["--batch-size 1", "mixed with"],
    ),
    (
        "train_at_aux",
        ["--align-loss", "contrastive", "--batch-size", "4", "--accumulate", "4"],
        ["--batch-size 4", "too small", "--align-loss"],
    ),
    (
        "train_at_aux",
        ["--align-loss", "contrastive", "--batch-size", "4", "--teacher-every", "4"],
        ["--batch-size 4", "too small", "--teacher-every"],
    ),
    (
        "train_at_aux",
        ["--teacher-every", "65", "--batch-size", "128", "--accumulate", "2"],
        ["--batch-size 128", "too small", "--teacher-every"],
    ),
    (  # one target alone is never another image's
        "train_at_aux",
        ["--shuffle-targets", "--batch-size", "128", "--accumulate", "2", "--teacher-every", "33"],
        ["--batch-size 128", "too small", "--shuffle-targets"],
    ),
    ("train_at_aux", ["--teacher-every", "0"], ["--teacher-every", "at least 1"]),
    (
        "train_at",
        ["--loss", "pgd", "--beta", "3"],
        ["--beta", "does nothing here", "--loss trades"],
    ),
    ("train_at", ["--workers", "3"], ["--workers", "image files"]),
    ("train_at", ["--n-train", "900"], ["--n-train 900", "800 training images"]),
    (
        "evaluate",
        ["--checkpoint", "x.pt", "--attack", "apgd", "--n-steps", "1000"],
        ["--n-steps", "does nothing here", "--attack pgd"],
    ),
]


@pytest.mark.parametrize(
    "script,argv,words", FLAGS, ids=[f"{s} {' '.join(a)}" for s, a, _ in FLAGS]
)
def test_flags(script, argv, words, fails, tmp_path):
    fails(script, words, *argv)
    assert not (tmp_path / "out").exists()  # found before anything was written


@pytest.mark.parametrize("block", ["mid", ""])  # "": an unset shell variable, not the default
def test_blocks_that_the_network_has_not(block, fails, diffusion_dir):
    words = [f"no block '{block}'", "mid_block, up_blocks.0"]
    fails("train_at_aux", words, "--teacher", diffusion_dir, "--block", block)
    fails("extract_features", words, "--diffusion", diffusion_dir, "--blocks", block)


def copy(directory, tmp_path):
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def damage_shape(path):
    np.save(path, np.zeros((24, 9, 9, 1), np.uint8))


def damage_dtype(path):
    np.save(path, np.zeros((24, 8, 8, 1), np.float32))


def damage_object(path):
    np.save(path, np.array([{}] * 24, dtype=object), allow_pickle=True)


DAMAGES = {
    "truncated": damage_truncate,
    "removed": lambda path: path.unlink(),
    "wrong shape": damage_shape,
    "wrong dtype": damage_dtype,
    "pickled objects": damage_object,
    "text": lambda path: path.write_text("hello"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards(damage, fails, synthetic_dir, tmp_path):
    broken = copy(synthetic_dir, tmp_path)
    DAMAGES[damage](broken / "shard-00001-images.npy")
    fails("train_at", ["shard-00001-images.npy"], "--synthetic", broken)


def test_labels_out_of_range(fails, synthetic_dir, tmp_path):
    broken = copy(synthetic_dir, tmp_path)
    labels = np.load(broken / "shard-00002-labels.npy")
    labels[3] = 10
    np.save(broken / "shard-00002-labels.npy", labels)
    fails("train_at", ["shard-00002-labels.npy", "labels outside 0..9"], "--synthetic", broken)


MANIFESTS = [
    ({"image_shape": [32, 32, 3]}, "[32, 32, 3]"),
    ({"num_classes": 100}, "100 classes"),
    ({"dataset": "optdigits"}, "optdigits"),
    ({"n": None}, "'n' is None"),
    ({"n": -3}, "'n' is -3"),
    ({"shard_size": 0}, "'shard_size' is 0"),
    ({"held_out": "x"}, "'held_out' is x"),
    ({"format": 1}, "format 1, expected 2"),
]


@pytest.mark.parametrize("change,word", MANIFESTS)
def test_manifests_that_do_not_fit(change, word, fails, synthetic_dir, tmp_path):
    broken = copy(synthetic_dir, tmp_path)
    manifest = json.loads((broken / "manifest.json").read_text()) | change
    (broken / "manifest.json").write_text(json.dumps(manifest))
    fails("train_at", ["copy", word], "--synthetic", broken)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_broken_manifests(text, fails, synthetic_dir, tmp_path):
    broken = copy(synthetic_dir, tmp_path)
    (broken / "manifest.json").write_text(text)
    fails("train_at", ["manifest.json"], "--synthetic", broken)


@pytest.mark.parametrize("damage", ["truncated", "removed", "text"])
def test_damaged_diffusion_models(damage, fails, diffusion_dir, tmp_path):
    broken = copy(diffusion_dir, tmp_path)
    DAMAGES[damage](broken / "diffusion_pytorch_model.safetensors")
    fails("train_at_aux", ["copy"], "--teacher", broken)


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": 32},
        {"num_class_embeds": 101},
        {"sigma_data": None},
        {"sigma_data": "x"},
        {"sigma_data": -1.0},
        {"block_out_channels": [8, 24]},
        {"freq_shift": "z"},
        {"val_size": "x"},
    ],
)
def test_diffusion_models_that_do_not_fit(change, fails, diffusion_dir, tmp_path):
    broken = copy(diffusion_dir, tmp_path)
    (broken / "config.json").write_text(
        json.dumps(json.loads((broken / "config.json").read_text()) | change)
    )
    if "sample_size" not in change:  # a teacher of another size is shown resized images
        fails("train_at_aux", ["copy"], "--teacher", broken)
    fails("generate_synthetic", ["copy"], "--diffusion", broken)


def test_diffusion_weights_are_loaded_strictly(fails, diffusion_dir, tmp_path):
    broken = copy(diffusion_dir, tmp_path)
    path = broken / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["conv_out.bias"]
    safetensors.torch.save_file(weights, path)
    fails("generate_synthetic", ["copy", "missing keys: conv_out.bias"], "--diffusion", broken)


def test_a_diffusion_model_of_nan_is_named(fails, diffusion_dir, tmp_path):
    broken = copy(diffusion_dir, tmp_path)
    path = broken / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(
        {k: v * float("nan") for k, v in safetensors.torch.load_file(path).items()}, path
    )
    fails(
        "generate_synthetic",
        ["copy", "not finite"],
        "--diffusion",
        broken,
        "--n-images",
        "4",
        "--n-steps",
        "2",
    )
    assert not list((tmp_path / "out").glob("shard*"))
    fails(
        "train_at_aux", ["copy", "not finite"], "--teacher", broken, "--out-dir", tmp_path / "aux"
    )
    fails(
        "extract_features",
        ["features are not finite"],
        "--diffusion",
        broken,
        "--sigmas",
        "0.1",
        "--out-dir",
        tmp_path / "features",
    )


def test_more_shards_than_can_be_opened_are_refused_before_they_are_made(
    fails, diffusion_dir, tmp_path
):
    argv = ["--n-images", str(10**10), "--shard-size", "1"]
    fails(
        "generate_synthetic",
        ["needs 40000000000 open files", "--shard-size"],
        "--diffusion",
        diffusion_dir,
        *argv,
    )
    assert not (tmp_path / "out").exists()


def test_guidance_needs_label_dropout(fails, diffusion_dir, tmp_path):
    broken = copy(diffusion_dir, tmp_path)
    (broken / "config.json").write_text(
        json.dumps(json.loads((broken / "config.json").read_text()) | {"label_dropout": 0})
    )
    fails(
        "generate_synthetic",
        ["--guidance-scale 2", "label dropout"],
        "--diffusion",
        broken,
        "--guidance-scale",
        "2",
    )


def test_checkpoints(fails, best, tmp_path):
    state = files.load(best, {})
    for change, words in (
        ({"model_name": "wrn-16-1"}, ["state does not fit"]),
        ({"num_classes": 100}, ["100 classes"]),
        ({"dataset": "cifar10"}, ["cifar10"]),
        ({"weights": {}}, ["no state dict"]),
        ({"weights": 3}, ["no state dict"]),
        ({"eps": None}, ["'eps' is missing or no float"]),
        ({"model_name": 5}, ["'model_name' is missing or no str"]),
        (
            {"weights": {k: v * float("nan") for k, v in state["weights"].items()}},
            ["logits are not finite"],
        ),
    ):
        files.save(state | change, tmp_path / "changed.pt")
        fails(
            "evaluate",
            ["changed.pt", *words],
            "--checkpoint",
            tmp_path / "changed.pt",
            "--attack",
            "clean",
        )
    torch.save([1, 2], tmp_path / "list.pt")
    fails("evaluate", ["list.pt", "model_name"], "--checkpoint", tmp_path / "list.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    fails("evaluate", ["module.pt", "refused", "Linear"], "--checkpoint", tmp_path / "module.pt")
    (tmp_path / "d.json").mkdir()
    fails(
        "evaluate",
        ["d.json", "is a directory"],
        "--checkpoint",
        best,
        "--attack",
        "clean",
        "--out",
        tmp_path / "d.json",
    )
    fails("evaluate", ["--n-images 798", "797"], "--checkpoint", best, "--n-images", "798")


def test_an_output_that_cannot_be_written_is_found_before_the_attack(
    fails, best, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(evaluate, "attack_chunk", None)
    fails(
        "evaluate",
        [str(tmp_path / "file")],
        "--checkpoint",
        best,
        "--out",
        tmp_path / "file" / "y.json",
    )
    fails(
        "evaluate",
        ["name too long"],
        "--checkpoint",
        best,
        "--out",
        tmp_path / ("y" * 245 + ".json"),
    )


def test_output_directories_that_cannot_be(fails, tmp_path):
    (tmp_path / "file").write_text("x")
    fails("train_at", ["is a file"], "--out-dir", tmp_path / "file")
    fails("train_at", ["name too long"], "--out-dir", tmp_path / ("x" * 300))


def test_what_is_too_little_or_too_late(fails, diffusion_dir, tmp_path):
    fails(
        "generate_synthetic",
        ["--val-size 1000"],
        "--diffusion",
        diffusion_dir,
        "--val-size",
        "1000",
    )
    fails(
        "extract_features",
        ["--val-size 999", "--probe"],
        "--diffusion",
        diffusion_dir,
        "--val-size",
        "999",
        "--probe",
    )
    assert not (tmp_path / "out").exists()


def test_another_process_in_the_directory_is_noticed(best, tmp_path):
    """A second process on a run directory is refused while the first lives; a killed one gives the
    directory free.
    """
    out = shutil.copytree(best.parent, tmp_path / "run")
    program = (
        "import time; from common import run\n"
        f"run._lock({str(out)!r}, '--out-dir')\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    argv = [*"train_at.py --epochs 1 --n-steps 1 --eval-n-steps 1 --out-dir".split(), out]
    holder = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    assert "another process is at work there" in python(*argv, expect=2).stderr
    holder.kill()
    holder.wait()
    assert "finished, nothing to do" in python(*argv).stdout


def test_inputs_that_changed_since_the_run_began_are_noticed(
    fails, synthetic_dir, diffusion_dir, tmp_path
):
    """A run belongs to its very synthetic set and teacher, not to their paths."""
    argv = ["--epochs", "1", "--n-steps", "1", "--eval-n-steps", "1"]
    synthetic = copy(synthetic_dir, tmp_path)
    teacher = shutil.copytree(diffusion_dir, tmp_path / "teacher")
    aux = ["--synthetic", synthetic, "--teacher", teacher, "--block", "mid_block"]
    for script, more in (("train_at", aux[:2]), ("train_at_aux", aux)):
        module = importlib.import_module(script)
        module.main(
            module.parse_args([*argv, *map(str, more), "--out-dir", str(tmp_path / script)])
        )
    manifest = json.loads((synthetic / "manifest.json").read_text())
    (synthetic / "manifest.json").write_text(json.dumps(manifest | {"seed": 1}))
    fails(
        "train_at",
        ["holds another run", "synthetic_sha256"],
        *argv,
        *aux[:2],
        "--out-dir",
        tmp_path / "train_at",
    )
    (synthetic / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    weights = safetensors.torch.load_file(teacher / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    safetensors.torch.save_file(weights, teacher / "diffusion_pytorch_model.safetensors")
    fails(
        "train_at_aux",
        ["holds another run", "teacher_sha256"],
        *argv,
        *aux,
        "--out-dir",
        tmp_path / "train_at_aux",
    )
    shutil.copy(Path(diffusion_dir) / "diffusion_pytorch_model.safetensors", teacher)
    config = json.loads((teacher / "config.json").read_text()) | {"sigma_data": 0.6}
    (teacher / "config.json").write_text(json.dumps(config))
    fails(
        "train_at_aux",
        ["holds another run", "teacher_sha256"],
        *argv,
        *aux,
        "--out-dir",
        tmp_path / "train_at_aux",
    )


def test_inputs_that_moved_since_the_run_began_are_the_same(
    synthetic_dir, diffusion_dir, best, tmp_path, capsys
):
    """What was hashed decides, not where it lies: the finished run is recognised."""
    inputs = {
        "--synthetic": shutil.copytree(synthetic_dir, tmp_path / "synthetic"),
        "--teacher": shutil.copytree(diffusion_dir, tmp_path / "teacher"),
        "--init": Path(shutil.copy(best, tmp_path / "init.pt")),
        "--data-dir": tmp_path / "data",
    }
    argv = "--epochs 1 --n-steps 1 --eval-n-steps 1 --block mid_block --out-dir".split()
    argv.append(str(tmp_path / "run"))

    def run():
        flags = [str(word) for pair in inputs.items() for word in pair]
        train_at_aux.main(train_at_aux.parse_args([*argv, *flags]))
        return capsys.readouterr().out

    assert "best.pt has" in run()
    for flag, path in inputs.items():
        moved = path.with_name(f"moved-{path.name}")
        if path.exists():
            path.rename(moved)
        inputs[flag] = moved
        assert "finished, nothing to do" in run(), flag


def test_weights_that_are_not_finite_are_never_saved(fails, tmp_path):
    """One step an epoch at an absurd rate: the gradient is finite, the weights after it are not, or
    their logits are not.
    """
    for lr in ("9e29", "1e20"):
        out = tmp_path / lr
        argv = [
            *"--batch-size 800 --lr".split(),
            lr,
            *"--n-steps 1 --eval-n-steps 1 --eval-every 1 --epochs 3".split(),
        ]
        fails("train_at", ["not finite", "learning rate"], *argv, "--out-dir", out)
        assert (
            not (out / "best.pt").exists() or files.load(out / "best.pt", {})["val_robust_acc"] >= 0
        )
        for path in out.glob("*.pt"):
            state = files.load(path, {})
            weights = state["ema"] if path.name == "last.pt" else state["weights"]
            assert all(v.isfinite().all() for v in weights.values())


def test_a_report_of_broken_runs(best, tmp_path, capsys, monkeypatch):
    from runs import report

    def says(*words):
        monkeypatch.setattr("sys.argv", ["report.py"])
        with pytest.raises(SystemExit) as exit_info:
            cli.run_script(
                report.main, report.parse_args(["--runs", str(tmp_path), "--result", "r.json"])
            )
        printed = capsys.readouterr().err
        assert exit_info.value.code == 2 and all(word in printed for word in words), printed

    says("r.json", "no such file")
    shutil.copytree(best.parent, tmp_path / "at")
    (tmp_path / "at" / "r.json").write_text('{"clean": 1}')
    says("r.json", "not a result", "attack_name")
    (tmp_path / "at" / "r.json").write_text(
        json.dumps(dict.fromkeys(report.KEYS, 1) | {"robust": 1})
    )
    (tmp_path / "at" / "log.jsonl").write_text("")
    says("log.jsonl", "empty")
    (tmp_path / "at" / "log.jsonl").write_text("[1]\n")
    says("log.jsonl", "no record")


def other_momentum(state):
    """The optimiser's state with a momentum buffer of another shape."""
    optimizer = dict(state["optimizer"])
    optimizer["state"] = optimizer["state"] | {0: {"momentum_buffer": torch.zeros(7)}}
    return optimizer


def test_runs_with_damaged_state(fails, best, tmp_path):
    """last.pt or log.jsonl of a run in progress were changed by hand."""
    argv = ["--epochs", "1", "--n-steps", "1", "--eval-n-steps", "1"]
    state = files.load(best.parent / "last.pt", {}) | {"step": 3}
    damages = {
        "optimizer": ({"optimizer": {"state": {}, "param_groups": []}}, ["last.pt", "SGD"]),
        "step": ({"step": "three"}, ["last.pt", "'step' is missing or no int"]),
        "step below": ({"step": -5}, ["last.pt", "damaged"]),
        "step beyond": ({"step": 10**6}, ["last.pt", "damaged"]),
        "step of truth": ({"step": True}, ["last.pt", "damaged"]),
        "best": ({"best": ["a", None]}, ["last.pt", "damaged"]),
        "momentum": ({"optimizer": other_momentum(state)}, ["last.pt", "does not fit the SGD"]),
        "model": ({"model": {}}, ["last.pt", "does not fit"]),
        "log": ({}, ["log.jsonl", "JSON objects, each with a step"]),
    }
    for name, (change, words) in damages.items():
        out = shutil.copytree(best.parent, tmp_path / name)
        files.save(state | change, out / "last.pt")
        if name == "log":
            (out / "log.jsonl").write_text('{"step": nonsense}\n')
        fails("train_at", words, *argv, "--out-dir", out)


@pytest.mark.parametrize("rows", [np.array([64]), np.array([], dtype=np.int64), np.array([0.5])])
def test_selections_that_do_not_fit(rows, fails, synthetic_dir, tmp_path):
    broken = copy(synthetic_dir, tmp_path)
    np.save(broken / "selection.npy", rows)
    manifest = json.loads((broken / "manifest.json").read_text()) | {
        "selection": {"keep_fraction": 0.5}
    }
    (broken / "manifest.json").write_text(json.dumps(manifest))
    fails("train_at", ["selection.npy"], "--synthetic", broken)


def test_output_directory_of_something_else(fails, tmp_path, synthetic_dir, diffusion_dir):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("precious")
    fails("train_at", ["notes", "not empty"], "--out-dir", tmp_path / "notes")
    fails(
        "generate_synthetic",
        ["notes", "not empty"],
        "--diffusion",
        diffusion_dir,
        "--out-dir",
        tmp_path / "notes",
    )
    assert (tmp_path / "notes" / "thesis.tex").read_text() == "precious" and len(
        list((tmp_path / "notes").iterdir())
    ) == 1
    argv = [
        *"--n-images 64 --shard-size 24 --n-steps 3 --batch-size 16 --out-dir".split(),
        synthetic_dir,
    ]
    fails(
        "generate_synthetic",
        ["holds another", "seed is 0 there, 9 here"],
        "--diffusion",
        diffusion_dir,
        "--seed",
        "9",
        *argv,
    )


def test_a_full_disk_is_one_line_and_keeps_what_was_written(best, tmp_path):
    """A file-size limit stands for a full disk: the run stops with one line, and the older
    checkpoint still loads.
    """
    out = tmp_path / "run"
    shutil.copytree(best.parent, out)
    state = files.load(out / "last.pt", {})
    files.save(
        state | {"step": 3}, out / "last.pt"
    )  # pretend that it was cut in the middle of its epoch
    kept = (out / "last.pt").read_bytes()
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.argv = sys.argv[1:]; "
        "import train_at; from common import cli; "
        "cli.run_script(train_at.main, train_at.parse_args())"
    )
    argv = ["--epochs", "1", "--n-steps", "1", "--eval-n-steps", "1", "--out-dir", out]
    done = python("-c", program, "train_at.py", *argv, expect=2)
    assert ".pt: File too large" in done.stderr and "Traceback" not in done.stderr
    assert (out / "last.pt").read_bytes() == kept


def test_a_gpu_that_is_full_is_one_line(capsys):
    def fill(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(SystemExit) as exit_info:
        cli.run_script(fill, None)
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2 and printed.count("\n") == 1 and "--accumulate" in printed


def test_read_only_output(tmp_path):
    """As root a read-only directory does not stop a write; a file in the directory's place does,
    for everyone.
    """
    (tmp_path / "file").write_text("x")
    done = python("train_at.py", "--epochs", "1", "--out-dir", tmp_path / "file" / "run", expect=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "Not a directory" in done.stderr


def test_batch_that_ranks_cannot_share(tmp_path):
    argv = ["train_at.py", "--batch-size", "127", "--out-dir", tmp_path / "run"]
    done = python(*argv, ranks=2, expect=1, real=True)  # torchrun's own status
    assert done.stderr.count("error: --batch-size 127: not divisible by 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_damaged_parts_of_an_evaluation_are_named(fails, best, tmp_path):
    """A chunk's file that is not one: named, and attacked again once it is deleted."""
    argv = [
        "--checkpoint",
        best,
        *"--attack pgd --n-steps 1 --n-images 4 --batch-size 2 --out".split(),
        tmp_path / "r.json",
    ]
    evaluate.main(evaluate.parse_args([str(a) for a in argv]))
    result = json.loads((tmp_path / "r.json").read_text())
    request = {key: result[key] for key in result if key not in DERIVED} | {
        "torch": torch.__version__,
        "device": "cpu",
    }
    good = {"fooled_by": [1, 1], "seconds": [0.1], "zero_gradients": 0, "warnings": []}
    for change in (
        {"fooled_by": [1]},
        {"fooled_by": [1, 7]},
        {"fooled_by": 3},
        {"seconds": [0.1, 0.1]},
        {"warnings": 3},
        {"seconds": None},
    ):
        for path in (tmp_path / "r.json", tmp_path / "r.npz"):
            path.unlink(missing_ok=True)
        part = tmp_path / "r.parts" / "chunk-00001.json"
        part.parent.mkdir(exist_ok=True)
        (part.parent / "request.json").write_text(json.dumps(request))
        part.write_text(json.dumps(good | change))
        fails("evaluate", ["chunk-00001.json", "damaged", "delete it"], *argv)
    part.unlink()
    evaluate.main(evaluate.parse_args([str(a) for a in argv]))
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["robust_correct"] == result["robust_correct"]


DERIVED = {
    *(
        "checkpoint",
        "clean",
        "clean_interval",
        "clean_correct",
        "robust",
        "robust_interval",
        "robust_correct",
        "zero_gradients",
    ),
    "by_class",
    *("sanity", "warnings", "seconds", "seconds_by_attack", "environment"),
}
