"""Commands, flags and budgets: what the documentation says is what the scripts take. Alone: python -m pytest tests/test_commands.py"""

import ast
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

SCRIPTS = ["train_diffusion", "generate_synthetic", "train_at", "train_at_aux", "extract_features", "evaluate", "analyze"]
DOCUMENTS = [
    "README.md",
    "Makefile",
    *[f"{s}.py" for s in SCRIPTS],
    *[str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("runs/*")) if p.is_file()],
]


# Of runs/digits_ablations.sh.
FUNCTIONS = {"alone": "train_at_aux", "aligned": "train_at_aux", "mixed": "train_at", "generated": "generate_synthetic"}


def expand(text):
    """A shell script with its arrays and variables replaced: those of loops by their first value, arguments of functions by numbers."""
    for name, words in re.findall(r"^ *(\w+)=\((-.*)\)", text, re.M):
        text = text.replace(f'"${{{name}[@]}}"', words)
    text = text.replace("${models[@]}", "--model=a=b").replace('"${@:2}"', "").replace("$1", "1").replace("$2", "2")
    variables = re.findall(r"^ *(\w+)=([\w/.-]+)", text, re.M) + re.findall(r"^ *for (\w+) in ([\w.-]+)", text, re.M)
    for name, value in variables:
        text = re.sub(rf"\${name}\b", value, text)
    return text


def commands(text):
    """(script, argv) of every `python SCRIPT ...` and `torchrun ... SCRIPT ...` in a text, and of runs/digits_ablations.sh's functions."""
    found = []
    for line in expand(text).replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\||&(?= |$)", line.split("  #")[0]):
            match = re.search(r"(?:python3?|torchrun)\s+(?:\S+\s+)*?(-m (?:runs|common)\.\w+|(?:benchmarks/)?\w+\.py)(?=\s|$|`)(.*)", part)
            if match:
                script = match[1].removeprefix("-m ").removesuffix(".py").replace("/", ".")
                found.append((script, shlex.split(match[2].split("`")[0])))
            elif match := re.match(r" *(?:do )?(alone|aligned|mixed|generated) [a-z_]\S+ (--.*)", part):
                found.append((FUNCTIONS[match[1]], shlex.split(match[2])))
    return found


def test_the_search_finds_commands():
    text = "`python train_at.py --beta 3` and\ntorchrun --nproc_per_node 8 evaluate.py \\\n  --n-images 5 & x=$!\n"
    text += "A=1 python -m runs.report\nmake test"
    assert commands(text) == [("train_at", ["--beta", "3"]), ("evaluate", ["--n-images", "5"]), ("runs.report", [])]
    text = 'few=(--val-size 5)\nout=out/a\nfor seed in 3 4; do\n  python train_at.py "${few[@]}" --seed $seed --out-dir $out/b; done'
    assert commands(text) == [("train_at", ["--val-size", "5", "--seed", "3", "--out-dir", "out/a/b"])]
    assert commands("  alone at_dra,sigma=1 --sigma 1\nfor a in 3 4; do mixed b=$a --beta $a; done") == [
        ("train_at_aux", ["--sigma", "1"]),
        ("train_at", ["--beta", "3"]),
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_documented_command_parses(document, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])  # whose scripts share modules
    found = commands((ROOT / document).read_text())
    if document == "README.md" or document.endswith(".sh") or document.removesuffix(".py") in SCRIPTS:
        assert found
    for script, argv in found:
        if "--synthetic-fraction" in argv and "--synthetic" not in argv:  # the function adds the set
            argv += ["--synthetic", "set"]
        importlib.import_module(script).parse_args(argv)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_and_every_flag_is_read(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as exit_info:
        module.parse_args(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    source = (ROOT / f"{script}.py").read_text()
    flags = re.findall(r'add_argument\(\s*"--([\w-]+)"(.*)', source)
    assert len(flags) > 5
    for flag, rest in flags:
        name = flag.replace("-", "_")
        assert f"--{flag}" in printed and "help=" in rest, flag
        read = re.findall(rf"args\.{name}\b", source)
        by_name = f'"{name}"' in source.replace(f'"--{flag}"', "")  # settings gathered by getattr
        assert len(read) > (1 if f"args.{name} = " in source else 0) or by_name, f"--{flag} is never read"


def test_flags_do_not_clash_with_torchruns():
    """torchrun accepts abbreviations, also behind the script's name: `--n 5` would be read as an ambiguous --nnodes."""
    launcher = [option for action in get_args_parser()._actions for option in action.option_strings]
    for script in SCRIPTS:
        flags = re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / f"{script}.py").read_text())
        assert not [f for f in flags if any(option.startswith(f) for option in launcher)], script


def test_quickstart_commands_are_those_of_the_readme():
    """README shows the very lines of runs/quickstart.sh."""
    readme = (ROOT / "README.md").read_text()
    for line in (ROOT / "runs" / "quickstart.sh").read_text().splitlines():
        match = re.match(r"(?:\w+=\S+ )*((?:python|torchrun) .*?)(?: & \w+=\$!)?$", line)
        if match:
            assert match[1].replace("$out", "out/quickstart") in readme, match[1]


def test_line_budgets():
    for script in SCRIPTS:
        assert len((ROOT / f"{script}.py").read_text().splitlines()) <= (505 if script == "train_at_aux" else 400), script
    assert sum(len(p.read_text().splitlines()) for p in ROOT.glob("common/*.py")) <= 4250


def test_imports_go_one_way():
    """Scripts import common; common imports no script; dist, ema, checkpoint, runlog and attacks import nothing of ours but cli."""
    allowed = {"dist": {"cli"}, "cli": set(), "ema": set(), "attacks": set(), "checkpoint": {"cli"}, "runlog": {"cli", "checkpoint"}}
    for path in ROOT.glob("common/*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module} if node.module != "common" else {f"common.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                imported |= {a.name for a in node.names}
        assert not imported & set(SCRIPTS), path
        ours = {name.removeprefix("common.").split(".")[0] for name in imported if name.startswith("common")}
        assert ours <= allowed.get(path.stem, ours), path
