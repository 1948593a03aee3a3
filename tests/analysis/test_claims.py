"""The verdicts on the paper's claims, from made numbers.

Alone: python -m pytest tests/analysis/test_claims.py
"""

import json

import numpy as np
import pytest

from analysis import claims
from common import UserError

N_SEEDS = 3


def settings_of(kind, seed):
    """The args.json of a run, as far as it matters here."""
    return {
        "seed": seed,
        "loss": "standard" if kind == "standard" else "trades",
        "synthetic": ["x"] if "dm" in kind else None,
        "script": "train_at_aux.py" if "dra" in kind else "train_at.py",
    }


def model(path, dim=64, **values):
    """A row of analysis.json whose metrics are 1, but for the values; intervals have no width."""
    names = ("rank_me", "robust", "robust_third", "high_frequencies", "sae", "dimension")
    row = {"dim": dim, "n": 100, "path": str(path / "best.pt")}
    for name in names:
        value = values.get(name, 1.0)
        row[name] = [value, value, value]
    return row


@pytest.fixture
def result(tmp_path):
    """An analysis.json in tmp_path, with the runs that it is of; returns its content."""
    models = {}
    for kind in claims.TRAINED:
        models[kind] = []
        for seed in range(N_SEEDS):
            path = tmp_path / f"{kind}-{seed}"
            path.mkdir()
            (path / "args.json").write_text(json.dumps(settings_of(kind, seed)))
            values = {"rank_me": 30 + seed, "robust": 0.0, "sae": 0.5 + seed}
            if kind == "dm_at":
                values = {"rank_me": 29 + seed + 0.1 * (seed == 1), "sae": 0.5 + seed}
            if kind == "at_dra":
                values = {"sae": 0.9 + 1.01 * seed}
            models[kind].append(model(path, **values))
    teacher = model(tmp_path, dim=32, rank_me=20.0, robust=0.4)
    teacher["robust_third"] = [1.5, 0.9, 2.1]
    models["teacher"] = [teacher]
    names = [name for name, rows in models.items() for _ in rows]
    cka = {"names": names, "matrix": np.eye(len(names)).tolist()}
    content = {"models": models, "cka": cka}
    (tmp_path / "analysis.json").write_text(json.dumps(content))
    return content


def judge(tmp_path):
    claims.main(claims.parse_args(["--analysis", str(tmp_path)]))


def test_claims_are_judged_by_paired_differences(result, tmp_path, capsys):
    judge(tmp_path)
    assert "3 seeds, 100 test images" in capsys.readouterr().out
    differences, verdicts = {}, {}
    for line in (tmp_path / "claims.md").read_text().splitlines():
        if line.count("|") == 7:
            _, _, measured, _, _, difference, verdict, _ = (
                cell.strip() for cell in line.split("|")
            )
            differences[measured] = difference
            verdicts[measured] = verdict
    assert len(verdicts) == len(claims.CLAIMS) + 2  # and two lines of header
    assert verdicts["rank_me: dm_at - at"] == "yes"  # lower in every seed
    assert differences["rank_me: dm_at - at"] == "-0.967 (-1.11 to -0.823)"
    assert verdicts["sae: at_dra - at"] == "no"  # higher in every seed
    assert verdicts["dimension: at_dra - at"] == "not resolved"
    assert verdicts["rank_me: dm_at - at_dra"] == "yes"  # claimed is only a difference
    assert verdicts["dimension: dm_at - at_dra"] == "not resolved"


def test_the_teacher_is_judged_by_the_spread_of_seeds_and_images(result, tmp_path):
    judge(tmp_path)
    table = (tmp_path / "claims.md").read_text()
    verdicts = {}
    for line in table.splitlines():
        if ": teacher - standard" in line:
            cells = line.split("|")
            verdicts[cells[2].split(":")[0].strip()] = cells[6].strip()
    assert verdicts["rank_share"] == "yes"
    assert "| rank_share: teacher - standard | 0.625 |" in table
    assert verdicts["rank_me"] == "no"
    assert verdicts["robust"] == "yes"  # the intervals over images have no width
    assert verdicts["robust_third"] == "not resolved"  # 0.5 +- 0.6


@pytest.mark.parametrize(
    "kind, seed, match",
    [
        ("at", 5, r"seeds of standard are \[0, 1, 2\], those of at \[0, 5, 2\]"),
        ("dm_at", 1, "at-1/args.json: is of a run of the kind dm_at, given as at"),
    ],
)
def test_runs_that_are_not_what_they_are_called(kind, seed, match, result, tmp_path):
    (tmp_path / "at-1" / "args.json").write_text(json.dumps(settings_of(kind, seed)))
    with pytest.raises(UserError, match=match):
        judge(tmp_path)


def test_kinds_of_unlike_numbers_of_models(result, tmp_path):
    result["models"]["at"].pop()
    (tmp_path / "analysis.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="as many models each"):
        judge(tmp_path)
