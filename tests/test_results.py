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


def made(verdicts, attack="apgd", **more):
    """A run of one seed: its verdicts are one digit per test image."""
    return {"verdicts": verdicts, "attack": attack, "held_out": [[5, 0.5, 0.2], [10, 0.6, verdicts.count("3") / 10]]} | more


def test_t_interval_is_students():
    values = np.array([1.0, 4.0, 2.5, 7.0])
    expected = t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    np.testing.assert_allclose(stats.t_interval(values), [values.mean(), *expected])


def test_verdicts_are_counted_from_the_attack_that_they_fell_to():
    cells = {"at": {0: made("0012233345", "autoattack"), 1: made("0012233333")}}
    found = {m: results.accuracies(cells, "at", m).mean(1).tolist() for m in ("clean", "two_attacks", "autoattack", "held_out")}
    assert found == {"clean": [80, 80], "two_attacks": [50, 50], "autoattack": [10], "held_out": [30, 50]}
    cells["at"][0]["held_out"] += [[15, 0.6, 0.25]]
    assert results.accuracies(cells, "at", "held_out").tolist() == [[30], [50]]
    assert results.accuracies(cells, "at", "last").tolist() == [[25], [50]]


def test_effects_are_paired_by_seed_and_image():
    """Of the seeds that all cells have; seeds whose accuracies differ widely do not widen the interval of the difference."""
    cells = {
        "at": {0: made("3331111111"), 1: made("3333333111"), 2: made("3333311111")},
        "dm_at": {0: made("3333111111"), 1: made("3333333331"), 2: made("1113333333", "autoattack")},
        "at_dra": {1: made("3333333311"), 0: made("3311111111")},
        "dm_at_dra": {0: made("3331111111"), 1: made("3333333333"), 3: made("0000000000")},
    }
    images = results.effect(cells, [("dm_at", "at")], "two_attacks")
    np.testing.assert_array_equal(images[0], [0, 0, 0, 100, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(images[2], [-100, -100, -100, 0, 0, 100, 100, 100, 100, 100])
    np.testing.assert_allclose(images.mean(1), [10, 20, 20])
    np.testing.assert_allclose(
        results.effect(cells, results.EFFECTS[results.IMAGES], "two_attacks").mean(1), [(10 + 10) / 2, (20 + 20) / 2]
    )
    np.testing.assert_allclose(results.effect(cells, results.EFFECTS[results.DRA], "held_out"), [[-10], [10]])
    assert results.effect(cells, [("dm_at", "at")], "autoattack").shape == (0, 1)
    assert results.effect(cells, [("shuffled", "at")], "clean").shape == (0, 1)
    assert results.show(results.effect(cells, [("dm_at", "at")], "held_out"), "+") == "+16.7 ± 14.3"  # 4.303 * 5.77 / sqrt(3)
    assert results.show(images[:1], "+") == "+10.0" and results.show(images[:0]) == "-"


def test_interval_over_seeds_alone_is_students_and_so_is_that_over_images_alone():
    rng = np.random.default_rng(0)
    seeds, images = rng.normal(size=(5, 1)), rng.normal(size=(1, 40))
    half = t.ppf(0.975, 4) * seeds.std(ddof=1) / 5**0.5
    np.testing.assert_allclose(results.over_seeds_and_images(seeds + np.zeros((5, 40))), half)
    half = t.ppf(0.975, 39) * images.std(ddof=1) / 40**0.5
    np.testing.assert_allclose(results.over_seeds_and_images(images + np.zeros((5, 40))), half)
    assert results.over_seeds_and_images(np.ones((5, 40))) == 0


@pytest.mark.parametrize("of_seeds, of_images, rest", [(0.3, 2, 3), (2, 0.3, 1), (0, 0, 3), (0.5, 5, 0.5)])
def test_interval_over_seeds_and_images_covers(of_seeds, of_images, rest):
    """The true mean 0 of a two-way layout with normal components, in about 95 of 100 draws; more where a component is 0."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        values = of_seeds * rng.normal(size=(10, 1)) + of_images * rng.normal(size=(1, 60)) + rest * rng.normal(size=(10, 60))
        covered.append(abs(values.mean()) <= results.over_seeds_and_images(values))
    assert 0.93 <= np.mean(covered) <= 0.995


def test_settings_stand_in_their_order_with_the_default_among_them():
    cells = {"aux_weight=10": {}, "aux_weight=0.3": {}, "dm_at_dra": {}, "at": {}}
    assert list(results.settings_of(cells, "aux_weight").items()) == [
        ("0.3", "aux_weight=0.3"),
        ("1", "dm_at_dra"),
        ("10", "aux_weight=10"),
    ]


@pytest.fixture
def evidence(tmp_path, diffusion_dir, monkeypatch):
    """Runs of one epoch: at/0 attacked by both modes, at/1 not at all; zero/0 (DRA of weight 0); zero/1 only begun."""
    short = ["--epochs", "1", "--epoch-images", "16", "--batch-size", "8", "--n-steps", "1", "--eval-n-steps", "1", "--val-size", "20"]
    root = tmp_path / "evidence"
    for seed in "01":
        train_at.main(train_at.parse_args([*short, "--seed", seed, "--out-dir", str(root / "few" / "at" / seed)]))
    zero = ["--aux-weight", "0", "--teacher", diffusion_dir, "--out-dir", str(root / "few" / "zero" / "0")]
    train_at_aux.main(train_at_aux.parse_args([*short, *zero]))
    best = ["--checkpoint", str(root / "few" / "at" / "0" / "best.pt"), "--sanity-images", "0"]
    for more in (["--attack", "apgd", "--n-images", "30"], ["--attack", "autoattack", "--n-images", "6"]):
        evaluate.main(evaluate.parse_args([*best, *more]))
    evaluate.main(evaluate.parse_args([*best, "--n-images", "40", "--eps", "0.01"]))  # another radius: not what the tables are of
    begun = root / "few" / "zero" / "1"  # killed before its first validation
    begun.mkdir()
    (begun / "args.json").write_text((root / "few" / "zero" / "0" / "args.json").read_text())
    (begun / "log.jsonl").touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return root


def test_runs_are_taken_in_when_trained(evidence, capsys):
    results.take_in(str(evidence))
    assert "3 runs; below" in capsys.readouterr().out
    store = evidence.parent / "docs" / "results.json"
    runs = json.loads(store.read_text())["runs"]
    assert sorted(runs) == ["few/at/0", "few/at/1", "few/zero/0"]
    at, other, zero = runs.values()
    files = [evidence / "few" / "at" / "0" / f"results-best-{name}.json" for name in ("autoattack-linf-0.15-n6", "apgd-linf-0.15-n30")]
    full, two = (json.loads(path.read_text()) for path in files)
    found = {m: round(len(at["verdicts"]) * results.accuracies({"at": {0: at}}, "at", m).mean() / 100) for m in results.WITHSTOOD}
    assert at["n"] == 6 and found["clean"] == full["clean_correct"] and found["autoattack"] == full["robust_correct"]
    assert "n" not in other and "n" not in zero
    assert at["best_sha256"] == zero["best_sha256"]  # weight 0 is train_at.py, to the bit
    weights = [evidence / "few" / cell / "0" / "best.safetensors" for cell in ("at", "zero")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    given = {"epochs": 1, "epoch_images": 16, "batch_size": 8, "n_steps": 1, "eval_n_steps": 1, "val_size": 20}
    assert at["settings"] == other["settings"] == given
    assert zero["settings"] == given | {"aux_weight": 0} | {key: zero["settings"][key] for key in ("teacher", "teacher_sha256")}
    assert [line[0] for line in at["held_out"]] == [2]

    files[0].unlink()  # without AutoAttack it is apgd's result that counts
    at = results.take_in(str(evidence))["few/at/0"]
    found = {m: round(30 * results.accuracies({"at": {0: at}}, "at", m).mean() / 100) for m in ("clean", "two_attacks")}
    assert found == {"clean": two["clean_correct"], "two_attacks": two["robust_correct"]} and not results.has(at, "autoattack")

    kept = store.read_bytes()
    again = files[1].with_name("results-best-apgd-linf-0.15-n9.json")
    again.write_text(files[1].read_text())
    with pytest.raises(UserError, match="which of them counts"):
        results.take_in(str(evidence))
    again.unlink()
    (evidence / "few" / "at" / "0" / "best.pt").write_bytes(b"another")
    with pytest.raises(UserError, match="of another checkpoint"):
        results.take_in(str(evidence))
    assert store.read_bytes() == kept


def test_runs_that_cannot_be_compared_are_refused():
    run = {"script": "train_at.py", "seed": 0, "settings": {"n_train": 100, "lr": 0.1}, "norm": "linf", "eps": 0.15, "n": 30}
    mixed = run["settings"] | {"synthetic": 1, "synthetic_sha256": "a"}
    dra, aligned = run | {"script": "train_at_aux.py"}, run["settings"] | {"teacher": 1, "teacher_sha256": "b", "block": "up"}
    fits = {
        "digits-100/at/0": run,
        "digits-100/at/1": run | {"seed": 1},
        "digits-100/at_dra/0": dra | {"settings": aligned},
        "digits-100/dm_at/0": run | {"settings": mixed},
        "digits-100/n_images=3/0": run | {"settings": mixed | {"synthetic_sha256": "c"}},
        "digits-100/loss=pgd/0": run | {"settings": mixed | {"loss": "pgd"}},
        "digits-100/at_dra,sigma=2/0": dra | {"settings": aligned | {"sigma": 2.0}},
        "digits-100/at_dra,shuffled,teacher_steps=1/0": dra | {"settings": aligned | {"shuffle_targets": True, "teacher_sha256": "d"}},
    }
    assert list(results.by_cell(fits)["digits-100"]) == [
        "at",
        "at_dra,shuffled,teacher_steps=1",
        "at_dra,sigma=2",
        "at_dra",
        "dm_at",
        "loss=pgd",
        "n_images=3",
    ]
    for name, change, message in [
        ("digits-100/at/1", {"seed": 2}, "digits-100/at/1: a run with --seed 2"),
        ("digits-100/at/1", {"settings": {"n_train": 100}}, "digits-100/at: its runs differ in lr"),
        ("digits-100/at/1", {"n": 20}, "digits-100: its runs differ in n;"),
        ("digits-100/loss=pgd/0", {"eps": 0.1}, "digits-100: its runs differ in eps"),
        ("digits-100/dm_at/0", {"settings": {"lr": 0.1, "synthetic": 1}}, "digits-100/dm_at: its runs differ in n_train"),
        ("digits-100/loss=pgd/0", {"settings": mixed | {"loss": "pgd", "epochs": 3}}, "loss=pgd: its runs differ in epochs"),
        ("digits-100/loss=pgd/0", {"settings": mixed | {"loss": "other"}}, "loss=pgd/0: a run with loss other"),
        ("digits-100/loss=pgd/0", {"settings": mixed | {"loss": "pgd", "synthetic_sha256": "c"}}, "differ in synthetic_sha256"),
        ("digits-100/at_dra,sigma=2/0", {"settings": aligned | {"teacher_sha256": "d", "sigma": 2.0}}, "differ in teacher_sha256"),
        ("digits-100/at_dra,sigma=2/0", {"settings": aligned | {"sigma": 2.5}}, "sigma=2/0: a run with sigma 2.5"),
        ("digits-100/at_dra,sigma=2/0", {"settings": aligned | {"sigma": 2.0, "block": "mid"}}, "sigma=2: its runs differ in block"),
        ("digits-100/sigma=2.0/0", {"settings": aligned | {"sigma": 2.0}}, "sigma=2.0/0: a run with sigma 2.0"),
        ("digits-100/sigma=0.1/0", {}, "sigma=0.1/0: the default; its cell is dm_at_dra"),
        ("digits-200/at/0", {"seed": 0}, "digits-200: runs with --n-train {100}"),
        ("digits-100/at/zero", {}, "digits-100/at/zero: a run with --seed 0"),
        ("digits-100/other,foo/0", {}, "digits-100/other,foo/0: neither a cell"),
        ("digits-100/sigma=2,shuffled/0", {}, "sigma=2,shuffled/0: neither a cell"),
    ]:
        with pytest.raises(UserError, match=message.replace("{", "\\{")):
            results.by_cell(fits | {name: fits.get(name, run) | change})


def test_settings_are_compared_on_the_seeds_that_all_of_them_have():
    """Here no setting differs from the default on any seed, but the default is better on the seeds that one of them lacks."""
    low, high = made("3331111111"), made("3333333331")
    cells = {"at": dict.fromkeys(range(4), made("3111111111")), "dm_at": {0: low, 1: low, 2: low, 3: high}}
    cells |= {"n_images=5": {0: low, 1: low, 2: low, 3: high}, "n_images=7": {0: low, 1: low, 2: low}, "n_images=9": {0: high, 1: high}}
    settings = results.varied(cells)["n_images"]  # that of two seeds is not among them
    assert settings == {"without (AT)": "at", "5": "n_images=5", "7": "n_images=7", "10000": "dm_at"}
    rows = results.ablation_table(cells, {"n_images": settings})[2:-1]
    found = {row.split(" | ")[1]: row.split(" | ")[3:] for row in rows}
    same = ["+0.0 ± 0.0", "+0.0 ± 0.0 (0.0)", "+0.0 ± 0.0 (0.0) |"]
    assert found["5"] == found["7"] == ["3", *same] and found["without (AT)"][:2] == ["3", "-10.0 ± 0.0"]  # 20 of the first checkpoint


def test_seeds_that_chose_a_form_do_not_count_for_it():
    poor, good = made("3311111111"), made("3333333311")
    form = "at_dra,align_loss=contrastive"
    cells = {"at": dict.fromkeys(range(5), poor), form: {0: good, 1: good, 2: good, 3: poor, 4: poor}}
    cells |= {f"{form},shuffled": {3: good, 4: good}, "at_dra,variant=rise": {0: good, 1: good}}
    rows = [row.strip("| ").split(" | ") for row in results.forms_table(cells)[2:-1]]
    assert [row[:4] for row in rows] == [
        ["AT+DRA, `align_loss=contrastive`", "AT", "2", "+0.0 ± 0.0"],
        ["AT+DRA, `align_loss=contrastive`, `shuffled`", "AT", "2", "+60.0 ± 0.0"],
        ["AT+DRA, `align_loss=contrastive`, `shuffled`", "the same without `shuffled`", "2", "+60.0 ± 0.0"],
        ["AT+DRA, `rise`", "AT", "2", "+60.0 ± 0.0"],
    ]


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


def test_a_store_that_is_half_full_gives_a_section():
    """Cells without a partner, without an attack, of one seed: no table of theirs, no nonsense."""
    runs = json.loads((ROOT / "docs" / "results.json").read_text())["runs"]
    first = {name: run for name, run in runs.items() if name in ("digits-100/at/0", "digits-100/zero/0")}
    first["fashion-6400/at/0"] = first["digits-100/zero/0"]  # not attacked
    text = results.section(first)
    assert "| AT | 1 |" in text and "nan" not in text and "weight 0" not in text and "0 seeds" not in text and "Fashion" not in text
    unattacked = {name: {k: v for k, v in run.items() if k not in ("verdicts", "n")} for name, run in first.items()}
    assert "AutoAttack" in results.section(unattacked) and "test images" not in results.section(unattacked)
