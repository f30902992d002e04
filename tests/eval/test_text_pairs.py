"""Retrieval of the second texts of pairs: ranks by brute force, groups, columns and refusals."""

import json

import numpy as np
import pytest
import sentence_run
import torch
from untrained_run import make_run

import ssl_pretrain
from ssl_pretrain.eval import runs, text_pairs
from ssl_pretrain.eval.frozen import sentences
from ssl_pretrain.eval.trained_run import load_sentence_run
from ssl_pretrain.system import program

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sentence_run.train_run(tmp_path_factory.mktemp("pairs"))


def read_pairs(run):
    lines = (run.path.parent / "texts" / "dev.tsv").read_text().splitlines()[1:]
    return tuple(zip(*(line.split("\t") for line in lines)))


def scores_of(similarities):
    """Count, for each query i, the candidates that are as similar as the correct one, i."""
    ranks = np.array([sum(row >= row[i]) for i, row in enumerate(similarities)])
    recalls = {f"recall@{k}": 100 * np.mean(ranks <= k) for k in (1, 5, 10)}
    return recalls | {"MRR": 100 * np.mean(1 / ranks)}


def error_of(function, *arguments, **settings):
    with pytest.raises(ValueError) as error:
        function(*arguments, **settings)
    return str(error.value)


def test_the_scores_are_those_of_the_cosines_of_all_pairs(run):
    result = text_pairs.evaluate(run)
    rows = {row["features"]: row for row in result["rows"]}
    assert list(rows) == [*text_pairs.BASELINES, "random, as built", "pretrained"]
    for name in ("random, as built", "pretrained"):
        encoder = sentences.build_encoder(run, is_pretrained=name == "pretrained")
        first, second = (
            [encoder.embed([text])[0].double().numpy() for text in texts]
            for texts in read_pairs(run)
        )
        cosines = [[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in second] for a in first]
        assert rows[name]["metrics"] == pytest.approx(scores_of(np.array(cosines)))
    share = rows["pretrained"]["metrics"]["recall@1"] / 100
    deviation = 100 * (share * (1 - share) / 43) ** 0.5
    assert rows["pretrained"]["spread"]["recall@1"] == pytest.approx(deviation)
    assert rows["pretrained"]["metrics"]["MRR"] > rows["random, as built"]["metrics"]["MRR"]
    saved = json.loads((run.path / "eval" / "text_pairs.json").read_text())
    assert saved["protocol"]["pairs"] == (
        f"{run.path.parent}/texts/dev.tsv: 44 held-out items, 44 queries, at most 1 per item, and "
        "44 different candidates"
    )


def test_dense_retrieval_compares_dot_products_of_two_encoders(tmp_path):
    run = sentence_run.train_run(
        tmp_path, "method.encoders=separate", "method.similarity=dot", "method.temperature=1"
    )
    method = sentences.build_encoder(run).method
    tokenize = sentences.build_encoder(run).tokenize
    first, second = read_pairs(run)

    def embed(encoder, texts):
        tokens = tokenize(texts)
        with torch.no_grad():
            return encoder(torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.valid))

    products = embed(method.backbone, first) @ embed(method.second_encoder, second).T
    result = text_pairs.evaluate(run)
    assert result["rows"][-1]["metrics"] == pytest.approx(scores_of(products.numpy()))
    assert result["protocol"]["ranking"].startswith("by the dot of embeddings; ")


class Items:
    """Items with alternatives. The last two share a second text."""

    items = (
        (["a", "b", "c"], ["x", "y"]),
        (["d"], ["z"]),
        (["e", "f"], ["z", "w"]),
    )
    num_texts = 2

    def __len__(self):
        return len(self.items)

    def texts(self, index):
        return [*self.items[index], ["hard negative"]]


def test_items_with_equal_second_texts_are_correct_for_each_other():
    pairs = text_pairs.collect_pairs(Items())
    assert pairs.queries == ["a", "d", "e"]
    assert pairs.candidates == ["x", "y", "z", "w"]
    first, second, third = pairs.query_groups.tolist()
    assert second == third != first
    assert pairs.candidate_groups.tolist() == [first, first, second, second]
    similarities = torch.tensor([[1.0, 9, 5, 2], [1, 2, 3, 4], [7, 8, 5, 6]])
    scores = pairs.score(lambda rows: similarities[rows])
    assert scores.values["recall@1"] == pytest.approx(200 / 3)
    assert scores.values["MRR"] == pytest.approx(100 * (1 + 1 + 1 / 3) / 3)


def test_other_texts_are_wrong_candidates():
    pairs = text_pairs.collect_pairs(Items())
    more = pairs.with_distractors(["x", "n", "w", "n", "m"])
    assert more.candidates == ["x", "y", "z", "w", "n", "m"]
    assert len(set(more.candidate_groups.tolist())) == 4
    assert torch.equal(more.candidate_groups[:4], pairs.candidate_groups)


def test_alternatives_are_queries_up_to_a_limit():
    pairs = text_pairs.collect_pairs(Items(), queries_per_item=2)
    assert pairs.queries == ["a", "b", "d", "e", "f"]
    groups = pairs.query_groups.tolist()
    assert groups[0] == groups[1] and len(set(groups)) == 2


def test_second_texts_of_the_training_split_give_the_weights():
    assert sorted(text_pairs.read_second_texts(Items(), 10)) == ["w", "x", "y", "z", "z"]
    assert len(text_pairs.read_second_texts(Items(), 1)) < 3


def test_a_run_of_sentences_is_evaluated_on_pairs_that_an_override_names(tmp_path, capsys):
    sentence_run.train_run(
        *(tmp_path, "method.texts=sentences", "method.projector=tanh"),
        *("text_encoder.dropout=0.1", "data.text_columns=[sent0]"),
    )
    single = load_sentence_run(tmp_path / "run", device="cpu")
    assert error_of(text_pairs.evaluate, single) == (
        f"data.text_columns: the items of {tmp_path}/texts/dev.tsv have 1 text, and pairs need two"
        "; name the columns of two texts, as in data.text_columns=[example,definition], or give a "
        "file of pairs in data.val"
    )
    columns = "data.text_columns=[sent0,sent1]"
    text_pairs.main([str(tmp_path / "run"), columns, "--device", "cpu"])
    assert "pretrained" in capsys.readouterr().out


def test_evaluations_of_images_refuse_a_run_of_sentences(run):
    sts, pairs, knn = (f"ssl_pretrain.eval.{name}" for name in ("sts", "text_pairs", "knn"))
    message = (
        f"{run.path}: method simcse learns from sentences and has no network of images; evaluate "
        f"it with `{program.format_command(sts, run.path)}` or "
        f"`{program.format_command(pairs, run.path)}`"
    )
    assert error_of(runs.load_run, run.path) == message
    assert error_of(ssl_pretrain.Run(run.path).evaluate, "knn") == message
    assert knn not in message


def test_evaluations_of_sentences_refuse_a_run_of_images(tmp_path):
    folder = make_run(tmp_path / "run")
    message = (
        f"{folder}: sts and text_pairs need a method of sentences, and simclr learns from images; "
        "evaluate a run of simcse, or this run with "
        f"`{program.format_command('ssl_pretrain.eval.knn', folder)}`"
    )
    assert error_of(load_sentence_run, folder) == message
    assert error_of(ssl_pretrain.Run(folder).evaluate, "text_pairs") == message


def test_embeddings_that_are_not_finite_are_refused(run):
    encoder = sentences.build_encoder(run)
    with torch.no_grad():
        for weight in encoder.method.parameters():
            weight.fill_(torch.nan)
    assert error_of(encoder.embed, ["a red cat", "a dog"]) == (
        "2 of 2 embeddings of the sentences are not finite; evaluate an earlier checkpoint"
    )


def test_embeddings_do_not_depend_on_the_batches(run, monkeypatch):
    encoder, (first, _) = sentences.build_encoder(run), read_pairs(run)
    whole = encoder.embed(first)
    monkeypatch.setattr(sentences, "TEXTS_PER_BATCH", 7)
    torch.testing.assert_close(encoder.embed(first), whole)
    torch.testing.assert_close(encoder.embed(first[::-1]), whole.flip(0))


def test_a_method_without_embed_texts_is_refused(run, monkeypatch):
    monkeypatch.setattr(sentences.run_method, "build_method", lambda *_: torch.nn.Identity())
    assert error_of(text_pairs.evaluate, run) == (
        f"{run.path}: method simcse has no function embed_texts(text, *, second), which "
        "evaluations of sentences call; add it, as in methods/simcse.py"
    )


def test_the_evaluation_is_available_in_python(run):
    evaluation = ssl_pretrain.Run(run.path).evaluate("text_pairs", queries_per_item=2)
    assert evaluation.measure == "%"
    assert evaluation.table["pretrained"]["recall@10"] > 50
    assert evaluation.path.name == "text_pairs.json"
