"""Self-supervised pretraining of image backbones in plain torch.distributed."""

__version__ = "0.1.0"
