"""From runs to the tables of docs/results.md and README: what is kept, how seeds are paired.

Alone: python -m pytest tests/test_results.py
"""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from scipy.stats import t

import evaluate
import extract_features
import train_at
import train_at_aux
from common import UserError, data
from published.datasets import DATASETS
from runs import effects, pupils, results, store


def stored():
    """(runs, verdicts) of docs/results.json."""
    content = json.loads((ROOT / store.STORE).read_text())
    return content["runs"], content.get("verdicts", {})


def stored_runs():
    return stored()[0]


# ---------------------------------------------------------------------------------- statistics


def made(verdicts, attack="apgd"):
    """A run of one seed: its verdicts are one digit per test image."""
    robust_acc = verdicts.count("3") / 10
    held_out = [[5, 0.5, 0.2], [10, 0.6, robust_acc]]
    return {"verdicts": verdicts, "attack": attack, "held_out": held_out, "settings": {}}


def test_verdicts_are_counted_from_the_attack_that_they_fell_to():
    cells = {"at": {0: made("0012233345", "autoattack"), 1: made("0012233333")}}

    def means(measure):
        return effects.accuracies(cells, "at", measure).mean(1).tolist()

    assert means("clean") == [80, 80]
    assert means("two_attacks") == [50, 50]
    assert means("autoattack") == [10]
    assert means("held_out") == means("last") == [30, 50]
    cells["at"][0]["held_out"] += [[15, 0.6, 0.25]]
    assert effects.accuracies(cells, "at", "held_out").tolist() == [[30], [50]]
    assert effects.accuracies(cells, "at", "last").tolist() == [[25], [50]]


def test_effects_are_paired_by_seed_and_image():
    """Of the seeds that all cells have; that seeds differ widely does not widen a difference."""
    cells = {
        "at": {0: made("3331111111"), 1: made("3333333111"), 2: made("3333311111")},
        "dm_at": {0: made("3333111111"), 1: made("3333333331")},
        "at_dra": {1: made("3333333311"), 0: made("3311111111")},
        "dm_at_dra": {0: made("3331111111"), 1: made("3333333333"), 3: made("0000000000")},
    }
    cells["dm_at"][2] = made("1113333333", "autoattack")
    images = effects.effect(cells, [("dm_at", "at")], "two_attacks")
    np.testing.assert_array_equal(images[0], [0, 0, 0, 100, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(images[2], [-100, -100, -100, 0, 0, 100, 100, 100, 100, 100])
    np.testing.assert_allclose(images.mean(1), [10, 20, 20])
    both = effects.effect(cells, results.EFFECTS[results.IMAGES], "two_attacks")
    np.testing.assert_allclose(both.mean(1), [(10 + 10) / 2, (20 + 20) / 2])
    dra = effects.effect(cells, results.EFFECTS[results.DRA], "held_out")
    np.testing.assert_allclose(dra, [[-10], [10]])
    assert effects.effect(cells, [("dm_at", "at")], "autoattack").shape == (0, 1)
    assert effects.effect(cells, [("shuffled", "at")], "clean").shape == (0, 1)
    held_out = effects.effect(cells, [("dm_at", "at")], "held_out")
    assert effects.show(held_out, "+") == "+16.7 ± 14.3"  # 4.303 * 5.77 / sqrt(3)
    assert effects.show(images[:1], "+") == "+10.0"
    assert effects.show(images[:0]) == "-"


def test_interval_over_seeds_alone_is_students_and_so_is_that_over_images_alone():
    rng = np.random.default_rng(0)
    seeds, images = rng.normal(size=(5, 1)), rng.normal(size=(1, 40))
    half = t.ppf(0.975, 4) * seeds.std(ddof=1) / 5**0.5
    np.testing.assert_allclose(effects.over_seeds_and_images(seeds + np.zeros((5, 40))), half)
    half = t.ppf(0.975, 39) * images.std(ddof=1) / 40**0.5
    np.testing.assert_allclose(effects.over_seeds_and_images(images + np.zeros((5, 40))), half)
    assert effects.over_seeds_and_images(np.ones((5, 40))) == 0


@pytest.mark.parametrize(
    "seed_std, image_std, rest_std", [(0.3, 2, 3), (2, 0.3, 1), (0, 0, 3), (0.5, 5, 0.5)]
)
def test_interval_over_seeds_and_images_covers(seed_std, image_std, rest_std):
    """It covers the true mean 0 in about 95 of 100 draws; in more where a component is 0."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        seeds = seed_std * rng.normal(size=(10, 1))
        images = image_std * rng.normal(size=(1, 60))
        values = seeds + images + rest_std * rng.normal(size=(10, 60))
        covered.append(abs(values.mean()) <= effects.over_seeds_and_images(values))
    assert 0.93 <= np.mean(covered) <= 0.995


# --------------------------------------------------------------------------------- what is kept


@pytest.fixture(scope="module")
def trained(tmp_path_factory, diffusion_dir):
    """Runs of one epoch.

    at/0 was attacked by apgd, AutoAttack and at another radius; at/1 was not attacked; zero/0 is
    DRA of weight 0; zero/1 was killed before its first validation.
    """
    short = ["--epochs", "1", "--epoch-images", "16", "--batch-size", "8", "--n-steps", "1"]
    short += ["--eval-n-steps", "1", "--val-size", "64"]
    cells = tmp_path_factory.mktemp("evidence") / "few"
    for seed in "01":
        argv = [*short, "--seed", seed, "--out-dir", str(cells / "at" / seed)]
        train_at.main(train_at.parse_args(argv))
    zero = [*short, "--aux-weight", "0", "--teacher", diffusion_dir]
    argv = [*zero, "--out-dir", str(cells / "zero" / "0")]
    train_at_aux.main(train_at_aux.parse_args(argv))
    checkpoint = ["--checkpoint", str(cells / "at" / "0" / "best.pt"), "--sanity-images", "0"]
    for attack in (
        ["--attack", "apgd", "--n-images", "30"],
        ["--attack", "autoattack", "--n-images", "6"],
        ["--attack", "apgd", "--n-images", "40", "--eps", "0.01"],
    ):
        evaluate.main(evaluate.parse_args([*checkpoint, *attack]))
    begun = cells / "zero" / "1"
    begun.mkdir()
    (begun / "args.json").write_text((cells / "zero" / "0" / "args.json").read_text())
    (begun / "log.jsonl").touch()
    return cells.parent


@pytest.fixture
def evidence(trained, tmp_path, monkeypatch):
    """A copy of the runs, in a directory with an empty docs/ that is the current one."""
    shutil.copytree(trained, tmp_path / "evidence")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "evidence"


def n_right(run, measure):
    return round(len(run["verdicts"]) * effects.accuracies({"at": {0: run}}, "at", measure).mean())


def test_runs_are_added_when_trained(evidence, capsys):
    cells = evidence / "few"
    store.add_runs(str(evidence))
    assert "3 runs; below" in capsys.readouterr().out
    path = evidence.parent / "docs" / "results.json"
    runs = json.loads(path.read_text())["runs"]
    assert sorted(runs) == ["few/at/0", "few/at/1", "few/zero/0"]
    at, other, zero = runs.values()
    stem = cells / "at" / "0" / "results-best-autoattack-linf-0.15-n6"
    full = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    assert at["n"] == 6
    assert n_right(at, "clean") == 100 * full["clean_correct"]
    assert n_right(at, "autoattack") == 100 * full["robust_correct"]
    assert "n" not in other and "n" not in zero
    assert at["best_sha256"] == zero["best_sha256"]  # weight 0 is train_at.py, to the bit
    (line,) = map(json.loads, (cells / "at" / "0" / "log.jsonl").read_text().splitlines())
    assert at["held_out"] == [[2, line["clean_acc"], line["robust_acc"]]]
    assert line["robust_acc"] < line["clean_acc"]
    for name, run in runs.items():  # every setting, whatever the defaults are
        args = json.loads((evidence / name / "args.json").read_text())
        assert run["settings"] == {k: v for k, v in args.items() if k not in ("script", "seed")}
    assert at["settings"]["lr"] == zero["settings"]["lr"]
    assert zero["settings"]["aux_weight"] == 0

    # Without AutoAttack it is apgd's result that counts.
    stem.with_name(f"{stem.name}.json").unlink()
    apgd_path = cells / "at" / "0" / "results-best-apgd-linf-0.15-n30.json"
    two = json.loads(apgd_path.read_text())
    at = store.add_runs(str(evidence))[0]["few/at/0"]
    assert n_right(at, "clean") == 100 * two["clean_correct"]
    assert n_right(at, "two_attacks") == 100 * two["robust_correct"]
    assert not effects.has(at, "autoattack")

    kept = path.read_bytes()
    again = apgd_path.with_name("results-best-apgd-linf-0.15-n9.json")
    again.write_text(apgd_path.read_text())
    with pytest.raises(UserError, match="which of them counts"):
        store.add_runs(str(evidence))
    again.unlink()
    args_path = cells / "at" / "1" / "args.json"
    settings = json.loads(args_path.read_text())
    args_path.write_text(json.dumps(settings | {"lr": 0.123}))
    with pytest.raises(UserError, match="few/at: its runs differ in lr"):
        store.add_runs(str(evidence))
    (cells / "at" / "0" / "best.pt").write_bytes(b"another")
    with pytest.raises(UserError, match="of another checkpoint"):
        store.add_runs(str(evidence))
    assert path.read_bytes() == kept


def test_an_attacked_row_stays_until_another_attack_takes_its_place(evidence):
    """A run that was trained again and is not attacked yet."""
    kept = store.add_runs(str(evidence))[0]["few/at/0"]
    for path in (evidence / "few" / "at" / "0").glob("results-best-a*"):
        path.unlink()
    assert store.add_runs(str(evidence))[0]["few/at/0"] == kept


def test_a_run_that_is_not_at_its_end_is_no_row(evidence):
    """Two of three validations are done, or two of those after 2, 4 and 5 epochs."""
    folder = evidence / "few" / "at" / "1"
    settings = json.loads((folder / "args.json").read_text())
    line = (folder / "log.jsonl").read_text()
    for epochs, eval_every in ((3, 1), (5, 2)):
        changed = settings | {"epochs": epochs, "eval_every": eval_every}
        (folder / "args.json").write_text(json.dumps(changed))
        (folder / "log.jsonl").write_text(2 * line)
        assert store.read_run(str(folder)) is None
        (folder / "log.jsonl").write_text(3 * line)
        assert store.read_run(str(folder))


def test_every_row_holds_every_setting():
    """Of train_at.py or train_at_aux.py as it was then: but for --align-loss, which came later."""
    for name, run in stored_runs().items():
        settings = run["settings"]
        assert {"lr", "epochs", "model", "loss", "n_steps", "precision"} <= settings.keys(), name
        if run["script"] == "train_at_aux.py":
            assert {"block", "sigma", "aux_weight", "teacher_sha256"} <= settings.keys(), name
        assert len(settings) >= (42 if run["script"] == "train_at_aux.py" else 32), name


# ------------------------------------------------------------------- which runs can be compared

AT = {
    "script": "train_at.py",
    "seed": 0,
    "settings": {"n_train": 100, "lr": 0.1, "n_synthetic": 0},
    "norm": "linf",
    "eps": 0.15,
    "n": 30,
    "precision": "fp32",
}
MIXED = AT["settings"] | {"synthetic": "s", "synthetic_sha256": "a", "n_synthetic": 9}
ALIGNED = AT["settings"] | {"teacher": "t", "teacher_sha256": "b", "block": "up", "sigma": 0.1}


def dra(**settings):
    return AT | {"script": "train_at_aux.py", "settings": ALIGNED | settings}


def mixed(**settings):
    return AT | {"settings": MIXED | settings}


FITTING = {
    "digits-100/at/0": AT,
    "digits-100/at/1": AT | {"seed": 1},
    "digits-100/at_dra/0": dra(),
    "digits-100/dm_at/0": mixed(),
    "digits-100/n_images=3/0": mixed(synthetic_sha256="c"),
    "digits-100/loss=pgd/0": mixed(loss="pgd"),
    "digits-100/at_dra,sigma=2/0": dra(sigma=2.0),
    "digits-100/at_dra,shuffled,teacher_steps=1/0": dra(shuffle_targets=True, teacher_sha256="d"),
}


def test_runs_that_fit_are_sorted_by_cell():
    cells = store.by_cell(FITTING)["digits-100"]
    assert sorted(cells) == sorted({name.split("/")[1] for name in FITTING})
    assert sorted(cells["at"]) == [0, 1]
    old = {key: value for key, value in AT.items() if key != "precision"} | {"seed": 1}
    assert store.by_cell(FITTING | {"digits-100/at/1": old})  # of before it was recorded


@pytest.mark.parametrize(
    "name, run, message",
    [
        ("digits-100/at/1", AT | {"seed": 2}, "digits-100/at/1: a run with --seed 2"),
        ("digits-100/at/zero", AT, "digits-100/at/zero: a run with --seed 0"),
        ("digits-100/other,foo/0", AT, "digits-100/other,foo/0: neither a cell"),
        ("digits-100/sigma=2,shuffled/0", AT, "sigma=2,shuffled/0: neither a cell"),
        ("digits-100/sigma=0.1/0", AT, "sigma=0.1/0: the default; its cell is dm_at_dra"),
        ("digits-200/at/0", AT, "digits-200: a run with --n-train 100"),
        ("digits-100/dm_at/0", AT, "digits-100/dm_at/0: its images, targets or weight are not"),
        ("digits-100/at/0", mixed(), "digits-100/at/0: its images, targets or weight are not"),
        ("digits-100/zero/0", mixed(aux_weight=1.0), "zero/0: its images, targets or weight are"),
        ("digits-100/shuffled/0", mixed(), "shuffled/0: its images, targets or weight are not"),
        ("digits-100/at/1", AT | {"seed": 1, "n": 20}, "digits-100: its runs differ in n;"),
        ("digits-100/loss=pgd/0", mixed(loss="pgd") | {"eps": 0.1}, "its runs differ in eps"),
        ("digits-100/at/1", AT | {"seed": 1, "precision": "bf16"}, "runs differ in precision;"),
        ("digits-100/loss=pgd/0", mixed(loss="pgd", epochs=3), "loss=pgd: its runs differ in epo"),
        ("digits-100/loss=pgd/0", mixed(loss="other"), "loss=pgd/0: a run with loss other"),
        ("digits-100/loss=pgd/0", mixed(loss="pgd", synthetic_sha256="c"), "in synthetic_sha256"),
        ("digits-100/dm_at/0", mixed(n_train=None), "digits-100/dm_at: its runs differ in n_train"),
        ("digits-100/at_dra,sigma=2/0", dra(sigma=2.5), "sigma=2/0: a run with sigma 2.5"),
        ("digits-100/at_dra,sigma=2/0", dra(), "sigma=2/0: a run with sigma 0.1"),
        ("digits-100/sigma=2.0/0", dra(sigma=2.0), "sigma=2.0/0: a run with sigma 2.0"),
        ("digits-100/at_dra,sigma=2/0", dra(sigma=2.0, block="mid"), "its runs differ in block"),
        ("digits-100/at_dra,sigma=2/0", dra(sigma=2.0, teacher_sha256="d"), "in teacher_sha256"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(name, run, message):
    with pytest.raises(UserError, match=message):
        store.by_cell(FITTING | {name: run})


def test_settings_that_older_rows_lack():
    """A missing flag is what ADDED_LATER says, or None; a missing hash is not known; paths lie."""
    old, new = dra(), dra(align_loss="cosine", data_sha256="e", new_flag=None, teacher="elsewhere")
    assert store.differences(old, new) == []
    assert store.differences(old, dra(align_loss="contrastive")) == ["align_loss"]
    assert store.differences(old, dra(new_flag=3)) == ["new_flag"]
    assert store.differences(new, new | {"settings": ALIGNED | {"data_sha256": "f"}}) == [
        "data_sha256"
    ]
    assert store.differences(old, dra(teacher_sha256="f")) == ["teacher_sha256"]
    assert store.differences(AT, new) == []  # in what both scripts have


# -------------------------------------------------------------------------------------- tables


def test_settings_stand_in_their_order_with_the_default_among_them():
    cells = {"aux_weight=10": {}, "aux_weight=0.3": {}, "dm_at_dra": {}, "at": {}}
    assert list(results.settings_of(cells, "aux_weight").items()) == [
        ("0.3", "aux_weight=0.3"),
        ("1", "dm_at_dra"),
        ("10", "aux_weight=10"),
    ]


def test_settings_are_compared_on_the_seeds_that_all_of_them_have():
    """No setting differs from the default on any seed.

    But the default is better on the seeds that one of the settings lacks.
    """
    low, high = made("3331111111"), made("3333333331")
    cells = {
        "at": dict.fromkeys(range(4), made("3111111111")),
        "dm_at": {0: low, 1: low, 2: low, 3: high},
        "n_images=5": {0: low, 1: low, 2: low, 3: high},
        "n_images=7": {0: low, 1: low, 2: low},
        "n_images=9": {0: high, 1: high},  # two seeds are too few
    }
    settings = results.varied(cells)["n_images"]
    assert settings == {
        "without (AT)": "at",
        "5": "n_images=5",
        "7": "n_images=7",
        "10000": "dm_at",
    }
    rows = {}
    for line in results.ablation_table(cells, {"n_images": settings})[2:-1]:
        _, setting, _, *values = line.strip("| ").split(" | ")
        rows[setting] = values
    same = ["3", "+0.0 ± 0.0", "+0.0 ± 0.0 (0.0)", "+0.0 ± 0.0 (0.0)"]
    assert rows["5"] == rows["7"] == same
    assert rows["without (AT)"][:2] == ["3", "-10.0 ± 0.0"]  # 20 of the first checkpoint


def test_seeds_that_chose_a_form_do_not_count_for_it():
    poor, good = made("3311111111"), made("3333333311")
    form = "at_dra,align_loss=contrastive"
    cells = {
        "at": dict.fromkeys(range(5), poor),
        form: {0: good, 1: good, 2: good, 3: poor, 4: poor},
        f"{form},shuffled": {3: good, 4: good},
        "at_dra,variant=rise": {0: good, 1: good},
    }
    rows = [line.strip("| ").split(" | ")[:4] for line in results.forms_table(cells)[2:-1]]
    title = "AT+DRA, `align_loss=contrastive`"
    assert rows == [
        [title, "AT", "2", "+0.0 ± 0.0"],
        [f"{title}, `shuffled`", "AT", "2", "+60.0 ± 0.0"],
        [f"{title}, `shuffled`", "the same without `shuffled`", "2", "+60.0 ± 0.0"],
        ["AT+DRA, `variant=rise`", "AT", "2", "+60.0 ± 0.0"],
    ]


def test_head_and_tail_are_halves_of_the_classes():
    """Of the first test images, whose labels stand beside their verdicts; by a loop."""
    _, labels = data.load_test(DATASETS["digits"], None)
    rng = np.random.default_rng(0)
    cells = {}
    for cell in ("at", "at_dra", "dm_at", "dm_at_dra"):
        cells[cell] = {}
        for seed in (0, 1):
            cells[cell][seed] = made("".join(map(str, rng.integers(0, 4, 60))))

    def expected(cell, least, classes):
        right = []
        for seed in (0, 1):
            for verdict, label in zip(cells[cell][seed]["verdicts"], labels):
                if label in classes:
                    right.append(int(verdict) >= least)
        return 100 * np.mean(right)

    lines = results.long_tail_tables(cells)
    columns = [(least, half) for half in (range(5), range(5, 10)) for least in (1, 3)]
    titles = "accuracy, % | seeds | head, clean | head, APGD-CE+T | tail, clean | tail, APGD-CE+T"
    assert lines[0] == f"| {titles} |"
    for line, cell in zip(lines[2:], cells):
        title, n, *points = line.strip("| ").split(" | ")
        assert (title, n) == (store.TITLES[cell], "2")
        for text, (least, half) in zip(points, columns, strict=True):
            assert text.startswith(f"{expected(cell, least, half):.1f} ± ")
    gain = [expected("dm_at", *column) - expected("at", *column) for column in columns]
    row = lines[9].strip("| ").split(" | ")
    assert row[0] == "synthetic images, without DRA"
    assert [text.split(" ± ")[0] for text in row[2:]] == [f"{points:+.1f}" for points in gain]


def test_the_tables_of_cifar10():
    """By hand: 0 is wrong without an attack; 3 withstands two attacks, 5 all four."""
    cells = {
        "at": {0: made("0012233345", "autoattack"), 1: made("0012333333")},
        "dm_at": {0: made("0000333333"), 1: made("0000033333")},
    }
    lines = results.cifar_tables({"cifar-5000": cells})
    assert lines[0].startswith("**CIFAR-10 as JPEG**, 5,000 labels.")
    _, _, _, _, at, dm_at, *_ = [line.strip("| ").split(" | ") for line in lines]
    assert (at[0], at[4].split(" ± ")[0], at[5].split(" ± ")[0]) == ("AT", "80.0", "55.0")
    assert (dm_at[0], dm_at[4].split(" ± ")[0], dm_at[5].split(" ± ")[0]) == (
        "DM-AT",
        "55.0",
        "55.0",
    )
    assert "AutoAttack, %: AT 10.00 (APGD-CE+T 50.00; seed 0)." in lines
    two_by_two = results.two_by_two({"cifar-1000": cells, "digits-100": cells})
    row = next(line for line in two_by_two if line.startswith("| AT |")).strip("| ").split(" | ")
    assert [text.split(" ± ")[0] for text in row[1:]] == ["80.0", "55.0", "80.0", "10.0"]


def markers(name):
    return f"<!-- {name} writes from here -->\n", f"<!-- {name} ends here -->\n"


def between(path):
    begin, end = markers(results.NAME)
    return path.read_text().partition(begin)[2].partition(end)[0]


def test_the_documents_say_what_the_results_hold(tmp_path, monkeypatch):
    """What stands between the markers is made of docs/results.json, byte for byte.

    And every figure that docs/results.md shows is drawn from it.
    """
    page, readme = ROOT / results.PAGE, ROOT / results.README
    (tmp_path / "docs").mkdir()
    (tmp_path / store.STORE).write_text((ROOT / store.STORE).read_text())
    begin, end = markers(results.NAME)
    (tmp_path / results.PAGE).write_text(f"head\n{begin}old\n{end}tail\n")
    (tmp_path / results.README).write_text(f"head\n{begin}{end}tail\n")
    monkeypatch.chdir(tmp_path)
    results.main(results.parse_args([]))
    text = between(page)
    assert text == results.section(*stored())
    assert text == between(tmp_path / results.PAGE)
    table = between(readme)
    assert table == between(tmp_path / results.README)
    assert table.count("\n") == 6
    for cell, row in zip(results.ROWS, table.splitlines()[2:]):
        attacked = results.accuracies(
            store.by_cell(stored_runs())[results.MAIN], cell, "autoattack"
        )
        assert row.endswith(f"| {effects.show(attacked)} |")
    for path in (results.PAGE, results.README):
        written = (tmp_path / path).read_text()
        assert written.startswith(f"head\n{begin}") and written.endswith(f"{end}tail\n")
    drawn = {path.name for path in (tmp_path / "docs").glob("*.png")}
    assert drawn == set(re.findall(r"\]\(([^)]*\.png)\)", text))
    assert all((ROOT / "docs" / name).exists() for name in drawn)


def test_a_store_that_is_half_full_gives_a_section():
    """Cells without a partner, without an attack, of one seed: no table of theirs, no nonsense."""
    runs = stored_runs()
    first = {name: runs[name] for name in ("digits-100/at/0", "digits-100/zero/0")}
    first["fashion-6400/at/0"] = {  # not attacked
        key: value for key, value in runs["digits-100/at/0"].items() if key not in ("n", "verdicts")
    }
    text = results.section(first, {})
    assert "| AT | 1 |" in text
    for word in ("nan", "weight 0", "0 seeds", "Fashion"):
        assert word not in text
    for run in first.values():
        run.pop("verdicts", None)
        run.pop("n", None)
    text = results.section(first, {})
    assert "AutoAttack" in text and "test images" not in text


# ----------------------------------------------------------------------- the teacher's lead


def verdict_of(lead):
    """A verdict whose teacher has 50 %, with shuffled weights 20 %."""
    return {
        "answer": "may help",
        "probe": [0.5, 0.4, 0.6],
        "control": [0.2, 0.1, 0.3],
        "attacked": [0.1, 0.0, 0.2],
        "above_control": [0.3, 0.2, 0.4],
        "pupil": [0.5 - lead, 0, 1],
        "lead": [lead, lead - 0.1, lead + 0.1],
        "right_where_pupil_errs": [lead, 0, 1],
        "cka": [-lead, -1, 1],
        "network_sha256": "a",
        "dataset": "cifar10",
        "val_size": 4,
        "n_train": 10,
        "imbalance": None,
    }


def test_verdicts_stand_beside_what_dra_gave(tmp_path):
    at = {seed: made("0012233333") for seed in (0, 1)}
    at_dra = {0: made("0112233333"), 1: made("0012333333")}
    better = {0: made("1113333333"), 1: made("1113333333")}
    experiments = {
        "cifar-1000": {"at": at, "at_dra": at_dra, "dm_at": at, "at_dra,untrained": better},
        "digits-100": {"dm_at": at, "dm_at_dra": better},
        "digits-200": {"at": at, "at_dra": at_dra},
    }
    labels = {"dataset": "cifar10", "val_size": 4, "n_train": 10}
    for run in [*at.values(), *at_dra.values(), *better.values()]:
        run["settings"] = run["settings"] | labels
    verdicts = {"cifar-1000": verdict_of(0.05), "digits-100": verdict_of(0.15)}
    predictions = pupils.predictions_of(experiments, verdicts)
    first, second = predictions
    assert (first.data, first.kind, second.data, second.kind) == (
        "CIFAR-10",
        "AT",
        "digits",
        "DM-AT",
    )
    assert first.effects["clean"].mean(1).tolist() == [10, 0]
    assert first.effects["two_attacks"].mean(1).tolist() == [0, 10]

    _, _, top, bottom, _ = pupils.table(predictions)
    assert top.startswith(
        "| digits | 100 | 20.0 | 50.0 | 10.0 | 35.0 | +15.0 (+5.0 to +25.0) | may help |"
    )
    assert "| +5.0 (-5.0 to +15.0) | may help | AT | 2 | +5.0 ± 63.5" in bottom
    *_, lead, control, _, cka, _, _ = pupils.correlations(predictions)
    assert lead.count("| +1.00") == cka.count("| -1.00") == 2
    assert control.endswith("| - | - |")  # all are equal
    verdicts["digits-100"]["answer"] = "no gain expected"
    assert pupils.gains_table(predictions)[2:-1] == [
        "| may help | 1 | 0 gained, 0 lost | 0 gained, 0 lost |",
        "| no gain expected | 1 | 1 gained, 0 lost | 1 gained, 0 lost |",
    ]

    pupils.figure(predictions, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
    clean, robust = Figure().subplots(1, 2)
    for axis, measure in ((clean, "clean"), (robust, "two_attacks")):
        pupils.draw(axis, predictions, measure)
        assert axis.get_title() == f"effect of DRA on {pupils.MEASURES[measure]}"
        points = [bar.lines[0].get_xydata()[0] for bar in axis.containers]
        expected = [(5, first.effects[measure].mean()), (15, second.effects[measure].mean())]
        np.testing.assert_allclose(points, expected)
    assert pupils.predictions_of(experiments, {}) == []
    (untrained,) = pupils.predictions_of(experiments, {"cifar-1000,untrained": verdict_of(-0.1)})
    assert (untrained.kind, untrained.labels) == ("AT", "1,000, untrained teacher")
    assert untrained.effects["clean"].mean(1).tolist() == [20, 20]
    for run in at_dra.values():
        run["settings"] = run["settings"] | {"teacher_sha256": "a"}
    assert pupils.predictions_of(experiments, verdicts)
    run["settings"]["teacher_sha256"] = "b"
    with pytest.raises(UserError, match="cifar-1000: the verdict is on another teacher"):
        pupils.predictions_of(experiments, verdicts)
    run["settings"]["teacher_sha256"] = "a"
    for name, value in (("n_train", 11), ("imbalance", 10), ("dataset", "svhn"), ("val_size", 5)):
        other = verdicts | {"cifar-1000": verdict_of(0.05) | {name: value}}
        with pytest.raises(UserError, match="cifar-1000: the verdict is on other labels"):
            pupils.predictions_of(experiments, other)


def test_effects_at_equal_steps_are_paired_by_seed(tmp_path):
    """Only the seeds that both cells have; the interval is Student's of two differences."""

    def cell(*clean):
        rows = {seed: [[5, acc, 0.2], [10, acc + 0.1, 0.3]] for seed, acc in enumerate(clean)}
        return {seed: {"held_out": held_out} for seed, held_out in rows.items()}

    cells = {"at": cell(0.5, 0.6, 0.1), "at_dra": cell(0.52, 0.64), "dm_at": cell(0.5)}
    half = t.ppf(0.975, 1) * np.std([2, 4], ddof=1) / 2**0.5
    *_, first, second, _ = results.course_table(cells)
    assert first == f"| AT | 5 | 2 | +3.0 ± {half:.1f} | +0.0 ± 0.0 |"
    assert second == f"| AT | 10 | 2 | +3.0 ± {half:.1f} | +0.0 ± 0.0 |"
    results.course_figure(cells, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_verdicts_are_kept_beside_the_runs(evidence, diffusion_dir):
    """Only those on a pupil and attacked; they stay when other runs are added."""
    folder = evidence / "verdict-few"
    argv = ["--diffusion", diffusion_dir, "--verdict", "--sigmas", "0.1", "--blocks", "mid_block"]
    argv += ["--val-size", "64"]
    argv += ["--out-dir", str(folder)]
    pupil = ["--pupil", str(evidence / "few" / "at" / "0" / "best.pt")]
    for flags, missing in (([], "--pupil"), (pupil, "--eps")):
        extract_features.main(extract_features.parse_args([*argv, *flags]))
        with pytest.raises(UserError, match=missing):
            store.add_runs(str(evidence))
    attack = ["--eps", "0.15", "--n-attacked", "8"]
    extract_features.main(extract_features.parse_args([*argv, *pupil, *attack]))
    runs, verdicts = store.add_runs(str(evidence))
    kept = json.loads((folder / "verdict.json").read_text())
    assert verdicts["few"]["lead"] == kept["lead"] and verdicts["few"]["block"] == "mid_block"
    assert verdicts["few"]["network_sha256"] == runs["few/zero/0"]["settings"]["teacher_sha256"]
    assert verdicts["few"]["pupil_sha256"] == runs["few/at/0"]["best_sha256"]
    shutil.rmtree(folder)
    assert store.add_runs(str(evidence)) == (runs, verdicts) == store.read_store()
