"""Texts become tokens of a fixed length, with CLIP's tokenizer and with those of transformers."""

import pickle

import numpy as np
import pytest

from ssl_pretrain.views import text_recipe, tokenizers
from ssl_pretrain.views.text_recipe import TextConfig

START, END = 49406, 49407


@pytest.fixture
def clip_tokenizer():
    pytest.importorskip("open_clip")
    return tokenizers.build(TextConfig(length=8))


def test_a_text_begins_and_ends_with_tokens_of_its_own(clip_tokenizer):
    ids, valid = clip_tokenizer(["a photo of a cat", ""])
    assert ids[0].tolist() == [
        START,
        320,
        1125,
        539,
        320,
        2368,
        END,
        0,
    ]
    assert ids[1].tolist() == [START, END, *[0] * 6]
    assert valid.tolist() == [[True] * 7 + [False], [True] * 2 + [False] * 6]
    assert ids.dtype == np.int32


def test_a_long_text_is_cut_and_keeps_its_end(clip_tokenizer):
    ids, valid = clip_tokenizer(["cat " * 100])
    assert ids[0].tolist() == [START, *[2368] * 6, END]
    assert valid.all()


def test_case_and_spaces_do_not_matter_to_clip(clip_tokenizer):
    ids, _ = clip_tokenizer(["A  Photo\nof &amp; a CAT", "a photo of & a cat"])
    assert np.array_equal(ids[0], ids[1])


def test_a_tokenizer_is_picklable(clip_tokenizer):
    copy = pickle.loads(pickle.dumps(clip_tokenizer))
    assert np.array_equal(copy(["two cats"]).ids, clip_tokenizer(["two cats"]).ids)


def test_the_vocabulary_is_that_of_the_tokenizer(clip_tokenizer):
    assert tokenizers.vocabulary_size(TextConfig()) == clip_tokenizer._tokenizer.vocab_size


def save_word_pieces(folder):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "##s", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_of_transformers_is_read_from_its_folder(tmp_path):
    config = TextConfig(tokenizer=save_word_pieces(tmp_path), length=6)
    tokenizer = tokenizers.build(config)
    ids, valid = tokenizer(["a cats", "dog dog dog dog dog dog"])
    assert ids.tolist() == [[2, 4, 5, 7, 3, 0], [2, 6, 6, 6, 6, 3]]
    assert valid.tolist() == [[True] * 5 + [False], [True] * 6]
    assert tokenizers.vocabulary_size(config) == 9


def test_a_tokenizer_that_does_not_exist_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError) as error:
        tokenizers.build(TextConfig(tokenizer=str(tmp_path / "absent")))
    message = str(error.value)
    assert message.startswith(f"text.tokenizer: {str(tmp_path / 'absent')!r} cannot be loaded (")
    assert message.endswith(
        "; give clip, the name of a tokenizer on the Hugging Face Hub, or a folder with a tokenizer"
    )


def test_templates_need_one_place_for_the_class():
    text_recipe.check(TextConfig(templates=["a {}.", "{} in {braces}"]))
    with pytest.raises(ValueError) as error:
        text_recipe.check(TextConfig(templates=["a photo."]))
    assert str(error.value) == (
        "text.templates: 'a photo.' must contain {} once, in place of the class, as in "
        "'a photo of a {}.'"
    )
    with pytest.raises(ValueError) as error:
        text_recipe.check(TextConfig(templates=[]))
    assert str(error.value) == (
        "text.templates: no template is given; give at least one, such as 'a photo of a {}.'"
    )


def test_templates_are_filled():
    config = TextConfig(templates=["a {}.", "the {}, {braces}"])
    assert text_recipe.fill_templates(config, "cat") == ["a cat.", "the cat, {braces}"]
