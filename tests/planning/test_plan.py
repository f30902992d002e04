"""The plan of a run describes the loss of its method."""

import pytest

from ssl_pretrain import config
from ssl_pretrain.planning import plan
from ssl_pretrain.schema import presets

PER_IMAGE = "loss: the mean of one term per image, over 32 images"
PAIRS = "embeddings per loss: 64 (2 views x 32 images)"
NEGATIVES = "negatives per anchor: "
OTHER_IMAGES = f"{PAIRS}; {NEGATIVES}31, every other image of the batch"
LOSSES = {
    "barlow_twins": PAIRS,
    "byol": PER_IMAGE,
    "dino": PER_IMAGE,
    "ijepa": PER_IMAGE,
    "lejepa": "embeddings per loss: 128 (4 views x 32 images)",
    "mae": PER_IMAGE,
    "simsiam": PER_IMAGE,
    "swav": PAIRS,
    "vicreg": PAIRS,
    "align_uniform": OTHER_IMAGES,
    "cpc": (
        f"embeddings per loss: the patches of 32 images; {NEGATIVES}every other patch of the batch"
    ),
    "moco": f"{PER_IMAGE}; {NEGATIVES}4,096, the embeddings in the queue",
    "moco method.without_queue=true": OTHER_IMAGES,
    "moco_v3": OTHER_IMAGES,
    "n_pair": OTHER_IMAGES,
    "n_pair method.pairs=labels": f"{PAIRS}; {NEGATIVES}every image of another class",
    "nnclr": OTHER_IMAGES,
    "pairwise": f"{PAIRS}; {NEGATIVES}62, every other embedding of the batch",
    "supcon": f"{PAIRS}; {NEGATIVES}every embedding of another class",
    "temperature_free": f"{PAIRS}; {NEGATIVES}62, every other embedding of the batch",
    "triplet": f"{PAIRS}; {NEGATIVES}1 per positive pair, chosen among 62",
    "triplet method.pairs=labels": f"{PAIRS}; {NEGATIVES}1 per positive pair, chosen from other "
    "classes",
}


@pytest.mark.parametrize("case", LOSSES)
def test_only_methods_with_negatives_have_them_in_their_plan(case, tmp_path):
    name, *overrides = case.split()
    overrides += ["global_batch_size=32", "parallel.bn_group_images=global"]
    overrides += [f"data.root={tmp_path / 'missing'}"]
    run = config.load(presets.find(f"{name}_cifar10"), overrides)
    lines = plan.describe(run).split("# plan\n")[1].splitlines()
    assert [line for line in lines if line.startswith(("embeddings per", "loss:"))] == [
        LOSSES[case]
    ]
    assert NEGATIVES in LOSSES[case] or "negative" not in "".join(lines)
