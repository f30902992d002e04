"""SimCSE: whole steps against the authors' arithmetic, its two encoders, and dropout."""

import contract
import pytest
import small_texts
import torch
from conftest import run_ranks
from torch import nn

from ssl_pretrain import rng
from ssl_pretrain.config import RunConfig
from ssl_pretrain.methods import simcse
from ssl_pretrain.models.text_encoders import TextEncoderConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.views.batch import TextSet

METHOD: dict = {}  # the shipped defaults: sentences, each encoded twice with dropout
OPTIM = OptimConfig(name="adamw", base_lr=0.01, lr_scaling="none", warmup_epochs=1, clip_norm=1.0)
VIEWS = ()
TEXTS = small_texts.random_texts
HAS_DROPOUT = True
SUPERVISED = {"texts": "triplets", "hard_negative_weight": 0.7}
PASSAGES = {
    "texts": "triplets",
    "encoders": "separate",
    "projector": "none",
    "similarity": "dot",
    "temperature": 1.0,
}
SENTENCE_BERT = {"texts": "pairs", "projector": "none"}
CASES = [METHOD, SUPERVISED, PASSAGES, SENTENCE_BERT]


def build(settings, dropout=0.1):
    torch.manual_seed(0)
    config = simcse.Config(**settings)
    return small_texts.build_method(config, nn.Identity(), dropout).double()


def random_batch(settings, step=0, rows=contract.ROWS):
    texts = small_texts.random_texts(rows, step, simcse.Config(**settings).num_texts)
    return small_texts.with_texts(contract.random_batch("simcse", step, rows), texts)


def authors_embeddings(method, batch):
    """Return one list of embeddings per sentence of an item, by BERT's own output."""
    sentences = list(batch.texts)
    if method.config.texts == "sentences":
        sentences = sentences * 2
    networks = [(method.backbone, method.projector)] * len(sentences)
    groups = [sentences]
    if method.config.encoders == "separate":
        networks = [(method.backbone, method.projector)]
        networks += [(method.second_encoder, method.second_projector)]
        groups = [sentences[:1], sentences[1:]]
    embeddings = []
    for group, (encoder, projector) in zip(groups, networks):
        ids = torch.cat([text.ids for text in group])
        mask = torch.cat([text.valid for text in group]).long()
        features = encoder.model.network(ids, attention_mask=mask).last_hidden_state[:, 0]
        if method.config.projector == "tanh":
            features = torch.tanh(features @ projector[0].weight.T + projector[0].bias)
        embeddings += features.chunk(len(group))
    return embeddings


def authors_loss(method, batch):
    """Return the loss as `cl_forward` of princeton-nlp/SimCSE computes it, in loops."""
    config = method.config
    anchors, positives, *hard = authors_embeddings(method, batch)
    if config.similarity == "cosine":
        anchors, positives = contract.unit_rows(anchors), contract.unit_rows(positives)
        hard = [contract.unit_rows(rows) for rows in hard]
    losses = []
    for i, anchor in enumerate(anchors):
        logits = [anchor @ positive / config.temperature for positive in positives]
        for j, negative in enumerate(hard[0] if hard else []):
            weight = config.hard_negative_weight if i == j else 0.0
            logits.append(anchor @ negative / config.temperature + weight)
        losses.append(torch.logsumexp(torch.stack(logits), 0) - logits[i])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("settings", CASES, ids=["unsupervised", "supervised", "DPR", "SBERT"])
def test_a_whole_step_equals_that_of_the_authors(settings):
    method, batch = build(settings), random_batch(settings)
    recipe = OptimConfig(name="sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0, momentum=0.0)
    expected = contract.copy_method(method)
    torch.manual_seed(rng.derive_seed(0, 0, 0))  # the dropout of the first step
    loss = authors_loss(expected, batch)
    contract.apply_plain_step(expected, recipe, loss, lr=0.1)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    contract.take_step(method, recipe, batch)
    contract.assert_same(method, expected)
    assert contract.largest_error(method, before) > 1e-4


def train_on_rank(settings):
    """Return the gradients of this rank's rows, averaged over ranks as DDP does."""
    from ssl_pretrain.distributed import collectives, process_group

    method, world = build(settings, dropout=0.0), process_group.world_size()
    batch = random_batch(settings).slice(process_group.rank(), world)
    method.loss(method(batch), {}).loss.backward()
    return {
        name: collectives.reduce_sum(parameter.grad) / world
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.promise
@pytest.mark.parametrize("settings", CASES[1:], ids=["supervised", "DPR", "SBERT"])
def test_without_dropout_ranks_have_the_gradient_of_one_process(settings):
    expected = train_on_rank(settings)
    for size in (2, 3):
        for gradients in run_ranks(train_on_rank, settings, world_size=size):
            contract.assert_equal_by_name(gradients, expected)


def test_only_dropout_makes_the_embeddings_of_a_sentence_differ():
    for dropout in (0.0, 0.1):
        embeddings = build(METHOD, dropout)(random_batch(METHOD))
        assert torch.equal(embeddings["z_a"], embeddings["z_b"]) == (dropout == 0)


def test_two_encoders_start_with_the_same_weights_and_learn_different_ones():
    method = build(PASSAGES)
    contract.assert_same(method.second_encoder, method.backbone)
    contract.take_step(method, OPTIM, random_batch(PASSAGES), step=2)
    assert contract.largest_error(method.second_encoder, method.backbone) > 1e-3


@pytest.mark.parametrize(
    ("settings", "is_projected"),
    [
        ({}, False),
        ({"texts": "pairs"}, True),
        ({"texts": "pairs", "evaluation_output": "features"}, False),
        ({"evaluation_output": "projected"}, True),
        ({"texts": "pairs", "projector": "none"}, False),
    ],
)
def test_evaluations_compare_what_the_authors_compare(settings, is_projected):
    method = build(settings).eval()
    text = random_batch(settings).texts[0]
    features = method.backbone(text.ids, text.valid)
    expected = method.projector(features) if is_projected else features
    torch.testing.assert_close(method.embed_texts(text), expected)


def test_passages_go_through_the_second_encoder():
    method = build(PASSAGES).eval()
    with torch.no_grad():
        for parameter in method.second_encoder.parameters():
            parameter.mul_(1.1)
    text = random_batch(PASSAGES).texts[0]
    second = method.embed_texts(text, second=True)
    torch.testing.assert_close(second, method.second_encoder(text.ids, text.valid))
    assert not torch.allclose(second, method.embed_texts(text))


def test_padding_changes_no_embedding():
    method = build(METHOD).eval()
    text = random_batch(METHOD).texts[0]
    others = TextSet(torch.where(text.valid, text.ids, 3), text.valid)
    torch.testing.assert_close(method.embed_texts(others), method.embed_texts(text))


def run_config(encoder, **settings):
    return RunConfig(method=simcse.Config(**settings), text_encoder=TextEncoderConfig(**encoder))


BERT = {"name": "bert"}


@pytest.mark.parametrize(
    ("encoder", "settings", "message"),
    [
        (
            {},
            {},
            "method.texts: sentences makes the two embeddings of a sentence differ by dropout, and "
            "text_encoder.name=clip with text_encoder.dropout=0.1 has none; set "
            "text_encoder.name=bert and text_encoder.dropout=0.1",
        ),
        (
            {"name": "bert", "dropout": 0.0},
            {},
            "method.texts: sentences makes the two embeddings of a sentence differ by dropout, and "
            "text_encoder.name=bert with text_encoder.dropout=0 has none; set "
            "text_encoder.name=bert and text_encoder.dropout=0.1",
        ),
        (
            BERT,
            {"encoders": "separate"},
            "method.encoders: separate needs two texts per item, and method.texts is sentences; "
            "set method.texts=pairs",
        ),
        (
            BERT,
            {"texts": "pairs", "hard_negative_weight": 1.0},
            "method.hard_negative_weight: 1 needs hard negatives, and method.texts is pairs; set "
            "method.texts=triplets",
        ),
        (
            BERT,
            {"projector": "none", "evaluation_output": "projected"},
            "method.evaluation_output: projected needs a projector, and method.projector is none; "
            "set method.projector=tanh",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(encoder, settings, message):
    run = run_config(encoder, **settings)
    with pytest.raises(ValueError) as error:
        run.method.check(run, 1)
    assert str(error.value) == message


def test_the_wrong_number_of_texts_is_refused():
    with pytest.raises(ValueError) as error:
        build({"texts": "pairs"})(random_batch(METHOD))
    assert str(error.value) == (
        "simcse: method.texts=pairs takes 2 texts per item, got 1; set data.text_columns"
    )
