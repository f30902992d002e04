"""Choose the columns of images, labels and captions of a table, by their types and names."""

from collections.abc import Collection, Mapping
from typing import Any

from ssl_pretrain.data.caption_texts import CAPTION_COLUMNS, NO_CAPTIONS
from ssl_pretrain.data.formats.array_choice import NO_LABELS
from ssl_pretrain.data.messages import abbreviate

IMAGE_COLUMNS = ("image", "img", "pixel_values")  # usual names
LABEL_COLUMNS = ("label", "fine_label")
_TEXTS = "list of strings"  # type of a column with several captions per row
_TEXT_KINDS = ("string", "large_string", "string_view", _TEXTS)


def column_kind(feature: Any) -> str:
    """Return the type of a column: Image, ClassLabel, bytes, values, or that of its values.

    A list of strings has a type of its own.
    """
    if isinstance(feature, Mapping):
        is_file = {"bytes", "path"} <= set(feature)
        return "bytes" if is_file else "dict"
    name = type(feature).__name__
    if name == "Value":
        return "bytes" if "binary" in feature.dtype else str(feature.dtype)
    items = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if str(getattr(items, "dtype", "")) in _TEXT_KINDS:
        return _TEXTS
    return "values" if name in ("Array2D", "Array3D", "List", "Sequence") else name


def choose_image_column(kinds: Mapping[str, str], wanted: str, name: str) -> str:
    """Return the column of the images.

    Args:
        kinds: Type of each column, as `column_kind` returns it.
        wanted: The setting `data.image_column`, or an empty string to find the column.
        name: Name of the data set, for messages.

    Raises:
        ValueError: If the column is missing or contains no images, or several ones may be meant.
    """
    described = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    if wanted and wanted not in kinds:
        raise ValueError(f"data.image_column: {name} has no column {wanted!r}; it has {described}")
    if wanted and kinds[wanted] not in ("Image", "bytes", "values"):
        raise ValueError(
            f"data.image_column: the column {wanted!r} of {name} contains {kinds[wanted]} values, "
            f"not images; the columns are {described}"
        )
    if wanted:
        return wanted
    columns = [column for column, kind in kinds.items() if kind == "Image"]
    usual = [column for column in IMAGE_COLUMNS if column in columns]
    if not columns:
        is_usable = {"bytes", "values"}.__contains__
        usual = [column for column in IMAGE_COLUMNS if is_usable(kinds.get(column, ""))]
        columns = [column for column, kind in kinds.items() if kind == "bytes"]
    if usual or len(columns) == 1:
        return (usual or columns)[0]
    if columns:
        raise ValueError(
            f"data.image_column: several columns of {name} contain images "
            f"({abbreviate(columns)}); choose one, as in data.image_column={columns[0]}"
        )
    raise ValueError(
        f"data.image_column: no column of {name} contains images ({described}); give the column of "
        "encoded images, or cast it with dataset.cast_column('image', datasets.Image())"
    )


def choose_label_column(kinds: Mapping[str, str], wanted: str, image_column: str, name: str) -> str:
    """Return the column of the labels, or an empty string if there is none.

    Args:
        kinds: Type of each column, as `column_kind` returns it.
        wanted: The setting `data.label_column`, or an empty string to find the column.
        image_column: The column of the images.
        name: Name of the data set, for messages.

    Raises:
        ValueError: If the column is missing, or several ones may be meant.
    """
    if wanted == NO_LABELS:
        return ""
    if wanted and wanted not in kinds:
        raise ValueError(
            f"data.label_column: {name} has no column {wanted!r}; it has {', '.join(kinds)}"
        )
    if wanted:
        return wanted
    columns = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    usual = [column for column in LABEL_COLUMNS if column in kinds and column != image_column]
    if usual or len(columns) <= 1:
        return (usual or columns or [""])[0]
    raise ValueError(
        f"data.label_column: several columns of {name} contain labels ({abbreviate(columns)}); "
        f"choose one, as in data.label_column={columns[0]}, or set data.label_column=none"
    )


def choose_caption_column(
    kinds: Mapping[str, str], wanted: str, other_columns: Collection[str], name: str
) -> str:
    """Return the column of the captions, or an empty string if there is none.

    Args:
        kinds: Type of each column, as `column_kind` returns it.
        wanted: The setting `data.caption_column`, or an empty string to find the column.
        other_columns: Columns with another meaning, where no captions are looked for.
        name: Name of the data set, for messages.

    Raises:
        ValueError: If the column is missing or contains no text.
    """
    if wanted == NO_CAPTIONS:
        return ""
    described = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    if wanted and wanted not in kinds:
        raise ValueError(
            f"data.caption_column: {name} has no column {wanted!r}; it has {described}; choose one "
            "of them, or set data.caption_column=none"
        )
    if wanted and kinds[wanted] not in _TEXT_KINDS:
        raise ValueError(
            f"data.caption_column: the column {wanted!r} of {name} contains {kinds[wanted]} "
            f"values, not texts; the columns are {described}"
        )
    if wanted:
        return wanted
    columns = [column for column in CAPTION_COLUMNS if kinds.get(column) in _TEXT_KINDS]
    return next((column for column in columns if column not in other_columns), "")
