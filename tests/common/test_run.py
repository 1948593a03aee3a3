"""Processes, directory, state and log of a run. Alone: python -m pytest tests/common/test_run.py

Whole runs, their resume and their kills are tested in tests/test_train.py and tests/torture.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from common import UserError, run


def test_meters_average_over_updates_and_start_afresh():
    meters = run.Meters()
    for value in (1.0, 2.0, 6.0):
        meters.update(loss=torch.tensor(value, requires_grad=True))
    meters.update(grad_norm=torch.tensor(4))
    assert meters.means() == {"loss": 3.0, "grad_norm": 4.0}
    assert meters.means() == {}


def test_log_is_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step":')
    with run.open_log(str(path), 2) as log:
        log.write('{"step": 9}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 9}\n'


@pytest.mark.parametrize("line", ["[1]", "1", "{}", '{"step": null}', "{", "\x00"])
def test_a_log_that_is_none_is_one_line(line, tmp_path):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match="log.jsonl"):
        run.open_log(str(tmp_path / "log.jsonl"), 2)


def test_a_directory_belongs_to_one_identity(tmp_path):
    path = str(tmp_path / "run")
    run.claim_directory(path, {"lr": 0.1, "betas": (0.9, 0.95), "data_dir": "here"})
    moved = {"lr": 0.1, "betas": [0.9, 0.95], "data_dir": "there"}
    run.claim_directory(path, moved, not_compared=["data_dir"])
    with pytest.raises(UserError, match="--out-dir .*data_dir is here there, there here"):
        run.claim_directory(path, moved)
    with pytest.raises(UserError, match="--out .*lr is 0.1 there, 0.2 here"):
        run.claim_directory(path, moved | {"lr": 0.2}, not_compared=["data_dir"], flag="--out")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["data_dir"] == "here"


def test_the_command_does_not_say_where_the_project_lies(monkeypatch):
    for script, kept in (
        (f"{run.ROOT}/benchmarks/__main__.py", "benchmarks/__main__.py"),
        ("/home/somebody/copy.py", "copy.py"),
    ):
        monkeypatch.setattr(run.sys, "argv", [script, "--only", "x"])
        assert run.environment()["command"] == [kept, "--only", "x"]


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and without args.json"):
        run.claim_directory(str(tmp_path), {})
    (tmp_path / "notes.txt").rename(tmp_path / "args.json.writing")  # what a kill leaves
    run.claim_directory(str(tmp_path), {})


def test_an_edited_script_leaves_a_trace(tmp_path, capsys):
    """The copy is that of the first start; a later change is noted, and the copy stays."""
    script = tmp_path / "my_script.py"
    script.write_text("first\n")
    out = tmp_path / "out"
    out.mkdir()
    run.keep_code(str(script), str(out))
    run.keep_code(str(script), str(out))
    assert capsys.readouterr().out == ""
    script.write_text("second\n")
    run.keep_code(str(script), str(out))
    assert "is not the code this run began with" in capsys.readouterr().out
    assert (out / "my_script.py").read_text() == "first\n"
    assert (out / "git.diff").exists()


def test_state_is_what_is_tracked(tmp_path):
    args = SimpleNamespace(out_dir=str(tmp_path / "run"), lr=0.1)
    model = torch.nn.Linear(2, 2)
    first = run.Run(__file__, args, {}, 0, torch.device("cpu"))
    first.track(model=model)
    first.load(5)
    first.start(5)
    first.advance()
    first.best = [0.5]
    first.save(note="x")
    first.close()
    run.end_processes()
    other = torch.nn.Linear(2, 2)
    second = run.Run(__file__, args, {}, 0, torch.device("cpu"))
    second.track(model=other)
    second.load(5)
    assert (second.step, second.best) == (1, [0.5]) and second.seconds >= 0
    assert torch.equal(other.weight, model.weight)
    second.step = 4
    with pytest.raises(
        UserError, match="steps 2 to 4: loss, gradient or weights not finite.*last.pt"
    ):
        second.check_finite(loss=1.0, grad_norm=math.nan)
    second.check_finite(loss=1.0, grad_norm=2.0)
    second.step = 6
    with torch.no_grad():
        other.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="steps 2 to 6: .*not finite"):
        second.check_finite(loss=1.0)
