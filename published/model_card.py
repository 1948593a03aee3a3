"""The folder in which a classifier is published: weights, config.json, card, results with verdicts.

`hf upload` puts it on the Hugging Face hub. published/weights.py reads it back, by way of
common.files.local_weights, which checks the hashes of config.json. What the card says is taken from
the files of the training and of its evaluations; what they do not hold is called not recorded.
"""

import hashlib
import json
import os

import safetensors.torch

from common import UserError, files
from common.cli import printable, threat
from published import cards
from published.weights import description_of, load_classifier

HUB_DATASETS = {  # the names of our data sets on the hub
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "imagenet": "ILSVRC/imagenet-1k",
}
# --attack of the results that may stand for a model's robust accuracy. Others are checks of it.
REPORTED = ("apgd", "autoattack", "rand")


def weights_of(checkpoint, spec):
    """(bytes of model.safetensors, what they say of the network, number of its parameters).

    checkpoint: of this project, on the data set `spec`. The header says which network it is, as in
    a run's best.safetensors.
    """
    model, about = load_classifier(checkpoint, spec, "cpu")
    about = description_of(about, spec)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights = safetensors.torch.save(tensors, {"classifier": json.dumps(about)})
    return weights, about, sum(parameter.numel() for parameter in model.parameters())


def export(out_dir, checkpoint, weights, about, n_parameters, results, others):
    """Write the folder of a classifier.

    checkpoint: path of its file in a run directory. weights, about, n_parameters: of weights_of.
    results: {name: result} of evaluation.verdicts.results_of, whose files lie beside
    the checkpoint. others: names of results that are left out.
    Raises UserError, before anything is written, where the folder holds something else, or the
    arguments beside the checkpoint are of another one.
    """
    run_dir = os.path.dirname(checkpoint)
    args_path = os.path.join(run_dir, "args.json")
    settings = cards.without_paths(files.read_json(args_path))
    trained = about | {"model": about["model_name"]}
    for key in ("model", "dataset", "norm", "eps"):
        if settings.get(key, trained[key]) != trained[key]:
            difference = f"{key} {settings[key]} there, {trained[key]} in the checkpoint"
            raise UserError(f"{args_path}: of another checkpoint ({difference})")
    environment = cards.read_environment(run_dir)
    diff = os.path.join(run_dir, "git.diff")
    if environment and "dirty" not in environment and os.path.exists(diff):
        environment["dirty"] = os.path.getsize(diff) > 0

    contents = {"model.safetensors": weights}
    for name, result in results.items():
        published = result | {
            "checkpoint": cards.shortened(result["checkpoint"]),
            "environment": cards.public(result["environment"]),
        }
        contents[name] = _json(published)
        with open(os.path.join(run_dir, _verdicts_name(name)), "rb") as file:
            contents[_verdicts_name(name)] = file.read()
    config = {
        **about,
        "checkpoint": os.path.basename(checkpoint),
        "checkpoint_sha256": files.sha256(checkpoint),
        "sha256": {name: hashlib.sha256(value).hexdigest() for name, value in contents.items()},
        "training": settings,
        "environment": environment,
    }
    contents["config.json"] = _json(config)
    title = os.path.basename(os.path.abspath(run_dir))
    with files.reading(args_path, "the arguments of a training"):
        facts = _facts(config, n_parameters)
    contents["README.md"] = model_card(title, config, facts, results)
    cards.write_folder(out_dir, contents)

    for name, result in results.items():
        for warning in result["warnings"]:
            print(f"WARNING: {name}: {warning}")
    if others:
        print(f"left out, of another checkpoint file: {', '.join(others)}")
    if not environment:
        print("note: env.json is missing: the card has no command, commit or versions of training")
    size = sum(map(len, contents.values()))
    print(f"{out_dir}: {len(contents)} files, {size / 1e6:.1f} MB")
    print("fill in README.md: the licence of the weights, and where the code is")
    print(f"hf upload OWNER/NAME {out_dir}")


def _json(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def _verdicts_name(result_name):
    return os.path.splitext(result_name)[0] + ".npz"


# ---------------------------------------------------------------------------------------- card


def model_card(title, config, facts, results):
    """The bytes of README.md.

    config: what config.json holds. facts: rows of _facts. results: {name: result}.
    """
    parts = [
        f"# {title}: {config['model_name']} for {config['dataset']}",
        cards.table(["", ""], facts),
        "## Results",
        _results_table(results),
        _about_results(results),
        *_warnings(results),
        "## Use",
        *_use(config, results),
        "## How it was made",
        *_training(config),
    ]
    for name, result in results.items():
        parts += _evaluation(name, result)
    return cards.card(_hub_data(title, config, results), parts)


def _hub_data(title, config, results):
    """The card's data for the hub, without a licence: that is for the authors to choose."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = config["dataset"]
    tags = ["adversarial-robustness"]
    if config["training"].get("loss") != "standard":
        tags.append("adversarial-training")
    hub_results = []
    for name, accuracy in _hub_metrics(results):
        hub_result = EvalResult(
            task_type="image-classification",
            dataset_type=HUB_DATASETS.get(dataset, dataset),
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(accuracy, 6),
        )
        hub_results.append(hub_result)
    return ModelCardData(
        pipeline_tag="image-classification",
        tags=tags,
        datasets=[HUB_DATASETS[dataset]] if dataset in HUB_DATASETS else None,
        metrics=["accuracy"],
        model_name=title,
        eval_results=hub_results,
    )


def _hub_metrics(results):
    """(name, accuracy) pairs: clean on the most images, then each robust one that is no check.

    Where the adaptive check went on from a result, the lower accuracy after it stands alone.
    """
    reported = [result for result in results.values() if _is_reported(result)]
    largest = max(reported, key=lambda result: result["n"])
    metrics = [(f"clean accuracy, n = {largest['n']}", largest["clean"])]
    for result in reported:
        if _checked_further(result, results):
            continue
        name = f"robust accuracy, {_attack(result)}, {_threat(result)}, n = {result['n']}"
        if result["warnings"]:
            name += ", with warnings"
        if not result["sanity_images"]:
            name += ", without sanity checks"
        metrics.append((name, result["robust"]))
    return metrics


def _is_reported(result):
    """Whether a result, with evaluate.py's adaptive check or without, is one of REPORTED."""
    return result["attack"].removesuffix("-adaptive") in REPORTED


def _checked_further(result, results):
    """Whether one of the results goes on from this one, with the adaptive check."""
    same = ("norm", "eps", "n", "data_sha256", "precision", "batch_size", "seed")
    for other in results.values():
        goes_on = other.get("earlier_attacks") == result["attacks"]
        if goes_on and all(other[key] == result[key] for key in same):
            return True
    return False


def _facts(config, n_parameters):
    """Rows of what the model is and what it was trained on."""
    training = config["training"]

    def hashed(name, key):
        return f"{name}, SHA-256 {cards.digest(training.get(key))}"

    size = config["image_size"]
    held_out = f"{training.get('val_size')} training images, on which the training was validated"
    rows = [
        ["network", f"{config['model_name']}, {n_parameters:,} parameters, float32"],
        ["weights", f"averaged in training, decay {training.get('ema_decay')}"],
        ["input", f"{size} x {size} x {len(config['mean'])}, in [0, 1]"],
        ["normalisation", f"inside: mean {config['mean']}, deviation {config['std']}"],
        ["classes", _classes(config)],
        ["trained against", _trained_against(config)],
        ["training data", hashed(config["dataset"], "data_sha256")],
        ["held out", held_out],
    ]
    n_synthetic = training.get("n_synthetic")
    if n_synthetic:
        names = ", ".join(training.get("synthetic") or ["a set"])
        rows.append(["generated images", f"{n_synthetic:,}: {hashed(names, 'synthetic_sha256')}"])
    else:
        rows.append(["generated images", "not recorded" if n_synthetic is None else "none"])
    if training.get("teacher") and training.get("aux_weight"):
        place = f"weight {training['aux_weight']}, block {training.get('block')}"
        rows.append(["aligned with", f"{hashed(training['teacher'], 'teacher_sha256')}; {place}"])
    if training.get("init"):
        rows.append(["began with", hashed(training["init"], "init_sha256")])
    digest = cards.digest(config["checkpoint_sha256"])
    rows.append(["exported from", f"{config['checkpoint']}, SHA-256 {digest}"])
    return rows


def _classes(config):
    names = config["classes"]
    if not names:
        return config["num_classes"]
    more = ", ..." if len(names) > 10 else ""
    return f"{config['num_classes']}: {', '.join(names[:10])}{more}"


def _trained_against(config):
    loss = config["training"].get("loss")
    if loss == "standard":
        return "nothing: on images without an attack"
    names = {"trades": "TRADES", "pgd": "cross-entropy of attacked images"}
    return f"{_threat(config)}; loss: {names.get(loss, 'not recorded')}"


def _attack(result):
    """The attack in words, with its settings where it has some."""
    settings = [f"{key} {value}" for key, value in result["settings"].items() if value is not None]
    return ", ".join([result["attack_name"], *settings])


def _threat(about):
    return threat(about["norm"], about["eps"])


def _accuracy(accuracy, interval):
    low, high = interval
    return f"{accuracy:.2%} ({low:.2%} to {high:.2%})"


def _results_table(results):
    rows = []
    for name, result in results.items():
        radius = robust = ""
        if result["attacks"]:
            radius = _threat(result)
            robust = _accuracy(result["robust"], result["robust_interval"])
        row = [
            _attack(result),
            radius,
            result["n"],
            _accuracy(result["clean"], result["clean_interval"]),
            robust,
            "; ".join(_remarks(result, results)),
            f"`{_verdicts_name(name)}`",
        ]
        rows.append(row)
    titles = ["attack", "radius", "test images", "clean", "robust", "remarks", "verdicts"]
    return cards.table(titles, rows)


def _remarks(result, results):
    remarks = []
    if _checked_further(result, results):
        remarks.append("before the adaptive check, not the number to report")
    if result["attacks"] and not _is_reported(result):
        remarks.append("a check, not the number to report")
    if result["warnings"]:
        remarks.append("**warnings, see below**")
    if result["attacks"] and not result["sanity_images"]:
        remarks.append("without sanity checks")
    if result.get("image_list_sha256"):
        remarks.append("listed images alone")
    return remarks


def _about_results(results):
    """How the table is to be read."""
    text = "An attack knows the weights (transfer does not). It may change each test image within "
    text += "the radius and within [0, 1], and it wins if the class is another one than the label. "
    text += "Radii are of images in [0, 1]. In brackets: Wilson's 95 % interval over test images."
    if any(result["attack"] == "apgd" for result in results.values()):
        text += " APGD-CE+T are two of AutoAttack's four attacks: the others may fool more images."
    return text


def _warnings(results):
    lines = []
    for name, result in results.items():
        lines += [f"- `{name}`: {printable(warning)}" for warning in result["warnings"]]
    if not lines:
        return []
    about = "Where a check failed, the robust accuracy may be overstated."
    return ["### Warnings", about, "\n".join(lines)]


def _use(config, results):
    """Texts: how the folder is read, and its verdicts compared with those of another model."""
    data = f"--dataset {config['dataset']}"
    if config["dataset"] == "folder":
        data += f" --data-dir DIR --image-size {config['image_size']}"
    verdicts = _verdicts_name(next(iter(results)))
    commands = [
        f"python evaluate.py {data} --checkpoint hub:OWNER/NAME --attack autoattack",
        f"python evaluate.py --compare hub:OWNER/NAME/{verdicts} OTHER.npz",
    ]
    about = (
        "OWNER/NAME is this repository; the path of a copy will do too. Nothing in it is run, and "
        "what is read must have the SHA-256 that config.json gives. The second command compares "
        "two models image by image, without a new attack."
    )
    return [cards.code("\n".join(commands)), about]


def _training(config):
    about = (
        "The scripts are those of *Adversarial training with diffusion images and diffusion "
        "representations*. config.json has all settings of the training. In commands, paths are "
        "cut down to their last part."
    )
    environment = config["environment"]
    command = cards.command_of(environment, config["training"].get("script"))
    return [about, "### Training", cards.code(command), cards.origin_of(environment)]


def _evaluation(name, result):
    """Texts: what was run for a result, and its sanity checks."""
    environment = result["environment"]
    command = cards.command_of(environment, "evaluate.py")
    attack = f"{result['version']}, precision {result['precision']}, seed {result['seed']}, "
    attack += f"chunks of {result['batch_size']} images"
    if result.get("compile"):
        attack += ", compiled"
    lines = [
        f"- attack: {attack}",
        cards.origin_of(environment),
        f"- test images: SHA-256 {cards.digest(result['data_sha256'])}",
    ]
    n_checked = result["sanity_images"]
    checks = [f"sanity checks on the first {n_checked} images" if n_checked else "sanity checks"]
    for line in result["sanity"]:
        state = "ok" if line["ok"] else "FAILED"
        checks.append(printable(f"  {state:<7}{line['check']:<48}{line['found']}"))
    return [f"### {name}", cards.code(command), "\n".join(lines), cards.code("\n".join(checks))]
