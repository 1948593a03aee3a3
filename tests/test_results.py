"""From runs to README's results: what is kept, how seeds are paired, and that README says what docs/results.json holds."""

import json

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import t

import evaluate
import train_at
import train_at_aux
from common import stats
from common.cli import UserError
from runs import results


def made(robust, clean=90, **more):
    return {"n": 100, "clean": clean, "two_attacks": robust, "validation": [[5, 0.5, 0.2], [10, 0.6, robust / 100]]} | more


def test_t_interval_is_students():
    values = np.array([1.0, 4.0, 2.5, 7.0])
    expected = t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    np.testing.assert_allclose(stats.t_interval(values), [values.mean(), *expected])


def test_effects_are_paired_by_seed():
    """Of the seeds that all cells have; seeds whose accuracies differ widely do not widen the interval of the difference."""
    cells = {
        "at": {0: made(50), 1: made(70), 2: made(60)},
        "dm_at": {0: made(53), 1: made(74), 2: made(65, autoattack=60)},
        "at_dra": {1: made(71), 0: made(49)},
        "dm_at_dra": {0: made(51), 1: made(73), 3: made(10)},
    }
    np.testing.assert_allclose(results.effect(cells, [("dm_at", "at")], "two_attacks"), [3, 4, 5])
    np.testing.assert_allclose(results.effect(cells, results.EFFECTS[results.IMAGES], "two_attacks"), [(3 + 2) / 2, (4 + 2) / 2])
    np.testing.assert_allclose(results.effect(cells, results.EFFECTS[results.DRA], "validation"), [(-1 - 2) / 2, (1 - 1) / 2])
    assert results.effect(cells, [("dm_at", "at")], "autoattack").shape == (0,)
    assert results.effect(cells, [("shuffled", "at")], "clean").shape == (0,)
    assert results.show(results.effect(cells, [("dm_at", "at")], "two_attacks"), "+") == "+4.0 (+1.5 to +6.5)"  # 4 -+ 4.303 / sqrt(3)


def test_settings_stand_in_their_order_with_the_default_among_them():
    cells = {"aux_weight=10": {}, "aux_weight=0.3": {}, "dm_at_dra": {}, "at": {}}
    assert list(results.settings_of(cells, "aux_weight").items()) == [
        ("0.3", "aux_weight=0.3"),
        ("1", "dm_at_dra"),
        ("10", "aux_weight=10"),
    ]


@pytest.fixture
def evidence(tmp_path, diffusion_dir, monkeypatch):
    """Runs of one epoch: at/0 attacked, at/1 not; zero/0 (DRA of weight 0) not attacked, zero/1 only begun."""
    short = ["--epochs", "1", "--epoch-images", "16", "--batch-size", "8", "--n-steps", "1", "--eval-n-steps", "1", "--val-size", "20"]
    root = tmp_path / "evidence"
    for seed in "01":
        train_at.main(train_at.parse_args([*short, "--seed", seed, "--out-dir", str(root / "few" / "at" / seed)]))
    zero = ["--aux-weight", "0", "--teacher", diffusion_dir, "--out-dir", str(root / "few" / "zero" / "0")]
    train_at_aux.main(train_at_aux.parse_args([*short, *zero]))
    evaluate.main(
        evaluate.parse_args(["--checkpoint", str(root / "few" / "at" / "0" / "best.pt"), "--n-images", "30", "--sanity-images", "0"])
    )
    begun = root / "few" / "zero" / "1"  # killed before its first validation
    begun.mkdir()
    (begun / "args.json").write_text((root / "few" / "zero" / "0" / "args.json").read_text())
    (begun / "log.jsonl").touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return root


def test_runs_are_taken_in_when_finished(evidence, capsys):
    results.take_in(str(evidence))
    assert "2 runs; below" in capsys.readouterr().out
    runs = json.loads((evidence.parent / "docs" / "results.json").read_text())["runs"]
    assert sorted(runs) == ["few/at/0", "few/zero/0"]
    at, zero = runs["few/at/0"], runs["few/zero/0"]
    result = json.loads((evidence / "few" / "at" / "0" / "results-best-apgd-linf-0.15-n30.json").read_text())
    assert (at["n"], at["clean"], at["two_attacks"]) == (30, result["clean_correct"], result["robust_correct"]) and "autoattack" not in at
    assert at["best_sha256"] == zero["best_sha256"] and "n" not in zero  # weight 0 is train_at.py, to the bit
    files = [evidence / "few" / cell / "0" / "best.safetensors" for cell in ("at", "zero")]
    assert files[0].read_bytes() == files[1].read_bytes()
    given = {"epochs": 1, "epoch_images": 16, "batch_size": 8, "n_steps": 1, "eval_n_steps": 1, "val_size": 20}
    assert at["settings"] == given and zero["settings"] == given | {"aux_weight": 0, "teacher": zero["settings"]["teacher"]}
    assert [line[0] for line in at["validation"]] == [2]
    (evidence / "few" / "at" / "0" / "best.pt").write_bytes(b"another")
    with pytest.raises(UserError, match="of another checkpoint"):
        results.take_in(str(evidence))
    assert json.loads((evidence.parent / "docs" / "results.json").read_text())["runs"] == runs


def test_readme_says_what_the_results_hold(tmp_path, monkeypatch):
    """README's section is the one that docs/results.json gives, and every figure that it shows can be drawn from there."""
    runs = json.loads((ROOT / "docs" / "results.json").read_text())["runs"]
    readme = (ROOT / "README.md").read_text()
    assert results.section(runs) == readme.partition(results.BEGIN)[2].partition(results.END)[0]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.json").write_text((ROOT / "docs" / "results.json").read_text())
    (tmp_path / "README.md").write_text("head\n" + results.BEGIN + "old\n" + results.END + "tail\n")
    monkeypatch.chdir(tmp_path)
    results.main(results.parse_args([]))
    assert (tmp_path / "README.md").read_text() == "head\n" + results.BEGIN + results.section(runs) + results.END + "tail\n"
    drawn = sorted(path.name for path in (tmp_path / "docs").glob("*.png"))
    assert drawn and all(f"docs/{name}" in readme and (ROOT / "docs" / name).exists() for name in drawn)
