"""What the cards of models and of synthetic sets share: commands without paths, origins, writing.

A card is the README.md of a folder on the Hugging Face hub: YAML for the hub, then Markdown. What a
classifier's card says is in published/model_card.py, what a set's says in published/set_card.py.
"""

import os
import re
import shlex

from common import UserError, files
from common.cli import printable

VERSIONS = {  # entries of run.environment on which the last bits of a number depend
    "device": "device",
    "torch": "torch",
    "diffusers": "diffusers",
    "numpy": "numpy",
    "python": "Python",
    "threads": "threads",
    "world_size": "processes",
}

# --------------------------------------------------------------------------------------- paths


def shortened(text):
    """A text with each path in it cut down to its last part: no folder of a machine is told.

    What stands beside a path, as in PATH=0.5 or --flag=PATH, is kept. hub:OWNER/NAME and ratios
    such as 8/255 are no paths.
    """
    parts = []
    for part in text.split("="):
        is_path = "/" in part and not re.fullmatch(r"hub:[^/]+/[^/]+|[\d.e+-]+/[\d.e+-]+", part)
        parts.append(os.path.basename(os.path.normpath(part)) if is_path else part)
    return "=".join(parts)


def without_paths(value):
    """A value of JSON, its dicts and lists gone through, in which every text is shortened."""
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    return value


# ------------------------------------------------------------------------------------- origins


def read_environment(folder):
    """The env.json of a folder, without paths; {} where it is missing."""
    path = os.path.join(folder, "env.json")
    return public(files.read_json(path)) if os.path.exists(path) else {}


def public(environment):
    """What run.environment gave, without paths: its command has some, names of devices have not."""
    return environment | {"command": without_paths(environment.get("command"))}


def command_of(environment, script):
    """The command line that run.environment wrote down, as one line for a shell, without paths.

    A remark takes its place where it was not written down, or is that of another program.
    """
    words = environment.get("command")
    is_list = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not is_list or not words or os.path.basename(words[0]) != script:
        return "# the command is not recorded"
    launcher = ["python"]
    n_processes = environment.get("world_size")
    if isinstance(n_processes, int) and n_processes > 1:
        launcher = ["torchrun", "--nproc_per_node", str(n_processes)]
    return printable(shlex.join([*launcher, script, *map(shortened, words[1:])]))


def origin_of(environment):
    """A list in Markdown: the commit and whether files differed from it, device and versions."""
    commit = environment.get("commit")
    dirty = environment.get("dirty")
    state = "whether files differed from it is not recorded"
    if isinstance(dirty, bool):
        state = "files differed from it" if dirty else "no file differed from it"
    code_of = f"commit `{commit}`, {state}" if commit else "commit not recorded"
    known = [f"{title} {environment[key]}" for key, title in VERSIONS.items() if key in environment]
    machine = printable(", ".join(known)) or "not recorded"
    return f"- code: {code_of}\n- machine: {machine}"


# ---------------------------------------------------------------------------------------- text


def table(titles, rows):
    """A table in Markdown. titles: of the columns. rows: lists of texts, or None if not known."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(content):
    if content is None:
        return "not recorded"
    return printable(str(content)).replace("|", "\\|")


def code(text):
    """A block of code in Markdown."""
    return f"```\n{text}\n```"


def digest(sha256):
    """A hash in Markdown, or what stands in its place where it is not known."""
    return f"`{sha256}`" if sha256 else "not recorded"


def card(data, parts):
    """The bytes of a README.md. data: the hub's ModelCardData or DatasetCardData. parts: texts."""
    text = "\n\n".join(parts)
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n".encode()


# ------------------------------------------------------------------------------------- writing


def write_folder(folder, contents):
    """Write files into a folder, which is made. contents: {name: bytes}.

    What is there already is left, and must be the same: where it is not, UserError is raised before
    anything is written.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder}: is a file, expected a directory")
    missing = []
    for name, content in contents.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            missing.append(name)
            continue
        with files.reading(path, "a file"), open(path, "rb") as file:
            found = file.read()
        if found != content:
            remedy = "move it away, or write into another folder"
            raise UserError(f"{path}: is there already, with other content; {remedy}")
    files.make_directory(folder)
    for name in missing:
        with files.atomic(os.path.join(folder, name)) as file:
            file.write(contents[name])
