"""`tailor init`: choose params for a folder of images, and write them to params.yaml with the reason for each value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.params import Params, parse_params
from pipeline.preparation.encoder_choice import EncoderChoice, Suggestions, encoder_values
from pipeline.preparation.folder_summary import (
    MOST_TESTED,
    MOST_VALIDATED,
    TEST_SHARE,
    VALIDATION_SHARE,
    FolderSummary,
)
from pipeline.shared.artifacts import sha256_of
from pipeline.shared.errors import DataError, ParamsError
from pipeline.text.sentences import is_code
from serving.shared.terminal import counted

SMALL, TINY_PHOTOGRAPH = 40, 96  # pixels of the shorter side
LARGEST_QUEUE = 65536  # the paper's value for iNaturalist 2018
ADAPTER = 128  # hidden units
WORDS = Path("data/text/classes.csv")  # of the classes, with the columns name and text
FROM_SCRATCH = EncoderChoice(None, "--no-encoder")
# Values without an encoder. A params.yaml of an older release lacks the keys in NEW_KEYS.
NEW_KEYS: dict[str, Any] = {
    "encoder": None,
    "image.interpolation": "bilinear",
    "teacher.adapter": 0,
    "student.adapter": 0,
    "student.projection_hidden": None,
    "student.tune": "none",
    "student.memory": None,
}
NO_ENCODER = NEW_KEYS | {"student.beta": 1.0, "student.alpha": 1.0}  # the recipe with an encoder sets both to 0


def suggest_params(
    summary: FolderSummary, location: str, gpu: bool, choice: EncoderChoice = FROM_SCRATCH
) -> Suggestions:
    """Choose params: dotted key of params.yaml → (value, reason). gpu: whether training will run on a GPU.

    choice: see choose_encoder. Raises DataError if a class is too small to hold out a test image.
    """
    classes, smallest, total = len(summary.counts), min(summary.counts), sum(summary.split_sizes()[0])
    tail = f"your own class sizes: {counted(max(summary.counts), 'image')} to {smallest:,}"
    suggested: Suggestions = {
        "data.source": ("folder", "a folder per class"),
        "data.location": (location, "your images"),
        "data.profile": ("natural", tail),
    }
    if summary.tested is None:
        if smallest < 2:
            name = summary.classes[summary.counts.index(smallest)]
            raise DataError(
                f"class {name!r} has 1 image: none remains for training after one is held out; add images, merge the "
                "class into another, or add a test/ folder of your own"
            )
        reason = "of each class, at least one image; see docs/own-images.md"
        suggested["data.test_per_class"] = (MOST_TESTED, "at most; fewer for small classes, see the next line")
        suggested["data.test_share"] = (TEST_SHARE, reason)
    if not summary.own_validation:
        suggested["data.validation_per_class"] = (MOST_VALIDATED, "at most; fewer for small classes, see the next line")
        suggested["data.validation_share"] = (VALIDATION_SHARE, "of the training images of a class")
    if choice.encoder:
        suggested |= encoder_values(choice, choice.encoder, _batch_size(total, math.inf))
    else:
        suggested |= {key: (value, "without an encoder") for key, value in NO_ENCODER.items()}
        suggested["encoder"] = (None, choice.reason)
        suggested |= _network(summary, total, gpu)
    suggested |= _queues(total, classes)
    top = min(5, classes)
    return suggested | {"evaluate.top_k": (top, "of your classes"), "serving.top_k": (top, "classes per response")}


def _batch_size(total: int, largest: float) -> int:
    """Return the batch size: the largest power of two up to an eighth of the training images, from 8 to `largest`."""
    power = 2 ** int(math.log2(max(total / 8, 1)))
    return int(min(total, max(8, min(largest, power))))


def _network(summary: FolderSummary, total: int, gpu: bool) -> Suggestions:
    """Choose image size, backbone, batch size, epochs, learning rate, augmentation; equal for teacher and student."""
    size, resize, backbone, why = _backbone(summary.shorter, total, gpu)
    batch = _batch_size(total, 128 if total >= 50_000 else 64)
    epochs = max(20, min(200 if gpu else 60, round(40_000 * batch / total)))
    photograph = size >= 128
    steps = f"{counted(epochs * max(1, total // batch), 'step')} of {batch} images; more epochs rarely reduce accuracy"
    if not gpu:
        steps += "; no GPU was detected here, with one use 200"
    network = {
        "backbone": (backbone, why),
        "epochs": (epochs, steps),
        "batch_size": (batch, "64; 128 from 50,000 images; smaller for few images"),
        "learning_rate": (0.05 * batch / 64, "the paper's 0.05 at batch 64, in proportion to the batch"),
        "schedule.warmup_epochs": (max(1, min(5, epochs // 10)), "a tenth of the epochs, at most 5"),
        "augment.crop": ("resized" if photograph else "pad", "a box of a photograph" if photograph else "small images"),
        "augment.crop_padding": (0 if photograph else size // 8, "an eighth of the image; 0 with crop: resized"),
        "augment.flip": (True, "false if a mirror image has another meaning: text, digits, left and right"),
        "augment.policy": ("randaugment", "colour and shape; none if your classes differ only by colour"),
        "augment.cutout": (0 if photograph else size // 4, "a quarter of a small image; none with crop: resized"),
    }
    if summary.background:
        network["augment.fill"] = (summary.background, "the light background of your images")
    suggested: Suggestions = {
        "image.size": (size, f"the median of your images' shorter sides is {summary.shorter} pixels"),
        "image.resize_to": (resize, "before the centre crop"),
        "image.mean": ([0.485, 0.456, 0.406], "ImageNet's, suitable for photographs"),
        "image.std": ([0.229, 0.224, 0.225], "ImageNet's"),
    }
    return suggested | {f"{part}.{key}": value for part in ("teacher", "student") for key, value in network.items()}


def _backbone(shorter: int, total: int, gpu: bool) -> tuple[int, int, str, str]:
    """Choose the backbone: (size, resize_to, backbone, reason)."""
    if shorter <= SMALL:
        return 32, 32, "resnet32", "the paper's for 32x32 images"
    if shorter <= TINY_PHOTOGRAPH:
        return 64, 64, "resnet32", "small images"
    if not gpu:
        return 64, 64, "resnet32", "a CPU can train with 64x64 pixels; with a GPU run this command again"
    if total >= 20_000:
        return 224, 256, "torchvision/resnet50", "photographs, enough for 24 million weights"
    return 224, 256, "torchvision/resnet18", "photographs, too few for a larger network"


def _queues(total: int, classes: int) -> Suggestions:
    """Choose K and k_m of Eq. 5 within the paper's ratios: 0.3 of the training images, at least 8 rows per class."""
    target = max(0.3 * total, 8 * classes, 256)
    rows = max(min(2 ** round(math.log2(target)), LARGEST_QUEUE), 2 ** math.ceil(math.log2(2 * classes)))
    minimum = max(1, min(3, rows // (2 * classes)))
    return {
        "student.queue_total": (
            rows,
            f"K: a third of the training images ({total:,}), at least 8 rows per class and 256",
        ),
        "student.queue_minimum": (minimum, "k_m: least number of rows of a class"),
        "student.projection_dim": (32 if classes <= 100 else 128, "dimension of the contrast features"),
    }


def text_values(classes: Sequence[str], source: Path, adapter: bool) -> tuple[Suggestions, str]:
    """Choose section `text` and training with text features as centres; returns them and a warning, or ''.

    source: an ONNX text encoder with tokenizer.json beside it, a folder of transformers, or a .safetensors file of features.
    adapter: whether the student has a frozen encoder, which needs an adapter to be trained by L_GML. Words of the classes are
    taken from data/text if it has them. Nothing is suggested for class names that are codes without words in data/text.
    Raises ParamsError if `source` is none of these.
    """
    section: dict[str, Any] = {"file": source.as_posix()}
    weights = source / "model.safetensors" if source.is_dir() else source
    if not weights.is_file():
        raise ParamsError(f"--text {source}: no such file; expected .onnx, .safetensors, or a folder of transformers")
    if source.is_dir():
        section["encoder"] = "transformers"
    elif source.suffix == ".safetensors":
        section["encoder"] = "features"
    else:
        tokenizer = source.with_name("tokenizer.json")
        if source.suffix != ".onnx" or not tokenizer.is_file():
            raise ParamsError(
                f"--text {source}: expected an .onnx file with {tokenizer.name} beside it, or .safetensors"
            )
        section |= {"encoder": "onnx", "tokenizer": tokenizer.as_posix()}
    section["sha256"] = sha256_of(weights)
    if section["encoder"] != "features":
        if WORDS.is_file():
            section["names"] = {"file": WORDS.as_posix()}
        elif codes := [name for name in classes if is_code(name)]:
            return {}, (
                f"class names that are codes, not words: {len(codes):,}, such as {codes[0]!r}; no text features are suggested: "
                f"write {WORDS} with the columns name and text, then run this command again"
            )
        if any(WORDS.parent.glob("*.txt")):
            section["descriptions"] = WORDS.parent.as_posix()
    suggested: Suggestions = {
        "text": (section, "--text; sentences about the classes are centres of the GML loss"),
        "student.contrast_encoder": ("text", "the features of section text"),
        "student.beta": (1.0, "with text features"),
        "student.alpha": (0.0, "text features need no teacher; L_KD would"),
    }
    if adapter:
        suggested["student.adapter"] = (ADAPTER, "of the encoder's features; L_GML trains it")
    return suggested, ""


def without_text(template: str) -> Suggestions:
    """Values that remove section `text` and its use from a template that has them: nothing else would compute its centres.

    The adapter that `text_values` proposes for a frozen encoder is removed too: without L_GML it only costs accuracy.
    """
    from pipeline.params.recipe import load_document

    document = load_document(template)
    removed: Suggestions = {}
    if document.get("text"):
        removed["text"] = (None, "removed, as no text features are suggested; --text FILE adds them")
    student = document.get("student")
    if isinstance(student, dict) and "text" in str(student.get("contrast_encoder")):
        removed["student.contrast_encoder"] = ("teacher", "instead of text features")
        removed["student.contrast"] = ({"kind": "gml"}, "instead of text features")
        if student.get("adapter"):
            removed["student.adapter"] = (0, "instead of text features")
    return removed


def write_text(template: str, suggested: Suggestions) -> tuple[str, Params]:
    """Write the suggested values into the template (text of a params.yaml), each with its reason as a comment.

    Returns the text and its validated params. Raises ParamsError if the template lacks a key.
    """
    import yaml

    text, remaining = _with_values(template, suggested, block_mappings=False)
    if remaining:  # sections in braces or aliases; otherwise they are kept as they are
        text, remaining = _with_values(template, suggested, block_mappings=True)
    missing = [key for key, (value, _) in remaining.items() if (key, value) not in NEW_KEYS.items()]
    if missing:
        raise ParamsError(
            f"params.yaml: has no key {missing[0]}; restore the original file, then run this command again"
        )
    return text, parse_params(yaml.safe_load(text), Path("params.yaml"))


def _with_values(template: str, suggested: Suggestions, block_mappings: bool) -> tuple[str, Suggestions]:
    """The template with the values on the lines of their keys, and the values whose key has no line of its own."""
    import yaml

    from pipeline.params.recipe import dump_document, load_document

    document = load_document(template, block_mappings)  # puts each key on one line, lists too
    for key in suggested:
        _clear_mapping(document, key)
        if key.endswith(".augment.fill"):  # which a params.yaml of an older release lacks
            section = document.get(key.partition(".")[0]) or {}
            section.get("augment", {}).setdefault("fill", None)
    template = dump_document(document)
    remaining, lines, path = dict(suggested), [], []
    for line in template.splitlines():
        body = line.split(" #")[0]
        name = body.strip().partition(":")[0]
        if name and not name.startswith("#"):
            depth = (len(body) - len(body.lstrip())) // 2
            path[depth:] = [name]
            if (key := ".".join(path)) in remaining:
                value, reason = remaining.pop(key)
                text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
                text = text.replace("\n...", "").strip()
                line = f"{'  ' * depth}{name}: {text} # {reason}"
        lines.append(line)
    return "\n".join(lines) + "\n", remaining


def _clear_mapping(document: Any, key: str) -> None:
    """Replace a mapping at a dotted key, such as section `encoder`, by null. A value is written on the line of its key."""
    *sections, last = key.split(".")
    for section in sections:
        document = document.get(section) if isinstance(document, dict) else None
    if isinstance(document, dict) and isinstance(document.get(last), dict):
        document[last] = None
