"""What is said of a path that holds no diffusion model: what it is, and what is expected."""

import os
import re

from common import files
from teachers import parts

REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # OWNER/NAME
EXPECTED = (
    "expected a directory with model_index.json or config.json, an NVlabs .pkl file or "
    "hub:OWNER/NAME"
)
ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json")
SETTINGS = ("model_index.json", "config.json")


def message(path):
    """The whole message about a path, where neither SETTINGS nor an NVlabs .pkl is found."""
    if not os.path.exists(path):
        return f"{path}: {_missing(path)}"
    if os.path.isdir(path):
        return f"{path}: {_directory(path)}{whole(path)}"
    return f"{path}: {_file(path)}"


def whole(folder):
    """The end of a message about a folder: where it is a part, which directory it is a part of."""
    parent = os.path.dirname(os.path.abspath(folder))
    if not os.path.exists(os.path.join(parent, SETTINGS[0])):
        return ""
    return f"; it is a part of {os.path.dirname(folder) or '..'}, give that directory"


def _missing(path):
    if os.path.islink(path):
        return f"a link to nothing, {EXPECTED}"
    made = re.search(r"(?:^|/)out/diffusion-([\w-]+)$", path)
    if made:
        return f"no such directory; run train_diffusion.py --dataset {made[1]} first"
    if re.search(r"(?:^|/)out/jit-b-16$", path):
        how = f"python -m teachers.jit convert checkpoint-last.pth {path}"
        return f"no such directory; {how} makes it of JiT-B/16 of github.com/LTH14/JiT"
    if "://" in path:
        return f"an address, {EXPECTED}"
    owner = path.split("/")[0]
    ending = os.path.splitext(path)[1]
    is_repository = re.fullmatch(REPOSITORY, path) and owner not in ("out", "data", "docs")
    if is_repository and not os.path.exists(owner) and ending not in ENDINGS:
        return f"no such file or directory; a model of the hub is written hub:{path}"
    return f"no such file or directory, {EXPECTED}"


def _file(path):
    name = os.path.basename(path)
    folder = os.path.dirname(path) or "."
    parent = os.path.dirname(folder) or "."
    for place, settings in ((parent, SETTINGS[0]), (folder, SETTINGS[0]), (folder, SETTINGS[1])):
        if os.path.exists(os.path.join(place, settings)) and name.endswith(ENDINGS):
            return f"a file of a model, expected its directory: {place}"
    if name == "checkpoint-last.pth":
        return f"a checkpoint; python -m teachers.jit convert makes a directory of JiT's {name}"
    if re.match(r"training-state.*\.pt$", name):
        return "a training state of NVlabs' EDM, expected a network-snapshot .pkl beside it"
    if "lora" in name.lower():
        return f"a LoRA, which changes another network, {EXPECTED}"
    if name.endswith(ENDINGS[:-1]):
        what = "a file of weights alone, which does not say of which network"
        for family in ("sit", "jit"):
            if family in name.lower():
                return f"{what}; python -m teachers.{family} convert makes a directory of {name}"
        if "dit" in name.lower():
            return f"{what}; DiT-XL/2 is read as hub:facebook/DiT-XL-2-256"
        return f"{what}, {EXPECTED}"
    return f"a file that is no diffusion model, {EXPECTED}"


def _directory(path):
    with files.reading(path, "a directory that can be read"):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if not names:
        return f"an empty directory, {EXPECTED}"
    folders = [n for n in names if any(os.path.exists(os.path.join(path, n, s)) for s in SETTINGS)]
    if folders:
        return f"holds no model itself, {', '.join(folders[:3])} in it may be one: give that"
    pickled = [name for name in names if name.lower().endswith(".pkl") and "random" not in name]
    if pickled:
        return f"a directory with {pickled[-1][:80]}: give that file"
    if "adapter_config.json" in names or any("lora" in name.lower() for name in names):
        return f"a LoRA, which changes another network, {EXPECTED}"
    if "last.pt" in names and "args.json" in names:
        return f"a run that is not finished, or not of train_diffusion.py, {EXPECTED}"
    if any(parts.variant(name) is not None for name in names):
        return "weights without their config.json, which says of which network"
    listed = ", ".join(name[:30] for name in names[:3]) + (", ..." if names[3:] else "")
    return f"a directory of {listed}, {EXPECTED}"
