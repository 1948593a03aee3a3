"""A checkpoint and a synthetic set as they are published and read back: --export hub, --checkpoint
of a folder and of the hub, --compare, --verify.

Alone: python -m pytest tests/test_publishing.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import DIGITS
from data_helper import refused

import analyze
import evaluate
import extract_features
import generate_synthetic
import train_at
from common import data, files
from common.stats import wilson
from evaluation import autoattack
from published import set_card
from published.weights import load_classifier

HOME = os.path.expanduser("~")
ATTACK = "--attack apgd --n-images 12 --sanity-images 2"
RESULT = "results-best-apgd-linf-0.15-n12"


def call(module, *argv):
    """main of a script, as if it had been typed: sys.argv is what env.json and results record."""
    argv = [str(word) for part in argv for word in (part.split() if type(part) is str else [part])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
        return module.main(module.parse_args(argv))


def write_json(path, **changes):
    files.write_json(files.read_json(path) | changes, path)


def random_attack(name, model, x, y, *, eps, seed, **settings):
    """In place of pyautoattack's: a step at random, which takes no time."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + eps * noise.sign()).clamp(0, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, synthetic_dir):
    """A run with a synthetic set, with results of best.pt and one of last.pt."""
    run_dir = tmp_path_factory.mktemp("secret") / "my_run"
    flags = "--epochs 4 --n-steps 1 --eval-n-steps 1 --eval-every 2 --batch-size 100 --out-dir"
    paths = ["--synthetic", f"{synthetic_dir}=1", "--data-dir", f"{HOME}/data"]
    call(train_at, flags, run_dir, *paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoattack, "attack", random_attack)
        call(evaluate, ATTACK, "--checkpoint", run_dir / "best.pt")
    unchecked = "--sanity-images 0 --checkpoint"
    call(evaluate, "--attack clean --n-images 20", unchecked, run_dir / "best.pt")
    call(evaluate, "--attack pgd --n-images 4 --n-steps 2", unchecked, run_dir / "best.pt")
    call(evaluate, "--attack clean --n-images 20", unchecked, run_dir / "last.pt")
    return run_dir


@pytest.fixture(scope="module")
def exported(trained):
    call(evaluate, "--export hub --checkpoint", trained / "best.pt")
    return trained / "hub"


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of the run, without what was exported, to be changed by a test."""
    ignored = shutil.ignore_patterns("hub", "results-hub*")
    return Path(shutil.copytree(trained, tmp_path / "my_run", ignore=ignored))


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of what was exported, to be changed by a test."""
    return Path(shutil.copytree(exported, tmp_path / "hub"))


@pytest.fixture
def hub(monkeypatch, exported):
    """hub:them/name, which stands for the exported folder."""

    def snapshot_download(repo_id, allow_patterns):
        assert repo_id == "them/name" and "*.json" in allow_patterns
        return str(exported)

    files._hub_weights.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    yield "hub:them/name"
    files._hub_weights.cache_clear()


# ------------------------------------------------------------------------------- the folder


def test_what_is_exported(trained, exported):
    names = {path.name for path in exported.iterdir()}
    results = {"results-best-clean-linf-0.15-n20", "results-best-pgd-linf-0.15-n4", RESULT}
    expected = {f"{name}.{suffix}" for name in results for suffix in ("json", "npz")}
    assert names == expected | {"README.md", "config.json", "model.safetensors"}

    config = files.read_json(exported / "config.json")
    assert {name: files.sha256(exported / name) for name in config["sha256"]} == config["sha256"]
    assert config["sha256"].keys() == names - {"README.md", "config.json"}
    assert config["checkpoint_sha256"] == files.sha256(trained / "best.pt")
    settings = files.read_json(trained / "args.json")
    assert config["training"]["data_sha256"] == settings["data_sha256"]
    assert config["training"]["synthetic"] == ["synthetic=1"]
    assert config["training"]["data_dir"] == "data"
    for path in exported.glob("*.npz"):
        assert path.read_bytes() == (trained / path.name).read_bytes()


def test_no_path_of_the_machine_is_exported(trained, exported):
    """In the run they are, so that their absence means something."""
    told = (trained / "args.json").read_text() + (trained / f"{RESULT}.json").read_text()
    assert HOME in told and str(trained) in told
    for path in exported.iterdir():
        content = path.read_bytes()
        for secret in (HOME, str(trained), "/secret", os.getcwd()):
            assert secret.encode() not in content, (path, secret)


def test_the_card_says_what_the_files_say(trained, exported):
    card = huggingface_hub.ModelCard.load(exported / "README.md")
    assert card.data.license is None
    assert card.data.tags == ["adversarial-robustness", "adversarial-training"]
    result = files.read_json(trained / f"{RESULT}.json")
    clean, robust = (
        card.data.eval_results
    )  # the clean result of 20 images is no attack; pgd a check
    assert clean.metric_value == round(result["clean"], 6)
    assert robust.metric_value == round(result["robust"], 6)
    title = "robust accuracy, APGD-CE+T (upper bound), linf 0.15, n = 12"
    assert robust.metric_name.startswith(title)

    settings = files.read_json(trained / "args.json")
    environment = files.read_json(trained / "env.json")
    low, high = result["robust_interval"]
    for words in (
        "# my_run: wrn-10-1 for digits",
        "| trained against | linf 0.15; loss: TRADES |",
        f"| generated images | 64: synthetic=1, SHA-256 `{settings['synthetic_sha256']}` |",
        f"| training data | digits, SHA-256 `{settings['data_sha256']}` |",
        f"{result['robust']:.2%} ({low:.2%} to {high:.2%})",
        "a check, not the number to report",
        "An attack knows the weights (transfer does not).",
        "python train_at.py --epochs 4 --n-steps 1 --eval-n-steps 1 --eval-every 2 "
        "--batch-size 100 --out-dir my_run --synthetic synthetic=1 --data-dir data",
        f"python evaluate.py {ATTACK} --checkpoint best.pt",
        f"--compare hub:OWNER/NAME/{RESULT}.npz OTHER.npz",
        f"torch {torch.__version__}",
        str(environment["commit"]),
    ):
        assert words in card.text, words
    for line in result["sanity"]:
        assert line["found"] in card.text


def test_warnings_are_told_everywhere(run_dir, capsys):
    warning = "check failed: hardly any image has a zero gradient (12 of 12)"
    write_json(run_dir / f"{RESULT}.json", warnings=[warning])
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    assert f"WARNING: {RESULT}.json: {warning}" in capsys.readouterr().out
    card = huggingface_hub.ModelCard.load(run_dir / "hub" / "README.md")
    assert f"- `{RESULT}.json`: {warning}" in card.text
    assert "**warnings, see below**" in card.text
    assert card.data.eval_results[1].metric_name.endswith("n = 12, with warnings")


def test_the_adaptive_check_takes_the_place_of_the_attack_before_it(run_dir):
    """On the hub, the lower accuracy stands alone; the table has both."""
    plain = files.read_json(run_dir / f"{RESULT}.json")
    arrays = dict(np.load(run_dir / f"{RESULT}.npz"))
    n_attacks = len(plain["attacks"])
    first = int(np.flatnonzero(arrays["robust"])[0])
    fooled_by = arrays["fooled_by"] + (arrays["fooled_by"] == n_attacks)
    fooled_by[first] = n_attacks
    attacks = [*plain["attacks"], "unit-ce"]
    arrays |= {"fooled_by": fooled_by, "robust": fooled_by > n_attacks, "attacks": attacks}
    n_robust = int(arrays["robust"].sum())
    result = plain | {
        "attack": "apgd-adaptive",
        "attack_name": f"{plain['attack_name']} + adaptive",
        "attacks": attacks,
        "earlier_attacks": plain["attacks"],
        "robust_correct": n_robust,
        "robust": n_robust / 12,
        "robust_interval": wilson(n_robust, 12),
    }
    name = RESULT.replace("apgd", "apgd-adaptive")
    np.savez(run_dir / f"{name}.npz", **arrays)
    files.write_json(result, run_dir / f"{name}.json")
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    card = huggingface_hub.ModelCard.load(run_dir / "hub" / "README.md")
    _, robust = card.data.eval_results
    assert robust.metric_value == round(n_robust / 12, 6) < plain["robust"]
    assert "+ adaptive, linf 0.15, n = 12" in robust.metric_name
    lines = [line for line in card.text.splitlines() if "before the adaptive check, not" in line]
    assert len(lines) == 1 and f"`{RESULT}.npz`" in lines[0]

    # Another radius is another number.
    files.write_json(result | {"eps": 0.1}, run_dir / f"{name}.json")
    shutil.rmtree(run_dir / "hub")
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    card = huggingface_hub.ModelCard.load(run_dir / "hub" / "README.md")
    assert len(card.data.eval_results) == 3
    assert "before the adaptive check" not in card.text


def test_results_of_other_weights_are_left_out_and_told(run_dir, capsys):
    """Of last.pt, and of a set of this very file that was chosen by name."""
    named = json.loads((run_dir / f"{RESULT}.json").read_text()) | {"weights": "weights"}
    files.write_json(named, run_dir / "results-best-named.json")
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    others = "results-best-named.json, results-last-clean-linf-0.15-n20.json"
    assert f"left out, of another checkpoint file: {others}" in capsys.readouterr().out
    assert not list((run_dir / "hub").glob("results-last*"))
    assert not (run_dir / "hub" / "results-best-named.json").exists()


@pytest.mark.parametrize(
    "commit, diff, words",
    [
        ("abc", "", "commit `abc`, no file differed from it"),
        ("abc", "+ a line", "commit `abc`, files differed from it"),
        ("abc", None, "commit `abc`, whether files differed from it is not recorded"),
        (None, "", "commit not recorded"),
    ],
)
def test_what_is_said_of_the_code(commit, diff, words, run_dir):
    """Of a run whose env.json does not know whether files differed, git.diff tells."""
    environment = files.read_json(run_dir / "env.json") | {"commit": commit}
    environment.pop("dirty")
    files.write_json(environment, run_dir / "env.json")
    (run_dir / "git.diff").unlink()
    if diff is not None:
        (run_dir / "git.diff").write_text(diff)
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    assert f"- code: {words}\n" in (run_dir / "hub" / "README.md").read_text()
    assert "a line" not in (run_dir / "hub" / "README.md").read_text()


def test_without_env_json_the_card_claims_nothing(run_dir, capsys):
    (run_dir / "env.json").unlink()
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    assert "note: env.json is missing" in capsys.readouterr().out
    text = (run_dir / "hub" / "README.md").read_text()
    training = text.split("### Training")[1].split("###")[0]
    assert "# the command is not recorded" in training
    assert "- code: commit not recorded\n- machine: not recorded" in training


def test_a_training_without_an_attack_is_not_called_robust(run_dir):
    write_json(run_dir / "args.json", loss="standard")
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    card = huggingface_hub.ModelCard.load(run_dir / "hub" / "README.md")
    assert card.data.tags == ["adversarial-robustness"]
    assert "| trained against | nothing: on images without an attack |" in card.text


# ----------------------------------------------------------------- what is refused of an export


def export_fails(run_dir, *words, checkpoint="best.pt"):
    refused(lambda: call(evaluate, "--export hub --checkpoint", run_dir / checkpoint), *words)


def test_an_export_needs_an_attack(run_dir):
    """PGD alone is none: it is a check."""
    (run_dir / f"{RESULT}.json").unlink()
    remedy = "put --attack autoattack in the place of --export hub"
    export_fails(run_dir, "best.pt: no finished result of apgd, autoattack, rand", remedy)
    export_fails(run_dir, "last.pt: no finished result", checkpoint="last.pt")
    assert not (run_dir / "hub").exists()


def test_damaged_results_are_not_exported(run_dir):
    path = run_dir / f"{RESULT}.json"
    whole = json.loads(path.read_text())
    write_json(path, robust_correct=whole["robust_correct"] + 1)
    export_fails(run_dir, f"{RESULT}.npz: of another result, (images, right, robust) are [12, ")
    write_json(path, robust_correct=whole["robust_correct"], robust=1.0)
    export_fails(run_dir, f"{RESULT}.json: its robust accuracy is not that of its verdicts")
    write_json(path, robust=whole["robust"], n=None)
    export_fails(run_dir, f"{RESULT}.json: its entry 'n' is missing or damaged")
    write_json(path, n=12, sanity=[{"check": 1}])
    export_fails(run_dir, f"{RESULT}.json: its sanity checks are damaged")
    path.write_text("{")
    export_fails(run_dir, f"{RESULT}.json: truncated, broken, or not a JSON object")
    files.write_json(whole, path)
    (run_dir / f"{RESULT}.npz").unlink()
    export_fails(run_dir, f"{RESULT}.npz: no such file")
    assert not (run_dir / "hub").exists()


def test_what_is_published_is_not_exported_again(exported, capsys):
    for path in (exported, "hub:them/name"):
        with pytest.raises(SystemExit):
            call(evaluate, "--export hub --checkpoint", path)
        assert f"argument --export: {path} is published" in capsys.readouterr().err


@pytest.mark.parametrize("entry, value", [("n_synthetic", "many"), ("synthetic", 7)])
def test_a_damaged_args_json_is_one_line(entry, value, run_dir):
    write_json(run_dir / "args.json", **{"n_synthetic": 5, entry: value})
    export_fails(run_dir, "args.json: ")
    assert not (run_dir / "hub").exists()


@pytest.mark.parametrize("entry, value", [("model", "wrn-28-10"), ("norm", "l2"), ("eps", 0.3)])
def test_the_arguments_of_another_training_are_refused(entry, value, run_dir):
    write_json(run_dir / "args.json", **{entry: value})
    export_fails(run_dir, "args.json: of another checkpoint", f"{entry} {value} there")
    assert not (run_dir / "hub").exists()


def test_that_the_sanity_checks_were_left_out_is_told(run_dir):
    write_json(run_dir / f"{RESULT}.json", sanity_images=0, warnings=[])
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    card = huggingface_hub.ModelCard.load(run_dir / "hub" / "README.md")
    assert card.data.eval_results[1].metric_name.endswith("n = 12, without sanity checks")
    assert "| without sanity checks |" in card.text


def test_a_damaged_environment_is_not_recorded(run_dir):
    write_json(run_dir / "env.json", dirty=[], world_size=[1])
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    card = (run_dir / "hub" / "README.md").read_text()
    assert "whether files differed from it is not recorded" in card and "torchrun" not in card


def test_without_args_json_nothing_is_exported(run_dir):
    (run_dir / "args.json").unlink()
    export_fails(run_dir, "args.json: no such file")


def test_a_folder_of_something_else_is_kept(run_dir, exported, tmp_path):
    """The same export again is fine; another model, or an edited card, is not replaced."""
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    written = {path: path.read_bytes() for path in (run_dir / "hub").iterdir()}
    call(evaluate, "--export hub --checkpoint", run_dir / "best.pt")
    assert {path: path.read_bytes() for path in (run_dir / "hub").iterdir()} == written
    (run_dir / "hub" / "README.md").write_text("mine")
    export_fails(run_dir, "hub/README.md: is there already, with other content")
    assert (run_dir / "hub" / "README.md").read_text() == "mine"

    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"of another model")
    flags = ["--export hub --checkpoint", run_dir / "best.pt", "--out"]
    words = "other/model.safetensors: is there already"
    refused(lambda: call(evaluate, *flags, other), words)
    assert [path.name for path in other.iterdir()] == ["model.safetensors"]
    (tmp_path / "file").write_text("x")
    refused(lambda: call(evaluate, *flags, tmp_path / "file"), "file: is a file, expected a dir")
    call(evaluate, *flags, tmp_path / "elsewhere")
    assert {p.name for p in (tmp_path / "elsewhere").iterdir()} == {p.name for p in written}


# ------------------------------------------------------------------------------ reading it back


def logits_of(path):
    model, about = load_classifier(str(path), DIGITS, "cpu")
    images, _ = data.load_test(DIGITS, None)
    with torch.no_grad():
        return model(data.to_x(images[:50])), about


def test_the_folder_is_a_checkpoint(trained, exported, hub, tmp_path, monkeypatch, capsys):
    """It has the logits and the threat model of best.pt, and results go beside it, not into it."""
    before = sorted(exported.iterdir())
    expected, _ = logits_of(trained / "best.pt")
    for path in (exported, f"{exported}/", hub):
        logits, about = logits_of(path)
        assert torch.equal(logits, expected)
        assert (about["norm"], about["eps"]) == ("linf", 0.15)
        assert files.sha256(path) == files.sha256(exported / "model.safetensors")

    flags = "--attack pgd --n-images 10 --n-steps 1 --n-restarts 1 --eps 0.3 --sanity-images 0"
    for path in (f"{exported}/", "."):
        monkeypatch.chdir(exported)
        call(evaluate, flags, "--checkpoint", path)
        printed = capsys.readouterr().out
        assert "note: trained against linf 0.15, evaluated against linf 0.3" in printed
        assert (trained / "results-hub-pgd-linf-0.3-n10.json").exists()
    monkeypatch.chdir(tmp_path)
    call(evaluate, flags, "--checkpoint", hub)
    assert "note: trained against linf 0.15" in capsys.readouterr().out
    assert (tmp_path / "out" / "name" / "results-name-pgd-linf-0.3-n10.json").exists()
    assert sorted(exported.iterdir()) == before


def test_every_script_takes_the_folder(exported, diffusion_dir, tmp_path):
    digest = files.sha256(exported / "model.safetensors")
    call(evaluate, "--checkpoint", exported, "--attack transfer --n-images 4 --transfer-from",
         exported, "--sanity-images 0 --out", tmp_path / "t.json")  # fmt: skip
    assert files.read_json(tmp_path / "t.json")["transfer_sha256"] == digest
    flags = "--epochs 1 --n-train 100 --n-steps 1 --eval-n-steps 1 --init"
    call(train_at, flags, exported, "--out-dir", tmp_path / "run")
    assert files.read_json(tmp_path / "run" / "args.json")["init_sha256"] == digest
    flags = "--n-images 20 --n-steps 2 --keep-fraction 0.5 --classifier"
    call(generate_synthetic, "--diffusion", diffusion_dir, flags, exported,
         "--out-dir", tmp_path / "set")  # fmt: skip
    selection = files.read_json(tmp_path / "set" / "manifest.json")["selection"]
    assert selection["classifier_sha256"] == digest
    jobs = analyze.jobs_of(analyze.parse_args(["--model", f"a={exported}"]), {}, None)
    assert jobs[0].request == {"checkpoint_sha256": digest}


def test_damaged_folders_are_one_line(folder, exported, tmp_path):
    def fails(*words):
        refused(lambda: load_classifier(str(folder), DIGITS, "cpu"), *words)

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    fails("model.safetensors: damaged, or of another folder: its SHA-256 is")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fails("model.safetensors: damaged")
    weights.write_bytes(whole)

    config = folder / "config.json"
    write_json(config, eps=0.3)
    fails("model.safetensors: its eps is 0.15, config.json beside it has 0.3")
    other = files.read_json(config) | {"eps": 0.15}
    other["sha256"] = other["sha256"] | {"model.safetensors": "0" * 64}
    files.write_json(other, config)
    fails("damaged, or of another folder", "config.json beside it has 000000000000...")
    files.write_json(other | {"sha256": ["0" * 64]}, config)
    fails("config.json: its entry 'sha256' is damaged")
    config.write_text("{")
    fails("config.json: truncated, broken")
    config.unlink()  # as in a folder of others
    assert torch.equal(logits_of(folder)[0], logits_of(exported)[0])
    weights.unlink()
    fails(f"{folder}: is a directory without model.safetensors")


def test_a_network_that_the_file_cannot_hold_is_not_built(folder):
    """It would take 12 GB."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["classifier"])
    metadata = {"classifier": json.dumps(about | {"model_name": "wrn-196-32"})}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata)
    (folder / "config.json").unlink()
    words = "hub: too small for the wrn-196-32 that it names, of 3,148,124,346 numbers"
    refused(lambda: load_classifier(str(folder), DIGITS, "cpu"), words)


def test_the_data_set_of_the_folder_is_checked(exported, tmp_path):
    argv = ["--dataset fashion-mnist --data-dir", tmp_path, "--checkpoint", exported]
    words = "trained on digits (10 classes), not on fashion-mnist"
    refused(lambda: call(evaluate, *argv, "--attack clean"), words)


# -------------------------------------------------------------------------------- comparing


def test_published_verdicts_are_compared(exported, trained, hub, folder, capsys):
    """Of the hub with a local result, which are the same here; damage is one line."""
    ours = trained / f"{RESULT}.npz"
    theirs = f"{hub}/{RESULT}.npz"
    call(evaluate, "--compare", theirs, ours)
    printed = capsys.readouterr().out
    assert f"A: {theirs}\n" in printed and "differs" not in printed
    robust = int(np.load(ours)["robust"].sum())
    assert f"(both {robust}, A alone 0, B alone 0, neither {12 - robust})" in printed

    refused(lambda: call(evaluate, "--compare", hub, ours), "expected hub:OWNER/NAME/FILE.npz")
    words = [f"{hub}/x.npz: no such file; its .npz files are ", f"{RESULT}.npz"]
    refused(lambda: call(evaluate, "--compare", f"{hub}/x.npz", ours), *words)
    shutil.copy(exported / "results-best-pgd-linf-0.15-n4.npz", folder / f"{RESULT}.npz")
    damaged = folder / f"{RESULT}.npz"
    refused(lambda: call(evaluate, "--compare", damaged, ours), f"{RESULT}.npz: damaged")
    shutil.copy(exported / f"{RESULT}.npz", damaged)
    result = files.read_json(folder / f"{RESULT}.json")
    files.write_json(result | {"eps": 0.3}, folder / f"{RESULT}.json")
    refused(lambda: call(evaluate, "--compare", damaged, ours), f"{RESULT}.json: damaged")


# -------------------------------------------------------------------------- synthetic sets


@pytest.fixture(scope="module")
def generated(tmp_path_factory, diffusion_dir):
    """A set of three shards, made by a command with paths in it."""
    out = tmp_path_factory.mktemp("secret") / "set"
    flags = "--n-images 50 --shard-size 20 --n-steps 3 --batch-size 8 --rho 5 --seed 5"
    call(generate_synthetic, "--diffusion", diffusion_dir, flags, "--data-dir", f"{HOME}/data",
         "--out-dir", out)  # fmt: skip
    return out


@pytest.fixture
def made_set(generated, tmp_path):
    return Path(shutil.copytree(generated, tmp_path / "set"))


def verify(made_set, network, shard, status=None):
    """--verify; status: that it ends with, None where it does not end with one."""
    argv = ["--out-dir", made_set, "--diffusion", network, "--verify", shard]
    if status is None:
        return call(generate_synthetic, *argv)
    with pytest.raises(SystemExit) as exit_info:
        call(generate_synthetic, *argv)
    assert exit_info.value.code == status


@pytest.mark.parametrize("shard, n", [(0, 20), (1, 20), (2, 10)])
def test_a_shard_can_be_made_again(shard, n, made_set, diffusion_dir, capsys):
    """Each by itself, the last one of which is smaller; nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in made_set.iterdir()}
    verify(made_set, diffusion_dir, shard)
    printed = capsys.readouterr().out
    assert f"shard {shard}: images {20 * shard} to {20 * shard + n - 1} made again" in printed
    assert f"images  equal to the bit: {n}, {n * 64:,} values\nlabels  equal: {n}\n" in printed
    assert "note" not in printed
    assert {path: path.stat().st_mtime_ns for path in made_set.iterdir()} == before


def test_differences_are_counted(made_set, diffusion_dir, capsys):
    """Of a shard that was changed by known amounts, on another version."""
    path = made_set / "shard-00001-images.npy"
    images = np.load(path)
    expected = images.copy()
    images[3, 0, 0, 0] ^= 1
    images[3, 2, 1, 0] = (int(images[3, 2, 1, 0]) + 128) % 256
    images[9, 7, 7, 0] ^= 1
    gaps = np.abs(images.astype(int) - expected)
    np.save(path, images)
    labels = np.load(made_set / "shard-00001-labels.npy")
    labels[4] = (labels[4] + 1) % 10
    np.save(made_set / "shard-00001-labels.npy", labels)
    write_json(made_set / "env.json", torch="1.0")
    verify(made_set, diffusion_dir, 1, status=1)
    printed = capsys.readouterr().out
    assert f"note: torch is {torch.__version__} here, and was 1.0 in the first place" in printed
    amounts = f"by {gaps.sum() / 3:.2f} of 255 on average, by {gaps.max()} at most"
    assert f"images  DIFFERENT: 2 of 20, in 3 of 1,280 values, {amounts}" in printed
    assert "labels  DIFFERENT: 1 of 20" in printed
    (made_set / "env.json").unlink()
    verify(made_set, diffusion_dir, 0)
    assert "note: env.json is missing" in capsys.readouterr().out


def test_what_cannot_be_verified_is_one_line(
    made_set, diffusion_dir, tmp_path, monkeypatch, capsys
):
    def fails(*words, network=diffusion_dir, shard=1):
        refused(lambda: verify(made_set, network, shard), *words)

    fails("--verify 3: ", "has shards 0 to 2", shard=3)
    manifest = files.read_json(made_set / "manifest.json")
    files.write_json(manifest | {"dataset": "cifar10"}, made_set / "manifest.json")
    own = generate_synthetic.parse_args(["--out-dir", str(made_set), "--verify", "0"])
    refused(lambda: generate_synthetic.verify(own), "out/diffusion-cifar10: no such directory")
    files.write_json(manifest, made_set / "manifest.json")
    other = shutil.copytree(diffusion_dir, tmp_path / "other")
    weights = safetensors.torch.load_file(f"{other}/diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    safetensors.torch.save_file(weights, f"{other}/diffusion_pytorch_model.safetensors")
    fails("--diffusion", "another network, its SHA-256 is", network=other)
    argv = [
        "--out-dir",
        made_set,
        "--diffusion",
        diffusion_dir,
        "--verify 1 --guide",
        diffusion_dir,
    ]
    refused(lambda: call(generate_synthetic, *argv), "--guide: the set was made without")

    manifest = files.read_json(made_set / "manifest.json")
    for change, words in (
        ({"sampler": manifest["sampler"] | {"n_steps": 0}}, "n_steps: expected a whole number"),
        ({"sampler": None}, "n_steps: expected a whole number, got 'None'"),
        ({"sampler": manifest["sampler"] | {"rho": 1e-5}}, "its noise levels are none"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"precision": "fp8"}, "its precision is fp8"),
        ({"shard_size": 10}, "shard-00001-images.npy: found uint8 (20, 8, 8, 1), expected"),
        ({"format": 1}, "format 1, expected 2"),
        ({"guide_sha256": "0"}, "--guide: the set has such a network"),
    ):
        files.write_json(manifest | change, made_set / "manifest.json")
        fails(words)
    files.write_json(manifest | {"n": 10**13, "shard_size": 10**13}, made_set / "manifest.json")
    fails("shard-00000-images.npy: found uint8 (20, 8, 8, 1), expected", shard=0)
    files.write_json(manifest, made_set / "manifest.json")
    (made_set / "shard-00001-labels.npy").unlink()
    fails("shard-00001-labels.npy: no such file")
    verify(made_set, diffusion_dir, 0)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--verify 1 --seed 3 --n-steps 2", "argument --verify: goes with --diffusion"),
        ("--export hub --seed 3", "argument --export: goes with --dataset"),
    ],
)
def test_flags_that_the_manifest_knows_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        generate_synthetic.parse_args(flags.split())
    printed = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert words in printed and "--seed" in printed and len(printed.splitlines()) == 1


def test_a_set_becomes_uploadable(made_set, generated, diffusion_dir, capsys):
    """Card, checksums, and no path of the machine in any file; its identity stays."""
    assert HOME in (made_set / "env.json").read_text()
    manifest = (made_set / "manifest.json").read_bytes()
    for _ in range(2):  # the same again is fine
        call(generate_synthetic, "--export hub --out-dir", made_set)
    for path in made_set.iterdir():
        for secret in (HOME, str(generated), "/secret", os.getcwd()):
            assert secret.encode() not in path.read_bytes(), (path, secret)
    assert (made_set / "manifest.json").read_bytes() == manifest
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=made_set, capture_output=True)
    assert checked.returncode == 0 and checked.stdout.count(b"OK") == 7

    card = huggingface_hub.DatasetCard.load(made_set / "README.md")
    assert card.data.size_categories == ["n<1K"] and card.data.license is None
    found = files.read_json(made_set / "memorisation.json")
    assert found["n_generated"] == 50 and found["n_train"] == 800 and found["n_test"] == 797
    for words in (
        "# 50 generated images for digits",
        "| labels | 10 classes, 5 images each |",
        f"| network | SHA-256 `{json.loads(manifest)['network_sha256']}` |",
        "| selected | no: all images that were generated |",
        f"images to the nearest of 800 training images is {found['mean_generated']:.3f}",
        "| n_steps | 3 |",
        "--rho 5 --seed 5 --data-dir data --out-dir set",
        "| held out | the network has not seen the first 200 training images |",
    ):
        assert words in card.text, words
    verify(made_set, diffusion_dir, 2)
    (made_set / "README.md").write_text("mine")
    refused(lambda: call(generate_synthetic, "--export hub --out-dir", made_set), "other content")


def test_cards_of_sets_with_less(made_set, capsys):
    """Selected images; without env.json, memorisation.json and what older manifests lack."""
    np.save(made_set / "selection.npy", np.array([0, 1, 10, 25]))
    manifest = files.read_json(made_set / "manifest.json")
    del manifest["precision"], manifest["sampler"]
    manifest |= {"held_out": 0, "selection": {"keep_fraction": 0.2, "classifier_sha256": "ab"}}
    files.write_json(manifest, made_set / "manifest.json")
    (made_set / "memorisation.json").write_text("{}")
    export = ["--export hub --out-dir", made_set]
    refused(lambda: call(generate_synthetic, *export), "memorisation.json: truncated, broken")
    (made_set / "memorisation.json").unlink()
    (made_set / "env.json").unlink()
    call(generate_synthetic, *export)
    assert "note: env.json is missing" in capsys.readouterr().out
    text = (made_set / "README.md").read_text()
    for words in (
        "# 4 generated images for digits",
        "| labels | 10 classes, 0 to 2 images each |",
        "| selected | 0.2 of each class, 4 of 50 images, listed in selection.npy",
        "by the confidence of the classifier SHA-256 `ab`",
        "the network may have seen all training images",
        "Whether images are copies of training images is not recorded.",
        "# the command is not recorded",
        "| precision | not recorded |",
    ):
        assert words in text, words
    assert "selection.npy" in (made_set / "SHA256SUMS").read_text()


def test_the_commands_of_a_folders_set_name_its_size():
    manifest = {"dataset": "folder", "image_shape": [32, 32, 3], "labels_of_sha256": "ab"}
    commands = set_card._commands(SimpleNamespace(manifest=manifest)).splitlines()
    data = "--dataset folder --data-dir DIR --image-size 32"
    assert commands[2] == f"python train_at.py {data} --synthetic SET"
    assert commands[3].endswith(f"{data} --classifier CLASSIFIER --verify 0")


def test_a_set_with_a_missing_shard_is_not_exported(made_set):
    (made_set / "shard-00001-images.npy").unlink()
    refused(
        lambda: call(generate_synthetic, "--export hub --out-dir", made_set),
        "shard-00001-images.npy: no such file",
    )
    assert not (made_set / "README.md").exists()


def test_a_published_pupil_must_have_had_the_same_images(folder, diffusion_dir, tmp_path):
    """Its config.json tells, as args.json does of a run."""
    flags = "--verdict --blocks mid_block --n-train 100 --pupil"
    where = ["--diffusion", diffusion_dir, "--out-dir", tmp_path / "features"]
    refused(
        lambda: call(extract_features, flags, folder, *where),
        f"--pupil {folder}: trained or validated on other images than these; {folder} has val_size",
    )
