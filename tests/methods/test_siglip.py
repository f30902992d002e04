"""SigLIP: its loss, its scale and bias, and whole steps."""

import small_texts

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"dim": 6}
OPTIM = OptimConfig(name="adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.2)
VIEWS = (8,)
TEXT_ENCODER = small_texts.build_text_encoder
TEXTS = small_texts.random_texts
