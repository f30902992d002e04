"""Text encoders: pooling, padding, causality, and networks that do not fit the texts."""

import pytest
import torch

from ssl_pretrain.models import text_encoders
from ssl_pretrain.models.text_encoders import TextEncoderConfig

pytest.importorskip("open_clip")

SMALL = {"width": 16, "layers": 2, "heads": 2}
VOCABULARY_SIZE, LENGTH = 30, 8


def build(**settings):
    torch.manual_seed(0)
    return text_encoders.build(
        TextEncoderConfig(**{**SMALL, **settings}), VOCABULARY_SIZE, LENGTH
    ).eval()


def texts(*lengths):
    """Return random tokens of texts with these lengths, padded with 0."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY_SIZE, (len(lengths), LENGTH), generator=generator)
    valid = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    return ids * valid, valid


def build_bert(**settings):
    pytest.importorskip("transformers")
    return build(name="bert", **settings)


@pytest.mark.parametrize(
    ("pool", "position"), [("end", 2), ("first", 0), ("last", LENGTH - 1), ("auto", 2)]
)
def test_the_vector_is_that_of_one_token(pool, position):
    encoder, (ids, valid) = build(pool=pool), texts(3)
    assert torch.equal(encoder(ids, valid), encoder.model(ids, valid)[:, position])


def test_the_mean_leaves_out_padding():
    encoder, (ids, valid) = build(pool="mean"), texts(3, 8)
    vectors = encoder.model(ids, valid)
    expected = torch.stack([vectors[0, :3].mean(0), vectors[1].mean(0)])
    torch.testing.assert_close(encoder(ids, valid), expected)


@pytest.mark.parametrize("build_encoder", [build, build_bert])
def test_tokens_after_the_end_change_nothing(build_encoder):
    encoder, (ids, valid) = build_encoder(), texts(3)
    other = torch.where(valid, ids, 7)
    torch.testing.assert_close(encoder(ids, valid), encoder(other, valid))


def test_without_a_causal_mask_later_tokens_count():
    ids, valid = texts(8)
    other = ids.clone()
    other[0, 6] = (other[0, 6] + 1) % VOCABULARY_SIZE
    causal, bidirectional = build(pool="first"), build(pool="first", causal=False)
    assert torch.equal(causal(ids, valid), causal(other, valid))
    assert not torch.allclose(bidirectional(ids, valid), bidirectional(other, valid))


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_an_encoder_has_one_unit_per_block_and_a_form_without_weights(name):
    if name == "bert":
        pytest.importorskip("transformers")
    config = TextEncoderConfig(name=name, **SMALL)
    encoder = text_encoders.build_on_meta(config, VOCABULARY_SIZE, LENGTH)
    assert len(encoder.blocks()) == 2
    ids, valid = (tensor.to("meta") for tensor in texts(3, 4))
    assert encoder(ids, valid).shape == (2, 16)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError) as error:
        build(heads=3)
    assert str(error.value) == (
        "text_encoder.heads: 3 heads do not divide text_encoder.width 16; give a divisor, such as 1"
    )


def test_an_unknown_network_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError) as error:
        build(name=str(tmp_path / "absent"))
    message = str(error.value)
    assert message.startswith(f"text_encoder.name: {str(tmp_path / 'absent')!r} cannot be loaded (")
    assert message.endswith(
        "; give clip, bert, the name of a model on the Hugging Face Hub, or its folder"
    )


def test_a_network_with_too_few_positions_or_tokens_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert_config = transformers.BertConfig(
        vocab_size=VOCABULARY_SIZE, max_position_embeddings=LENGTH, **settings
    )
    transformers.BertModel(bert_config).save_pretrained(tmp_path)
    config = TextEncoderConfig(name=str(tmp_path))
    assert text_encoders.build(config, VOCABULARY_SIZE, LENGTH).feature_dim == 16
    with pytest.raises(ValueError) as error:
        text_encoders.build(config, VOCABULARY_SIZE, LENGTH + 1)
    assert str(error.value) == (
        f"text.length: 9 tokens are more than the 8 of text_encoder.name {tmp_path}; give at most 8"
    )
    with pytest.raises(ValueError) as error:
        text_encoders.build(config, VOCABULARY_SIZE + 1, LENGTH)
    assert str(error.value) == (
        f"text.tokenizer: it has 31 tokens, and text_encoder.name {tmp_path} knows 30; set "
        f"text.tokenizer to {tmp_path}"
    )


@pytest.mark.parametrize("model_type", ["distilbert", "roberta", "electra"])
def test_other_encoders_are_read_from_their_folder(model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.AutoConfig.for_model(model_type)
    for name in ("dim", "hidden_size", "embedding_size", "hidden_dim", "intermediate_size"):
        if hasattr(settings, name):
            setattr(settings, name, 16)
    for name in ("n_layers", "num_hidden_layers"):
        if hasattr(settings, name):
            setattr(settings, name, 1)
    for name in ("n_heads", "num_attention_heads"):
        if hasattr(settings, name):
            setattr(settings, name, 2)
    settings.vocab_size, settings.max_position_embeddings = VOCABULARY_SIZE, 32
    transformers.AutoModel.from_config(settings).save_pretrained(tmp_path)
    config = TextEncoderConfig(name=str(tmp_path), dropout=0.25)
    encoder, random = (
        make(config, VOCABULARY_SIZE, LENGTH).eval()
        for make in (text_encoders.build, text_encoders.build_random)
    )
    ids, valid = texts(3, 8)
    assert encoder(ids, valid).shape == (2, 16)
    assert {module.p for module in encoder.modules() if hasattr(module, "p")} <= {0.25, 0.0}
    assert not torch.allclose(encoder(ids, valid), random(ids, valid))
    other = torch.where(valid, ids, 7)
    torch.testing.assert_close(encoder(ids, valid)[0], encoder(other, valid)[0])


def test_a_decoder_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY_SIZE)
    transformers.GPT2Model(settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        text_encoders.build(TextEncoderConfig(name=str(tmp_path)), VOCABULARY_SIZE, LENGTH)
    assert str(error.value) == (
        f"text_encoder.name: {tmp_path} is a model of the type gpt2, and only encoders of texts "
        f"are supported; choose one of: {', '.join(text_encoders.ENCODERS)}"
    )
