"""The run scripts for GPUs: what a command reads from out/, another one of the file has made."""

import importlib
import os

import pytest
from test_commands import run_recorded

# Arguments that name a file or a directory that is read, whole or with =SHARE behind it.
READ = ("checkpoint", "classifier", "teacher", "diffusion", "synthetic")


def parsed(words):
    """The arguments of a recorded command line of python or torchrun, as its script has them."""
    if words[1] == "-m":
        return importlib.import_module(words[2]).parse_args(words[3:])
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[script].removesuffix(".py"))
    return module.parse_args(words[script + 1 :])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenet"])
def test_what_is_read_has_been_made(name, tmp_path):
    made = set()
    read = set()
    for words in run_recorded(f"{name}.sh", tmp_path):
        args = parsed(words)
        made.add(getattr(args, "out_dir", None))
        for argument in READ:
            values = getattr(args, argument, None) or []
            for value in [values] if isinstance(values, str) else values:
                path = value.split("=")[0]
                read.add(os.path.dirname(path) if path.endswith(".pt") else path)
    missing = {path for path in read if path.startswith("out/")} - made
    assert read and not missing
