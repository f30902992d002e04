"""Training views for the linear and fine-tuning protocols, one random crop per image."""

from ssl_pretrain.data import readers
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.views.recipe import Crop, CropSampler, Interpolation, ViewsConfig


def build_train_view(
    run: Run,
    interpolation: Interpolation,
    crop_sampler: CropSampler = "torchvision",
    antialias: bool = True,
) -> Crop:
    """Return a random resized crop of 8 to 100 % of the area, with flips if the run uses them.

    Runs disable flips for images such as digits, where a flip may change the class.
    """
    has_flips = any(crop.flip > 0 for crop in run.config.views.crops.values())
    return Crop(
        count=1,
        size=run.image_size,
        interpolation=interpolation,
        flip=0.5 if has_flips else 0.0,
        crop_sampler=crop_sampler,
        antialias=antialias,
    )


def build_train_loader(
    run: Run,
    source: Source,
    view: Crop,
    batch_size: int,
    augment: readers.ViewAugmentation | None = None,
) -> Loader:
    """Return a loader for this rank's share of the training batches.

    The seed is always 0. The images and crops are the same on any number of ranks.

    Args:
        run: Run to evaluate.
        source: Training images.
        view: Crop of each image.
        batch_size: Images per step over all ranks.
        augment: Further augmentation of each view, on the CPU.
    """
    data, views = run.config.data, run.config.views
    if augment is None:
        kind, _ = readers.choose_reader_kind(data, source)
    else:
        kind = readers.ReaderKind.PROCESSES
    reader = readers.build_reader(
        source,
        ViewsConfig({"train": view}, views.mean, views.std),
        BatchPlan(0, len(source), batch_size, process_group.rank(), process_group.world_size()),
        kind,
        num_workers=min(data.num_workers, process_group.cores_per_rank()),
        device=run.device,
        augment=augment,
    )
    return Loader(reader, max_replaced=data.max_replaced)


def describe_train_view(view: Crop) -> str:
    """Describe a training view, as an entry of the saved protocol."""
    entries = [
        f"random crops of {view.scale[0]:g} to {view.scale[1]:g} of the area, {view.interpolation}",
        "" if view.crop_sampler == "torchvision" else f"{view.crop_sampler} sampler",
        "" if view.antialias else "not antialiased",
        "flipped with probability 0.5"
        if view.flip
        else "not flipped, like the views of the pretraining",
    ]
    return ", ".join(filter(None, entries))
