"""Definitions and example sentences of WordNet, in the files of Debian's package wordnet-base.

Miller, Communications of the ACM 1995. A line of `data.noun` describes a synset: its words, then a
gloss with the definition and, for 28 % of the synsets, examples in quotation marks. A tenth of the
synsets with examples is for validation. It is chosen by a hash of the part of speech and the
synset's number, and so does not depend on the order or on the other synsets.

An example usually contains the word that the definition explains, and a definition rarely does. To
find the definition of an example therefore takes more than counting shared words. The texts are:

| column | text |
|---|---|
| `example` | the example sentences, as alternatives |
| `definition` | the definition |
| `words` | the words of the synset, as alternatives |
| `entry` | the words and the definition, as in "car, auto: a motor vehicle with four wheels" |
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.file_dataset import SplitName
from ssl_pretrain.data.texts.text_formats import DamagedRecord, Record
from ssl_pretrain.data.texts.text_source import TextFile, TextsInFiles

DEFAULT_ROOT = "/usr/share/wordnet"
COLUMNS = ("example", "definition", "words", "entry")
DEFAULT_COLUMNS = ("example", "definition")
_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_VAL_SHARE = 0.1
# Names of WordNet's lexicographer files by their number (lexnames(5WN)), the classes of synsets.
CLASSES = [
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact"),
    *("noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event"),
    *("noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object"),
    *("noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process"),
    *("noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time"),
    *("verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition"),
    *("verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather"),
    "adj.ppl",
]
_MARKER = re.compile(r"\((a|p|ip)\)$")  # position of an adjective, as in "galore(ip)"
_EXAMPLES_START = re.compile(r"\s*[;:,.]\s*(?=\")|(?<=\))\s*(?=\")")


@dataclass(frozen=True)
class Synset:
    """A set of words with the same meaning.

    Attributes:
        key: Part of speech and number, as in "n02958343".
        category: Number of its lexicographer file.
        words: Its words, with spaces.
        definition: Definition.
        examples: Example sentences.
    """

    key: str
    category: int
    words: list[str]
    definition: str
    examples: list[str]

    @property
    def is_val(self) -> bool:
        """True if the synset is for validation."""
        number = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big")
        return bool(self.examples) and number < _VAL_SHARE * 2**64

    def text(self, column: str) -> list[str]:
        """Return the alternatives of a text."""
        if column == "example":
            return self.examples
        if column == "words":
            return self.words
        is_entry = column == "entry"
        return [f"{', '.join(self.words)}: {self.definition}" if is_entry else self.definition]


def parse_synset(line: str) -> Synset:
    """Parse a line of a data file (wndb(5WN)).

    Raises:
        DamagedRecord: If the line does not describe a synset.
    """
    head, separator, gloss = line.partition(" | ")
    fields = head.split(" ")
    try:
        number, category, kind = fields[0], int(fields[1]), fields[2]
        num_words = int(fields[3], 16)
    except (IndexError, ValueError):
        separator = ""
    if not separator:
        raise DamagedRecord(
            f"is {line[:40].strip()!r}..., not a synset of WordNet 3; install the files again"
        )
    words = [_MARKER.sub("", word).replace("_", " ") for word in fields[4 : 4 + 2 * num_words : 2]]
    kind = "a" if kind == "s" else kind  # a satellite is an adjective
    return Synset(f"{kind}{number}", category, words, *split_gloss(gloss))


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """Return the definition and the examples of a gloss."""
    gloss = gloss.strip()
    match = _EXAMPLES_START.search(gloss)
    if match is None:
        return gloss.rstrip(" ;"), []
    examples = re.findall(r'"([^"]+)"', gloss[match.end() :])
    return gloss[: match.start()].strip(), [
        text for example in examples if (text := example.strip(" ;,"))
    ]


@dataclass(frozen=True)
class SynsetFormat:
    """Lines of a data file that describe the synsets of one split."""

    columns: tuple[str, ...]
    is_val: bool

    @property
    def num_texts(self) -> int:
        """Number of texts per synset."""
        return len(self.columns)

    def records(self, lines: Iterable[str]) -> Iterator[Record | None]:
        """Yield the synsets of the split, and None for the license and other synsets."""
        for line in lines:
            synset = None if line.startswith("  ") else parse_synset(line)
            if synset is None or synset.is_val != self.is_val:
                yield None
            else:
                texts = [synset.text(column) for column in self.columns]
                yield Record(texts, CLASSES[synset.category])


def open_wordnet(config: DataConfig, split: SplitName) -> TextsInFiles:
    """Open the synsets of a split that have all texts of `data.text_columns`.

    Raises:
        ValueError: If the files are absent, or a column is unknown.
    """
    columns = tuple(config.text_columns) or DEFAULT_COLUMNS
    if unknown_columns := [column for column in columns if column not in COLUMNS]:
        raise ValueError(
            f"data.text_columns: WordNet has no column {unknown_columns[0]!r}; choose among: "
            f"{', '.join(COLUMNS)}"
        )
    root = Path(config.root or DEFAULT_ROOT).expanduser()
    paths = [root / f"data.{suffix}" for suffix in _PARTS_OF_SPEECH]
    if missing_paths := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"data.root: {missing_paths[0]} does not exist; install WordNet with "
            "`apt-get install wordnet-base`, or give the folder with its data.noun in data.root"
        )
    text_format = SynsetFormat(columns, split == "val")
    source = TextsInFiles(str(root), [TextFile(path, text_format) for path in paths], CLASSES)
    source.notes = [
        f"{len(source):,} synsets of WordNet have the texts {' and '.join(columns)} and are in the "
        f"{split} split"
    ]
    return source
