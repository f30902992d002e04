"""A run that takes seconds: SimCLR with a ResNet of 0.4 M parameters on 78 seeded images.

The settings are those of the shipped presets, except for the single thread, because tests share the
cores. A test that needs another setting overrides it.
"""

from pathlib import Path

import numpy as np
from PIL import Image

YAML = """
method: {name: simclr, temperature: 0.2, projector_dims: [16, 8]}
backbone: {name: test_resnet, stem: no_pool}
data: {source: folder, num_workers: 0}
views:
  crops:
    global:
      {count: 2, size: 16, scale: [0.3, 1.0], jitter: 0.8, brightness: 0.4, contrast: 0.4,
       saturation: 0.4, hue: 0.1}
optim: {name: lars, base_lr: 4.0, warmup_epochs: 0.5}
parallel: {threads: 1}
checkpoint: {every_epochs: 0, keep_last: 10}
online: {knn_every_epochs: 0}
log: {every_steps: 1, wandb: "off"}
health: {every_steps: 2}
evaluation: {crop_ratio: 1.0, k: 3}
global_batch_size: 24
epochs: 8
"""
TEXT_YAML = """
text: {captions: class_names, length: 16}
text_encoder: {width: 32, layers: 2, heads: 2}
global_batch_size: 39
epochs: 1
"""


def write_images(
    root: Path, images_per_class: int = 26, num_classes: int = 3, size: int = 20
) -> Path:
    """Write root/<split>/<class>/<number>.png with noise around one color per class.

    With 78 training images and batches of 24, an epoch has 3 steps and 6 images left over.
    """
    generator = np.random.default_rng(0)
    for split, count in (("train", images_per_class), ("val", 4)):
        for label in range(num_classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                noise = generator.integers(0, 120, (size, size, 3))
                pixels = (noise + np.roll([120, 40, 0], label)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


def write_texts(path: Path, num_texts: int = 1, num_items: int = 78) -> Path:
    """Write a table of sentences, pairs or triplets of random words, with SimCSE's titles."""
    generator = np.random.default_rng(0)
    rows = generator.choice(["red", "cat", "runs", "blue", "dog", "sits"], (num_items, 3, 5))
    lines = [",".join(" ".join(words) for words in row[:num_texts]) for row in rows]
    titles = ",".join(["sent0", "sent1", "hard_neg"][:num_texts])
    path.write_text("\n".join([titles, *lines]) + "\n")
    return path


def write_config(folder: Path) -> Path:
    """Write the images and a YAML file whose `output` and `data.root` lie in the folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    root = write_images(folder / "images")
    text = YAML.replace("data: {", f"data: {{root: {root}, cache_dir: {folder / 'cache'}, ")
    path.write_text(f"{text}output: {folder / 'run'}\n")
    return path


def write_text_config(folder: Path, method: str) -> Path:
    """Write the images and a YAML file that trains a method of images and texts for two steps.

    The texts are made of the names of the classes.
    """
    path = write_config(folder)
    simclr = "method: {name: simclr, temperature: 0.2, projector_dims: [16, 8]}"
    text = path.read_text().replace(simclr, f"method: {{name: {method}, dim: 16}}")
    text = text.replace("count: 2,", "count: 1,").replace("global_batch_size: 24", "")
    text = text.replace("epochs: 8", "").replace("stem: no_pool", "stem: imagenet")
    text = text.replace("{name: lars, base_lr: 4.0,", "{name: adamw, base_lr: 0.01,")
    path.write_text(f"{text}{TEXT_YAML}")
    return path


def write_sentence_config(folder: Path, texts: str = "pairs") -> Path:
    """Write texts and a YAML file that trains SimCSE on them for 8 epochs of 3 steps."""
    folder.mkdir(exist_ok=True)
    num_texts = {"sentences": 1, "pairs": 2, "triplets": 3}[texts]
    root = write_texts(folder / "texts.csv", num_texts)
    path = folder / "tiny.yaml"
    path.write_text(f"""
method: {{name: simcse, texts: {texts}}}
text: {{length: 12}}
text_encoder: {{name: bert, width: 32, layers: 2, heads: 2}}
data: {{source: texts, root: {root}, num_workers: 0, cache_dir: {folder / "cache"}}}
optim: {{name: adamw, base_lr: 0.001, lr_scaling: none, warmup_epochs: 1, schedule: linear}}
parallel: {{threads: 1}}
checkpoint: {{every_epochs: 0, keep_last: 10}}
log: {{every_steps: 1, wandb: "off"}}
health: {{every_steps: 2}}
evaluation: {{at_end: []}}
global_batch_size: 24
epochs: 8
output: {folder / "run"}
""")
    return path
