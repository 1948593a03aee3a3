"""Processes, directory, state and log of a run. Alone: python -m pytest tests/common/test_run.py

Whole runs, their resume and their kills are tested in tests/test_train.py and tests/torture.
"""

import itertools
import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import python

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


def checked_run(monkeypatch, clock, checking=True):
    """A Run of --check whose time is the number in the list `clock`, and nothing else of a Run."""
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: clock[0]))
    training = object.__new__(run.Run)
    training.device = torch.device("cpu")
    training.checking = checking
    training.marks = []
    training.teaching = []
    training.step = 3
    return training


def test_the_share_of_the_teacher(monkeypatch, capsys):
    """Of the step that is told, the fastest, with two passes of the teacher in it."""
    clock = [100.0]
    training = checked_run(monkeypatch, clock)

    def passes(seconds, result):
        clock[0] += seconds
        return result

    training._mark()
    for rest, of_a_pass in ((9.0, 1.0), (3.0, 0.5), (2.0, 3.0)):
        for part in range(2):
            assert training.timed(passes, of_a_pass, part) == part
        clock[0] += rest
        training._mark()
    training.saved_at = clock[0]
    spec = SimpleNamespace(classes=(), num_classes=10)
    training.print_check(spec, (1, 2, 3, 4), 100, 0)
    assert "steps     100, 4 s each, of which the teacher takes 25%\n" in capsys.readouterr().out


def test_only_a_check_waits_for_the_teacher(monkeypatch):
    training = checked_run(monkeypatch, [], checking=False)  # without a clock
    training._mark()
    assert training.timed(max, 3, 4) == 4
    assert training.marks == training.teaching == []


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


def test_state_is_what_is_tracked(tmp_path, monkeypatch):
    args = SimpleNamespace(out_dir=str(tmp_path / "run"), lr=0.1, check=False)
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
    with monkeypatch.context() as patch, pytest.raises(UserError, match="it at steps 1, 0; start"):
        patch.setattr(run, "gather_objects", lambda step: [step, 0])
        second.load(5)
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


LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def set_environment(monkeypatch, values):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("n", range(6))
def test_the_launcher_sets_all_variables_or_none(n, monkeypatch):
    """Every combination of them: alone it is one process, whole it is torchrun's, else one line."""
    for names in itertools.combinations(LAUNCHED, n):
        set_environment(monkeypatch, {name: LAUNCHED[name] for name in names})
        if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(names):
            assert run._launched() == (0, 1, 0)
        elif n == 5:
            assert run._launched() == (1, 2, 1)
        else:
            missing = ", ".join(name for name in LAUNCHED if name not in names)
            with pytest.raises(UserError, match=f"^environment: .* without {missing}; start with"):
                run._launched()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "x"}, "RANK=x, WORLD_SIZE=2, LOCAL_RANK=1, expected whole numbers"),
        ({"WORLD_SIZE": "-2"}, "expected whole numbers"),
        ({"LOCAL_RANK": "0.5"}, "expected whole numbers"),
        ({"RANK": "2"}, "expected LOCAL_RANK <= RANK < WORLD_SIZE"),
        ({"RANK": "0"}, "expected LOCAL_RANK <= RANK < WORLD_SIZE"),
        ({"RANK": ""}, "without RANK"),
        ({"MASTER_PORT": ""}, "without MASTER_PORT"),
    ],
)
def test_launcher_s_variables_that_make_no_sense(changes, words, monkeypatch):
    set_environment(monkeypatch, LAUNCHED | changes)
    with pytest.raises(UserError, match=words):
        run._launched()


def test_one_process_needs_no_address(monkeypatch):
    set_environment(monkeypatch, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert run._launched() == (0, 1, 0)


@pytest.mark.parametrize("place", [("no-such-host.invalid", "1"), ("localhost", "0x")])
def test_a_place_where_processes_cannot_meet_is_one_line(place, monkeypatch):
    values = LAUNCHED | dict(zip(("MASTER_ADDR", "MASTER_PORT"), place))
    set_environment(monkeypatch, values)
    monkeypatch.setenv("RANK_TIMEOUT_MINUTES", "0.02")
    with pytest.raises(UserError, match="MASTER_ADDR=.*: the processes could not meet") as info:
        run.start_processes("fp32")
    assert "\n" not in str(info.value)


def test_a_stray_rank_does_not_silence_an_error():
    done = python("train_at.py", "--epochs", "0", expect=2, env={"RANK": "3"})
    assert "--epochs: expected a whole number of at least 1" in done.stderr
    done = python("train_at.py", expect=2, env={"RANK": "3"})
    assert done.stderr.startswith("train_at.py: error: environment: RANK=3 without WORLD_SIZE")


def test_new_scripts_and_copies_differ_from_the_commit(tmp_path, monkeypatch):
    """Of a repository of its own: what git has not tracked is another code than the commit's."""
    monkeypatch.setattr(run, "ROOT", str(tmp_path))
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "run.py").write_text("")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert run.environment()["dirty"] is True  # a copy in a repository of something else
    (tmp_path / ".gitignore").write_text("common/\n")
    assert run.environment()["dirty"] is True  # that ignores it
    subprocess.run(["git", "add", "-f", "common/run.py", ".gitignore"], cwd=tmp_path, check=True)
    subprocess.run(["git", *who, "commit", "-q", "-m", "all"], cwd=tmp_path, check=True)
    assert run.environment()["dirty"] is False
    (tmp_path / "my_loss.py").write_text("")
    assert run.environment()["dirty"] is True


def test_a_difference_in_another_encoding_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", str(tmp_path))
    (tmp_path / "old.csv").write_bytes(b"a\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "old.csv"], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "old.csv").write_bytes("caf\u00e9\n".encode("latin-1"))
    assert "+caf\ufffd" in run._git("diff", "HEAD")


@pytest.mark.parametrize("minutes", ["1e20", "-1", "soon"])
def test_a_time_out_that_is_none_is_refused(minutes, monkeypatch):
    monkeypatch.setenv("RANK_TIMEOUT_MINUTES", minutes)
    with pytest.raises(UserError, match=f"RANK_TIMEOUT_MINUTES: .*{minutes}"):
        run._timeout()
