"""Every method computes its loss with the public function of `ssl_pretrain.losses`, bit for bit."""

import contract
import pytest
import torch

from ssl_pretrain import losses, methods


def _views(loss, z, **settings):
    return loss(z["z_a"], z["z_b"], **settings)


def _predicted(loss, z, targets, **settings):
    return loss(z["p_a"], z["p_b"], targets["z_a"], targets["z_b"], **settings)


# From a method, its embeddings z and its targets t to its loss.
LOSSES = {
    "align_uniform": lambda m, z, t: _views(losses.align_uniform, z),
    "barlow_twins": lambda m, z, t: _views(losses.barlow_twins, z),
    "byol": lambda m, z, t: _predicted(losses.byol, z, t),
    "cpc": lambda m, z, t: losses.cpc(
        z["predictions"],
        z["targets"].unflatten(1, z["predictions"].shape[3:]),
        rows_ahead=m.config.rows_ahead,
        scale=m.config.scale,
    ),
    "clip": lambda m, z, t: losses.image_text(z["z_a"], z["z_b"], z["logit_scale"]),
    "debiased": lambda m, z, t: _views(
        losses.debiased, z, temperature=m.config.temperature, tau_plus=m.config.tau_plus
    ),
    "decoupled": lambda m, z, t: (
        2 * _views(losses.decoupled, z, temperature=m.config.temperature, sigma=m.config.sigma)
    ),
    "dino": lambda m, z, t: losses.dino(
        z["logits"],
        t["logits"],
        m.center,
        temperature=m.config.temperature,
        teacher_temperature=m.teacher_temperature.item(),
    ),
    "hard_negative": lambda m, z, t: _views(
        losses.hard_negative,
        z,
        temperature=m.config.temperature,
        tau_plus=m.config.tau_plus,
        beta=m.config.beta,
    ),
    "ijepa": lambda m, z, t: losses.ijepa(z["patches"], t["patches"], valid=t["valid"]),
    "lejepa": lambda m, z, t: losses.lejepa(
        z["z"],
        step=m.slice_step,
        seed=m.slice_seed,
        num_global_views=m.config.num_global_views,
        num_slices=m.config.num_slices,
        sigreg_weight=m.config.sigreg_weight,
    ),
    "mae": lambda m, z, t: losses.mae(
        z["predictions"], t["images"], t["masked"], normalize=m.config.normalize_pixels
    ),
    "moco": lambda m, z, t: losses.moco(
        z["queries"], t["keys"], m.queue.rows, temperature=m.config.temperature
    ),
    "moco_v3": lambda m, z, t: _predicted(losses.moco_v3, z, t, temperature=m.config.temperature),
    "n_pair": lambda m, z, t: _views(
        losses.n_pair, z, labels=t["groups"], length_weight=m.config.length_weight
    ),
    "nnclr": lambda m, z, t: losses.nnclr(
        z["p_a"], z["p_b"], z["z_a"], z["z_b"], m.queue.rows, temperature=m.config.temperature
    ),
    "pairwise": lambda m, z, t: _views(
        losses.pairwise,
        z,
        labels=t["groups"],
        margin=m.config.margin,
        unit_length=m.config.unit_length,
    ),
    "siglip": lambda m, z, t: losses.sigmoid_image_text(
        z["z_a"], z["z_b"], z["logit_scale"], z["logit_bias"]
    ),
    "simcse": lambda m, z, t: losses.sentence_pairs(
        z["z_a"], z["z_b"], temperature=m.config.temperature
    ),
    "simclr": lambda m, z, t: 2 * _views(losses.nt_xent, z, temperature=m.config.temperature),
    "simsiam": lambda m, z, t: _predicted(losses.simsiam, z, z),
    "supcon": lambda m, z, t: (
        _views(
            losses.supervised_contrastive,
            z,
            labels=t["labels"],
            temperature=m.config.temperature,
        )
        * m.config.temperature
        / m.config.base_temperature
    ),
    "swav": lambda m, z, t: losses.swav(z["scores"], temperature=m.config.temperature),
    "temperature_free": lambda m, z, t: 2 * _views(losses.temperature_free, z),
    "triplet": lambda m, z, t: _views(
        losses.triplet, z, labels=t["groups"], margin=m.config.margin
    ),
    "vicreg": lambda m, z, t: _views(losses.vicreg, z),
}


@pytest.mark.parametrize("name", methods.names())
def test_the_method_has_the_loss_of_the_public_function(name):
    overrides = {"queue_size": 0} if name == "swav" else {}
    method, images = contract.build(name, **overrides), contract.random_batch(name)
    embeddings, targets = method(images), method.targets(images)
    expected = method.loss(embeddings, targets).loss
    assert torch.equal(LOSSES[name](method, embeddings, targets), expected)
