"""Commands and flags: what the documentation and runs/*.sh say is what the scripts take.

Alone: python -m pytest tests/test_commands.py
"""

import ast
import importlib
import os
import re
import shlex
import shutil
import stat
import subprocess

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

from common import cli

SCRIPTS = [
    "train_diffusion",
    "generate_synthetic",
    "train_at",
    "train_at_aux",
    "extract_features",
    "evaluate",
    "analyze",
]
ROOMS = ["teachers", "published", "evaluation", "analysis"]
SHELL_FILES = sorted(path.name for path in ROOT.glob("runs/*.sh"))
DOCUMENTS = ["README.md", "Makefile", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


def python_files(*folders):
    """Paths of the Python files in these folders of the project; "." for the scripts."""
    return sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))


def check_parses(words):
    """Parse a command line of python or torchrun, a list of words, as its script would.

    Returns the script's name. An error of the parser is SystemExit, with its message on stderr.
    """
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        words = ["python", launched.training_script, *launched.training_script_args]
    if words[1] == "-m":
        script, argv = words[2], words[3:]
    else:
        script, argv = words[1].removesuffix(".py").replace("/", "."), words[2:]
    if (ROOT / script / "__main__.py").exists():
        script = f"{script}.__main__"
    module = importlib.import_module(script)
    if hasattr(module, "parse_args"):
        module.parse_args(argv)
    else:
        assert not argv, f"{script} takes no flags"
    return script


# -------------------------------------------------------------------------------- shell files

RECORD = """#!/bin/sh
number=$(printf %05d "$(ls "$RECORDS" | wc -l)")
printf '%s\\n' "${0##*/}" "$@" > "$(mktemp "$RECORDS/$number-XXXXXXXX")"
"""


def run_recorded(shell_file, tmp_path):
    """Run a shell file where python and torchrun only write down their arguments.

    Returns the command lines, lists of words, in their order. It runs in a copy of runs/, so that
    it can neither find nor leave anything in the project.
    """
    shutil.copytree(ROOT / "runs", tmp_path / "runs", dirs_exist_ok=True)
    (tmp_path / "records").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        program = tmp_path / "bin" / name
        program.write_text(RECORD)
        program.chmod(stat.S_IRWXU)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.defpath}",
        "RECORDS": str(tmp_path / "records"),
    }
    command = ["bash", str(tmp_path / "runs" / shell_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = sorted((tmp_path / "records").iterdir())
    return [path.read_text().splitlines() for path in records]


@pytest.mark.parametrize("shell_file", SHELL_FILES)
def test_every_command_of_a_shell_file_parses(shell_file, tmp_path):
    commands = run_recorded(shell_file, tmp_path)
    assert commands
    directories = []
    for words in commands:
        script = check_parses(words)
        if script.startswith("train_"):
            directories += [b for a, b in zip(words, words[1:]) if a == "--out-dir"]
    assert len(directories) == len(set(directories))  # no row trains where another one does


def test_a_wrong_command_of_a_shell_file_is_found(tmp_path, capsys):
    line = "for n in 1 2; do torchrun --nproc_per_node $n train_at.py --beta $n --betta 3; done"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "wrong.sh").write_text(line)
    commands = run_recorded("wrong.sh", tmp_path)
    assert sorted(words[2] for words in commands) == ["1", "2"]
    with pytest.raises(SystemExit):
        check_parses(commands[0])
    assert "--betta" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- documents


def commands_in(text):
    """The command lines of python and torchrun in a text, lists of words.

    A command ends with its line (a backslash continues it), a backtick, a comment or a semicolon.
    Marker lines, <!-- ... -->, are no commands.
    """
    text = re.sub("<!--.*-->", "", text)
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.findall(r"\b((?:python|torchrun) [^`#;&|]*)", line):
            if re.search(r"\.py\b|-m [a-z]+", command):
                commands.append(shlex.split(command))
    return commands


def test_commands_are_found_in_a_text():
    text = "`python train_at.py --beta 3` and\n    torchrun --nproc_per_node 8 evaluate.py \\\n"
    text += "  --n-images 5  # a check\nPython is not a command; A=1 python -m runs.report"
    assert commands_in(text) == [
        ["python", "train_at.py", "--beta", "3"],
        ["torchrun", "--nproc_per_node", "8", "evaluate.py", "--n-images", "5"],
        ["python", "-m", "runs.report"],
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_documented_command_parses(document):
    text = (ROOT / document).read_text()
    for words in commands_in(text):
        if words[1:2] != ["-m"] or words[2] not in ("pytest", "pip", "venv"):
            check_parses(words)
    for path in re.findall(r"\bruns/\w+\.(?:sh|py)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", python_files(".", *ROOMS, "runs", "benchmarks"), ids=str)
def test_every_command_of_a_docstring_parses(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    commands = commands_in(docstring)
    assert commands or path.stem not in SCRIPTS
    for words in commands:
        check_parses(words)


# -------------------------------------------------------------------------------------- flags


def flags_of(script, monkeypatch):
    """The argparse actions of a script's flags."""
    parsers = []
    monkeypatch.setattr(cli.Parser, "print_help", lambda parser: parsers.append(parser))
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    return [action for action in parsers[0]._actions if action.dest != "help"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained(script, monkeypatch):
    flags = flags_of(script, monkeypatch)
    assert len(flags) > 5
    for flag in flags:
        assert flag.help, flag.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_do_not_clash_with_torchruns(script, monkeypatch):
    """torchrun takes abbreviations, also behind the script's name: --n would be --nnodes to it."""
    launcher = [option for action in get_args_parser()._actions for option in action.option_strings]
    for flag in flags_of(script, monkeypatch):
        for option in flag.option_strings:
            assert not [other for other in launcher if other.startswith(option)], option


# ------------------------------------------------------------------------------------ imports


def imports_of(path):
    """Names of the modules that a file imports, "common.data" for `from common import data`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_down_only():
    """Scripts import rooms and common, rooms import common, and common none of them."""
    everything = {*SCRIPTS, *ROOMS, "common", "runs", "benchmarks"}
    allowed = {"common": {"common"}, ".": {"common", *ROOMS}}
    allowed |= {room: {"common", room} for room in ROOMS}
    allowed["runs"] = everything - {"benchmarks"}
    allowed["benchmarks"] = everything - {"runs"}
    for folder, expected in allowed.items():
        for path in python_files(folder):
            imported = {name.split(".")[0] for name in imports_of(path)} & everything
            assert imported <= expected, f"{path} imports {imported - expected}"


# ------------------------------------------------------------------------------------ documents


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2000


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith(".md")])
def test_links_resolve(document):
    """Files that a page links are there, and so are the headings that a link names."""
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            anchors = [
                re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings
            ]
            assert anchor in anchors, link
