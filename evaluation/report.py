"""One page on the robustness of one model, with one picture: `evaluate.py --report`.

The results that it shows are made in evaluate.py. Their files are those of evaluation/verdicts.py,
and the other backward passes stand in evaluation/adaptive.py.
"""

import os
import shlex

import numpy as np

from common import cli, files
from common.stats import wilson
from evaluation import compare, verdicts

NORM_COLOURS = {"linf": "#0072B2", "l2": "#E69F00", "l1": "#009E73"}  # Okabe and Ito's


def write_report(model_name, labels, spec, results, paths, trained, stem):
    """Write <stem>.md, <stem>.png and the table's numbers as <stem>.json. Prints their names.

    results: for each threat the result of the plain attack, and behind it the one that goes on with
    other backward passes. The first threat is the one that the report is about. paths: their files.
    trained: the (norm, eps) of the model's training, or None.
    """
    plain = results[::2]
    checked = results[1::2]
    arrays = [compare.read_verdicts(verdicts.per_image_path(path)) for path in paths[1::2]]
    rows = table(checked, arrays, labels, spec.classes)
    files.write_json({"rows": rows}, f"{stem}.json")

    draw(rows, trained, f"{stem}.png")
    name = f"`{os.path.basename(checked[0]['checkpoint'].rstrip('/'))}`: {spec.name}, {model_name}"
    lines = page(name, rows, plain, checked, trained, paths, os.path.basename(f"{stem}.png"))
    files.write_text("\n".join(lines) + "\n", f"{stem}.md")
    print(f"{stem}.md, {stem}.png, {stem}.json")


# --------------------------------------------------------------------------------------- table


def table(checked, arrays, labels, classes):
    """A list of dicts: the accuracy without an attack, at each threat, and in the worst norm.

    arrays: the verdicts of each result, as compare.read_verdicts has them.
    """
    clean = arrays[0]["clean_correct"]
    rows = [row("no attack", None, clean, clean, labels, classes)]
    in_all_norms = clean
    plain_in_all_norms = clean
    norms = []
    for result, array in zip(checked, arrays):
        name = cli.threat(result["norm"], result["eps"])
        robust = array["robust"]
        plain_robust = array["fooled_by"] >= len(result["earlier_attacks"])
        rows.append(row(name, result["norm"], robust, plain_robust, labels, classes))
        if result["norm"] not in norms:  # the first radius of a norm is the usual one
            norms.append(result["norm"])
            in_all_norms = in_all_norms & robust
            plain_in_all_norms = plain_in_all_norms & plain_robust
    name = f"worst of {len(norms)} norms"
    rows.append(row(name, "all", in_all_norms, plain_in_all_norms, labels, classes))
    return rows


def row(name, norm, correct, plain_correct, labels, classes):
    """One line of the table as a dict; accuracies are in [0, 1].

    correct, plain_correct: (n,) bool, with the adaptive check and without it.
    """
    accuracy_of = {}
    for label in np.unique(labels).tolist():
        accuracy_of[label] = correct[labels == label].mean()
    worst = min(accuracy_of, key=accuracy_of.get)
    n = len(labels)
    values = {
        "name": name,
        "norm": norm,
        "n": n,
        "accuracy": float(correct.mean()),
        "interval": wilson(int(correct.sum()), n),
        "plain": float(plain_correct.mean()),
        "newly_fooled": int((plain_correct & ~correct).sum()),
        "worst_class": cli.printable(classes[worst] if classes else str(worst)),
        "worst_class_accuracy": float(accuracy_of[worst]),
        "worst_class_n": int((labels == worst).sum()),
    }
    return values


# ------------------------------------------------------------------------------------- picture


def draw(rows, trained, path):
    """Write a PNG: a bar for each row of the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    draw_bars(axis, rows, trained)
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


def draw_bars(axis, rows, trained):
    """Accuracies with Wilson's intervals; hatched, what the plain attacks alone had left."""
    colours = NORM_COLOURS | {None: "#999999", "all": "black"}
    for place, values in enumerate(rows):
        height = 100 * values["accuracy"]
        low, high = (100 * limit for limit in values["interval"])
        axis.bar(place, height, color=colours[values["norm"]], width=0.7)
        if values["newly_fooled"]:
            rest = 100 * values["plain"] - height
            axis.bar(place, rest, 0.7, height, fill=False, hatch="///", edgecolor="#D55E00")
        lengths = [[height - low], [high - height]]
        axis.errorbar(place, height, lengths, color="#666666", capsize=4)
        top = max(high, 100 * values["plain"])
        axis.text(place, top + 1, f"{height:.1f}", ha="center", va="bottom")
    names = [values["name"].replace(" ", "\n", 1) for values in rows]
    if trained is not None:
        training = cli.threat(*trained).replace(" ", "\n", 1)
        names = [f"{name}\n(training)" if name == training else name for name in names]
    axis.set_xticks(range(len(rows)), names)
    axis.set_ylim(0, 110)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("accuracy, %")
    title = f"{rows[0]['n']:,} test images, 95 % intervals"
    if any(values["newly_fooled"] for values in rows):
        title += "\nhatched: fooled by the adaptive check alone"
    axis.set_title(title, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


# ---------------------------------------------------------------------------------------- page


def page(name, rows, plain, checked, trained, paths, picture):
    """The lines of the page, in Markdown. picture: name of its file; the rest: see write_report."""
    first = rows[1]
    worst = rows[-1]
    threats = [values["name"] for values in rows[1:-1]]
    main = checked[0]
    lines = [
        f"# {name}",
        "",
        f"**{_interval(first)}** of {first['n']:,} test images withstand {main['attack_name']} at "
        f"{first['name']}. **{_interval(worst)}** do in every norm.",
        "",
    ]
    warnings = collect_warnings(threats, plain, checked)
    if trained is not None and trained != (main["norm"], main["eps"]):
        training = f"trained against {cli.threat(*trained)}"
        warnings.insert(0, f"{training}, and this page is about {first['name']}")
    if not main["sanity_images"]:
        warnings.append("the sanity checks were left out (--sanity-images 0)")
    lines += [f"- **WARNING** {cli.printable(text)}" for text in warnings] or ["No check failed."]
    lines += ["", f"![Accuracies in each norm](<{picture}>)", ""]
    lines += table_lines(rows)
    lines += ["", *caption(main, trained), ""]
    lines += ["## The adaptive check", "", *adaptive_lines(first, main), ""]
    lines += [f"## Sanity checks at {first['name']}", "", *sanity_lines(plain[0], main), ""]
    lines += ["## What these numbers do not say", "", *limits(main), ""]
    lines += ["## Files", "", *[f"- `{os.path.basename(path)}`" for path in paths], ""]
    command = shlex.join(main["environment"]["command"])
    lines += [f"Each has one verdict per image in the `.npz` beside it. Last made by `{command}`."]
    return lines


def collect_warnings(threats, plain, checked):
    """Lines, each naming its threat, of what the results warn of."""
    lines = []
    for name, *pair in zip(threats, plain, checked):
        texts = [text for result in pair for text in result["warnings"]]
        lines += [f"{name}: {text}" for text in dict.fromkeys(texts)]
    return lines


def table_lines(rows):
    """The table in Markdown; n stands in every row."""
    titles = ["", "n", "accuracy, %", "95 % interval", "plain attack alone, %", "worst class, %"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for values in rows:
        low, high = values["interval"]
        accuracy = 100 * values["worst_class_accuracy"]
        worst_class = f"{accuracy:.1f} ({values['worst_class']}, n = {values['worst_class_n']})"
        cells = [
            values["name"],
            f"{values['n']:,}",
            f"**{100 * values['accuracy']:.1f}**",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * values['plain']:.1f}",
            worst_class.replace("|", "\\|"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def caption(result, trained):
    """What was attacked, and how."""
    attack = result["attack_name"]
    training = "not known" if trained is None else cli.threat(*trained)
    environment = result["environment"]
    versions = f"{result['version']}, torch {environment['torch']}"
    commit = environment.get("commit") or "not recorded"
    if environment.get("dirty"):  # results of before this was recorded lack it
        commit += ", files differed from it"
    return [
        f"Attacks: {attack}. Training: {training}. Precision {result['precision']}, seed "
        f"{result['seed']}, {versions}, {environment['device']}, commit {commit}. "
        "The last row counts an image where no attack of any norm, at the norm's first radius, "
        "fools the model (Tramer & Boneh, arXiv 1904.13000). Intervals are Wilson's.",
        "",
        f"SHA-256 of the checkpoint: `{result['checkpoint_sha256']}`. Of the test images: "
        f"`{result['data_sha256']}`.",
    ]


def adaptive_lines(first, result):
    """Whether other backward passes change the number of the first threat, and what they change."""
    plain = f"plain {100 * first['plain']:.1f} %"
    checked = f"with the adaptive check **{100 * first['accuracy']:.1f} %**"
    lines = [
        f"{first['name']}: {plain}, {checked}; it fools {first['newly_fooled']} more of "
        f"{first['n']:,} images.",
        "",
        "APGD was tried again on what withstood. The forward pass, and so every verdict, is the "
        "model's own; the backward pass differs:",
        "",
        "- unit: logits divided by their mean margin.",
    ]
    changes = {
        "straight": "the identity as the derivative of",
        "leaky": "besides, a slope in the flat parts of",
    }
    for kind, change in changes.items():
        layers = [f"`{cli.printable(name)}`" for name in result["layers"][kind]]
        done = f"{change} {', '.join(layers)}." if layers else "no such layers were found."
        lines.append(f"- {kind}: {done}")
    return lines


def sanity_lines(plain, checked):
    """The sanity checks of the first threat, as a table in Markdown."""
    n = plain["sanity_images"]
    images = f"On the first {n} images." if n else "Most were left out, by `--sanity-images 0`."
    lines = [images, "", "| | check | found |", "|---|---|---|"]
    for outcome in plain["sanity"] + checked["sanity"]:
        state = "ok" if outcome["ok"] else "**FAILED**"
        lines.append(f"| {state} | {outcome['check']} | {outcome['found']} |")
    return lines


def limits(result):
    """What a reader might take the numbers for, and should not."""
    lines = ["- They are upper bounds. A stronger attack may fool more images."]
    if "square" not in result["attacks"]:
        lines.append(
            "- `--attack autoattack` also runs FAB, and Square on all images. Here a short Square "
            "ran in a sanity check alone."
        )
    return lines + [
        "- The adaptive check knows rounding, casts, replaced and detached values, modules of "
        "unknown code and clipped activations. A mask, values assigned to a part of a tensor, "
        "code without gradients, or a function with a gradient of its own, inside a block, are not "
        "found. They need an attack of their own, and so does a purification step.",
        "- Radii of different norms are not equally hard, and the last row depends on all of them.",
        "- Intervals are over test images. Another training seed is another model.",
        "- Changes outside the three norms (rotations, patches, corruptions) are not tried.",
    ]


def _interval(values):
    low, high = values["interval"]
    return f"{100 * values['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
