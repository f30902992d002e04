"""Sections of a model card: code that loads each format, and its measured differences."""

from typing import Any

from ssl_pretrain.eval.exporting import onnx, transformers_folder
from ssl_pretrain.eval.exporting.export_formats import PREPROCESSING_FILE, PROGRAM_FILE
from ssl_pretrain.eval.exporting.reference import WEIGHTS
from ssl_pretrain.system import markdown

FOLDER = "FOLDER"  # stands for the folder of the export in the code
LIBRARIES = {
    "timm": "timm",
    "timm_wrapper": "transformers, around timm's network",
    "transformers": "transformers",
    "torchhub": "torch.hub",
    "torch_export": "torch.export",
    "torchvision": "torchvision",
    "onnx": "ONNX Runtime",
    "open_clip": "open_clip, which has both towers",
}


def render(arguments: dict[str, Any]) -> str:
    """Return the section with code that loads the backbone in every format of an export.

    Args:
        arguments: Content of timm.json.
    """
    sections = [
        "## Loading",
        f"`{FOLDER}` is a local copy of these files. Each `backbone` maps normalized images (n,"
        f" {arguments['input']['channels']}, height, width) to features (n, dim).",
        "With this project, which also checks the reference features:",
        _code_block(
            "from ssl_pretrain.eval import export\n\n"
            f'backbone = export.load("{FOLDER}")\n'
            f'transform = export.load_transform("{FOLDER}")'
        ),
    ]
    for name in arguments["formats"]:
        sections += [f"With {LIBRARIES[name]}:", _code_block(_code(name, arguments))]
        if name == "transformers":
            sections.append(_processor_note(arguments))
        if name == "open_clip":
            sections.append(_open_clip_note(arguments))
    sections += [
        f"The transform without other packages is in `{PREPROCESSING_FILE}`:",
        _code_block(
            "from preprocessing import transform\n\n"
            'features = backbone(transform("photo.jpg")[None])'
        ),
    ]
    return "\n\n".join(filter(None, [*sections, _stem_note(arguments), _measurements(arguments)]))


def _code(name: str, arguments: dict[str, Any]) -> str:
    """Return the code that loads a format."""
    if name == "timm":
        return (
            "import timm\n\n"
            "# Without pretrained=True the weights are random.\n"
            f'backbone = timm.create_model("local-dir:{FOLDER}", pretrained=True).eval()'
        )
    if name == "timm_wrapper":
        return (
            "from transformers import AutoModel\n\n"
            f'model = AutoModel.from_pretrained("{FOLDER}").eval()\n'
            "features = model(images).pooler_output"
        )
    if name == "transformers":
        is_raw = "hidden_states" in arguments["transformers_features"]
        states = ", output_hidden_states=True" if is_raw else ""
        return (
            "from transformers import AutoModel\n\n"
            f'model = AutoModel.from_pretrained("{FOLDER}/{transformers_folder.FOLDER_NAME}")'
            ".eval()\n"
            f"outputs = model(images{states})\n"
            f"features = {arguments['transformers_features']}"
        )
    if name == "torchhub":
        return (
            "import torch\n\n"
            f'backbone = torch.hub.load("{FOLDER}", "backbone", source="local")\n'
            f'transform = torch.hub.load("{FOLDER}", "transform", source="local")'
        )
    if name == "torch_export":
        return f'import torch\n\nbackbone = torch.export.load("{FOLDER}/{PROGRAM_FILE}").module()'
    if name == "torchvision":
        return (
            "import torch, torchvision\nfrom safetensors.torch import load_file\n\n"
            f"backbone = torchvision.models.{arguments['architecture']}()\n"
            "backbone.fc = torch.nn.Identity()\n"
            f'backbone.load_state_dict(load_file("{FOLDER}/{WEIGHTS}"))\nbackbone.eval()'
        )
    if name == "open_clip":
        return (
            "import open_clip\nfrom PIL import Image\n\n"
            f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{FOLDER}")\n'
            f'tokenizer = open_clip.get_tokenizer("local-dir:{FOLDER}")\n'
            "model.eval()\n"
            'image = preprocess(Image.open("photo.jpg"))[None]\n'
            "image_vectors = model.encode_image(image, normalize=True)\n"
            'text_vectors = model.encode_text(tokenizer(["a photo of a dog."]), normalize=True)\n'
            "cosines = image_vectors @ text_vectors.T"
        )
    return (
        "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{FOLDER}/{onnx.FLOAT_MODEL}")\n'
        '(features,) = session.run(None, {"images": images})'
    )


def _stem_note(arguments: dict[str, Any]) -> str:
    name, stem = arguments["architecture"], arguments["stem"]
    if stem == "imagenet":
        return ""
    return f"timm and torchvision have no `{stem}` stem, so their {name} is a different network."


def _processor_note(arguments: dict[str, Any]) -> str:
    """Return a sentence if transformers' image processor cannot replace the transform."""
    problem = transformers_folder.find_processor_problem(arguments["input"])
    if not problem:
        return ""
    return f"Use the transform of `{PREPROCESSING_FILE}`. transformers has none: {problem}."


def _open_clip_note(arguments: dict[str, Any]) -> str:
    """Return a sentence if open_clip's transform differs from that of the evaluations."""
    view, problems = arguments["input"], []
    if view["crop_ratio"] != 1:
        problems.append(
            f"crops nothing of a square image (evaluation.crop_ratio was {view['crop_ratio']:g})"
        )
    if view["range"]:
        problems.append("knows no range of values (data.range)")
    if not problems:
        return ""
    return (
        f"Use the transform of `{PREPROCESSING_FILE}` for the views of this project's evaluations."
        f" open_clip's {' and '.join(problems)}."
    )


def _measurements(arguments: dict[str, Any]) -> str:
    """Return the table of differences that were measured after a reload in another process."""
    if not arguments["reloads"]:
        return ""
    rows = []
    for name, result in arguments["reloads"].items():
        views = "-" if result["views"] is None else _gray_levels(result["views"], arguments)
        packages = ", ".join(f"{package} {text}" for package, text in result["versions"].items())
        rows.append([LIBRARIES[name], f"{result['difference']:.1e}", views, packages])
    table = markdown.table(
        ["loaded by", "features, largest difference", "its transform, gray levels", "versions"],
        rows,
    )
    notes = (
        "Each format was loaded in a process of its own. The first difference is that of the"
        " reference images' features, relative to the largest feature. The second is that of the"
        f" library's own transform from `{PREPROCESSING_FILE}`, on one synthetic image, in levels"
        " of 255: most libraries resize with another rounding, and may crop one pixel beside."
    )
    if "open_clip" in arguments["reloads"]:
        notes += (
            " For open_clip, it is that of the embeddings of these images and of"
            f" {len(arguments['texts'])} texts, one of which is too long."
        )
    return f"{table}\n\n{notes}"


def _gray_levels(difference: float, arguments: dict[str, Any]) -> str:
    return f"{difference * max(arguments['input']['std']) * 255:.1f}"


def _code_block(code: str) -> str:
    return f"```python\n{code}\n```"
