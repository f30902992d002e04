"""Every method on a small network with small heads, and noise in the views and masks it takes."""

import small_texts
import torch

from ssl_pretrain import methods
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.views import masks
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop, ViewsConfig

SIZE = 32  # pixels of the global views
VIEWS = {
    "dino": [SIZE, SIZE, 16, 16],
    "swav": [SIZE, SIZE, 16, 16],
    "cpc": [SIZE],
    "ijepa": [SIZE],
    "mae": [SIZE],
    "clip": [SIZE],
    "siglip": [SIZE],
    "simcse": [],
}
VIT = BackboneConfig(name="test_vit", args={"patch_size": 4, "depth": 2})
MASKS = {  # these methods need a ViT
    "ijepa": Mask(kind="multiblock", patch_size=4, min_keep=5),
    "mae": Mask(kind="random", patch_size=4),
}


def build_method(name: str, backbone: str = "test_resnet") -> Method:
    """Return a method with seeded weights. Methods with masks have a ViT instead of `backbone`."""
    torch.manual_seed(0)
    module = methods.find(name)
    args = {"norm_layer": "groupnorm1"} if name == "cpc" else {}
    resnet = BackboneConfig(name=backbone, stem="no_pool", args=args)
    network = backbones.build(VIT if name in MASKS else resnet, SIZE)
    return small_texts.build_method(module.Config(**module.SMALL_CONFIG), network)


def random_batch(name: str, num_images: int) -> Batch:
    """Return seeded noise in the views that the method takes, with its masks and texts."""
    generator = torch.Generator().manual_seed(1)
    sizes = VIEWS.get(name, [SIZE, SIZE])
    views = [torch.randn(num_images, 3, size, size, generator=generator) for size in sizes]
    numbers, mask = torch.arange(num_images), MASKS.get(name, Mask())
    crops = {str(view): Crop(count=1, size=size, mask=mask) for view, size in enumerate(sizes)}
    mask_sets = masks.blank(ViewsConfig(crops=crops), num_images, "cpu")
    num_texts = getattr(methods.find(name).Config(), "num_texts", 0)
    texts = small_texts.random_texts(num_images, step=0, num_texts=num_texts)
    return Batch(views, numbers % 4, numbers, mask_sets, texts)
