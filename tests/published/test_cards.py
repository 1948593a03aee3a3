"""Cards: what becomes of paths, commands, tables and of a folder that is there already.

Alone: python -m pytest tests/published/test_cards.py
"""

import shlex

import pytest

from common import UserError
from published import cards


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/home/me/set", "set"),
        ("/home/me/set/", "set"),
        ("out/set=0.7", "set=0.7"),
        ("--out-dir=/home/me/run", "--out-dir=run"),
        ("at=../runs/at/best.pt", "at=best.pt"),
        ("hub:them/name", "hub:them/name"),
        ("hub:them/name/../../x", "x"),
        ("8/255", "8/255"),
        ("--eps=8/255", "--eps=8/255"),
        ("torchvision", "torchvision"),
        ("state_dict:teacher.", "state_dict:teacher."),
        ("~/me", "me"),
    ],
)
def test_paths_are_cut_down(text, expected):
    assert cards.shortened(text) == expected
    assert cards.without_paths({"a": [text, 3, None]}) == {"a": [expected, 3, None]}


def test_commands():
    environment = {
        "command": ["train_at.py", "--synthetic", "/a/my set=1", "out/b"],
        "world_size": 1,
    }
    command = cards.command_of(environment, "train_at.py")
    assert command == "python train_at.py --synthetic 'my set=1' b"
    several = cards.command_of(environment | {"world_size": 8}, "train_at.py")
    assert shlex.split(several)[:4] == ["torchrun", "--nproc_per_node", "8", "train_at.py"]
    unknown = "# the command is not recorded"
    assert cards.command_of(environment, "evaluate.py") == unknown
    for words in (None, [], "train_at.py", ["train_at.py", 3]):
        assert cards.command_of({"command": words}, "train_at.py") == unknown
    odd = cards.command_of({"command": ["train_at.py", "a\n```\nb"]}, "train_at.py")
    assert "\n" not in odd


def test_names_of_devices_are_kept():
    environment = {"device": "AMD Radeon RX 6800/6800 XT", "command": ["/x/train_at.py"]}
    expected = {"device": "AMD Radeon RX 6800/6800 XT", "command": ["train_at.py"]}
    assert cards.public(environment) == expected


def test_cells_keep_their_columns():
    text = cards.table(["a", "b"], [["x|y\n", 3]])
    assert text == "| a | b |\n| --- | --- |\n| x\\|y\\n | 3 |"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    cards.write_folder(tmp_path / "new", {"a": b"1", "b": b"2"})
    cards.write_folder(tmp_path / "new", {"a": b"1", "c": b"3"})
    with pytest.raises(UserError, match="new/b: is there already, with other content"):
        cards.write_folder(tmp_path / "new", {"d": b"4", "b": b"5"})
    found = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert found == {"a": b"1", "b": b"2", "c": b"3"}
    with pytest.raises(UserError, match="^/proc/none/new: No such file or directory$"):
        cards.write_folder("/proc/none/new", {"a": b"1"})
