"""Files survive crashes, and files of others run no code. Alone: python -m pytest
tests/common/test_files.py
"""

import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from common import UserError, files


def test_round_trip(tmp_path):
    state = {"step": 3, "nested": {"weight": torch.randn(2, 2)}, "best": [0.5, 0.25], "name": "x"}
    files.save(state, tmp_path / "a.pt")
    loaded = files.load(tmp_path / "a.pt", {"step": int, "nested": dict})
    assert loaded["step"] == 3 and torch.equal(
        loaded["nested"]["weight"], state["nested"]["weight"]
    )
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_write_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: is a directory"):
        files.write_json({}, tmp_path / "folder")
    with pytest.raises(UserError, match="there is no directory"):
        files.write_json({}, tmp_path / "gone" / "a.json")
    assert os.listdir(tmp_path) == ["folder"]


def test_failed_write_leaves_the_old_file(tmp_path):
    files.save({"step": 1}, tmp_path / "a.pt")
    with pytest.raises(AttributeError):
        files.save({"step": 2, "bad": lambda: 0}, tmp_path / "a.pt")
    assert files.load(tmp_path / "a.pt", {})["step"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_kill_during_writes_leaves_a_whole_file(tmp_path):
    """A process that does nothing but write checkpoints is killed with SIGKILL five times; the file
    is always a whole one.
    """
    program = f"""
import sys, torch; sys.path.insert(0, {str(ROOT)!r})
from common import files
step = 0
while True:
    step += 1
    weight = torch.full((500_000,), float(step))
    files.save({{"step": step, "weight": weight}}, {str(tmp_path / "a.pt")!r})
"""
    path, cut = tmp_path / "a.pt", []
    for i in range(5):
        process = subprocess.Popen([sys.executable, "-c", program])
        before = path.stat().st_mtime_ns if path.exists() else None
        while not path.exists() or path.stat().st_mtime_ns == before:
            time.sleep(0.001)
        while not os.path.exists(f"{path}.writing"):
            pass
        time.sleep(0.001 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        cut.append(os.path.exists(f"{path}.writing"))
        state = files.load(path, {})
        assert torch.equal(state["weight"], torch.full((500_000,), float(state["step"])))
    assert any(cut)  # at least one kill did fall into a write


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Hostile()}, "a.pt")
    with open("b.pt", "wb") as file:
        pickle.dump({"step": Hostile()}, file, protocol=2)
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="refused.*system"):
            files.load(name, {})
    np.save("c.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="c.npy"):
        files.open_npy("c.npy", np.uint8)
    assert not os.path.exists("hostile-code-ran")


@pytest.mark.parametrize("keep", [0, 1, 10, 200, 0.5, 0.99])
def test_truncated_checkpoints_are_named(tmp_path, keep):
    files.save({"step": 1, "weight": torch.randn(100)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(
        whole[: keep if isinstance(keep, int) else int(keep * len(whole))]
    )
    with pytest.raises(UserError, match=r"a\.pt"):
        files.load(tmp_path / "a.pt", {})


def test_missing_wrong_and_foreign_files_are_named(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "b.json").write_text("{")
    np.save(tmp_path / "c.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(UserError, match="no such file, expected a checkpoint"):
        files.load(tmp_path / "none.pt", {})
    with pytest.raises(UserError, match="is a directory"):
        files.load(tmp_path, {})
    with pytest.raises(UserError, match="entry 'step' is missing"):
        files.load(tmp_path / "tensor.pt", {"step": int})
    with pytest.raises(UserError, match="broken, or not a JSON object"):
        files.read_json(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"found float32 \(3, 2\), expected uint8 \(any, 2\)"):
        files.open_npy(tmp_path / "c.npy", np.uint8, (None, 2))
    np.savez(tmp_path / "z.npz", a=np.zeros(3))
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(UserError, match="z.npy: is an .npz archive"):
        files.open_npy(tmp_path / "z.npy", np.float32)
    (tmp_path / "b.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="broken, or not a JSON object"):
        files.read_json(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("\n<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(UserError, match="b.json: a web page, so the download failed"):
        files.read_json(tmp_path / "b.json")
    (tmp_path / "c.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(UserError, match="c.safetensors: a pointer of git-lfs"):
        files.read_safetensors(tmp_path / "c.safetensors")
    whole = (tmp_path / "c.npy").read_bytes()
    for size in (0, 5, 50, 100, len(whole) - 1):
        (tmp_path / "d.npy").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"d\.npy"):
            files.open_npy(tmp_path / "d.npy", np.float32)


def test_misfitting_weights_are_named():
    with pytest.raises(UserError, match=r"x\.pt: state does not fit"):
        files.load_state(
            torch.nn.Linear(2, 2), {"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, "x.pt"
        )


def test_flipped_bytes_of_a_header_are_one_line_or_nothing(tmp_path):
    """NumPy's header is Python text: broken, it raises TokenError, OverflowError, RecursionError
    and more.
    """
    files.write_npy(np.arange(24, dtype=np.int64), tmp_path / "a.npy")
    whole, rng, refused = (tmp_path / "a.npy").read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        content = bytearray(whole)
        for place in rng.integers(0, 128, rng.integers(1, 4)):
            content[place] = rng.integers(0, 256)
        (tmp_path / "b.npy").write_bytes(content)
        try:
            array = files.open_npy(tmp_path / "b.npy", np.int64, (24,))
            assert array.shape == (24,)
        except UserError as error:
            assert "b.npy" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("its header is another one"), True),
        (zipfile.BadZipFile("File is not a zip file"), True),
        (ValueError("cannot reshape array of size 3 into shape (2,2)"), False),
        (ValueError("not enough values to unpack (expected 2, got 1)"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (6)"), False),
        (TypeError("zeros(): argument 'size' failed to unpack the object"), False),
        (IndexError("list index out of range"), False),
        (AttributeError("'int' object has no attribute 'keys'"), False),
    ],
)
def test_a_message_speaks_of_the_file_and_not_of_a_reader_s_insides(error, told):
    with pytest.raises(UserError) as info, files.reading("x.bin", "a network"):
        raise error
    expected = "x.bin: truncated, broken, or not a network"
    assert str(info.value) == (f"{expected} ({error})" if told else expected)
    assert info.value.__cause__ is error
