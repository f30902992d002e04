"""Find the training and the validation split of a data set.

`data.train` and `data.val` name them. Where these are empty the names at the top decide (train, training; val, valid, validation,
dev; test; in any case), below any folders that wrap the data set. What looks like splits by other names or by its structure
is refused, as held-out images would be trained on.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ssl_pretrain.data import listing
from ssl_pretrain.data.file_lists import open_list, role
from ssl_pretrain.data.listing import Listing

NONE = "none"  # data.val: there is no validation split
_WORDS = {
    "train": re.compile(r"train(ing|set|val|imgs?|images?|data)?|trn"),
    "held out": re.compile(
        r"(val|valid|validation|dev|test|testing|eval|evaluation|holdout|heldout)(set|imgs?|images?|data)?"
    ),
}
_RECORDS = frozenset(
    {"log", "logs", "loss", "losses", "metrics", "result", "results"}
)  # words of tables that list no images
_DEEPEST_WRAPPER = 6
_CHECKED = 50  # folders of one folder that are looked into for splits of their own
_CHECKED_FOLDERS = 500  # the same, of all folders
_CHECKED_FILES = 1000  # names of images in one folder that are looked at
_FEW = 10  # among so many folders one may be named like a split by chance, as a class `bullet_train` is


def looks_like(name: str) -> str | None:
    """Return "train" or "held out" if a word of the name says so, as in `train2017` or `images_val`."""
    return next(
        (kind for kind, pattern in _WORDS.items() if any(map(pattern.fullmatch, _words(name)))),
        None,
    )


def _words(name: str) -> list[str]:
    """The words of a name without its suffix, in lower case."""
    return [
        word.lower()
        for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", os.path.splitext(name)[0])
    ]


@dataclass(frozen=True)
class Place:
    """Where a split is: a folder, a zip, a folder `within` a zip, or a list file. `without` names folders of it that are not read."""

    path: Path
    within: str = ""
    without: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return os.path.join(self.path, self.within) if self.within else str(self.path)

    @property
    def is_list(self) -> bool:
        return self.path.suffix.lower() in listing.TABLES and not self.path.is_dir()


@dataclass(frozen=True)
class Splits:
    """The splits of a data set. `train_error` and `val_error` say why there is none, with the remedy."""

    train: Place | None
    val: Place | None
    val_role: str = "val"  # "test" where the test images are the only ones held out
    train_error: str = ""
    val_error: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """The files of a split, their labels as a list gives them (None for folders), and notes on how they were found."""

    files: Listing
    written: list[str] | None
    notes: tuple[str, ...] = ()


class Folder:
    """Content of a folder, without what `listing.is_skipped` names."""

    def __init__(self, path: Path):
        self.path = path
        self.where = str(path)

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    kind = listing.kind_of(entry)
                    if kind in ("folder", "file"):
                        (folders if kind == "folder" else files).append(entry.name)
        except OSError as error:
            raise ValueError(f"data.root: {self.path} cannot be listed: {error.strerror}") from None
        return sorted(folders, key=os.fsencode), sorted(files, key=os.fsencode)

    @property
    def folders(self) -> list[str]:
        return self._entries[0]

    @property
    def files(self) -> list[str]:
        return self._entries[1]

    def child(self, name: str) -> Folder:
        return Folder(self.path / name)

    def parent(self) -> Folder:
        return Folder(self.path.parent)

    @cached_property
    def has_images_beside(self) -> bool:
        return any(map(listing.is_image, self.files)) or listing.holds_images_by_content(
            self.path, self.files
        )

    def has_images(self, depth: int = 12) -> bool:
        """Return True if there is an image at any depth. Reads no further than the first one."""
        return self.has_images_beside or (
            depth > 0 and any(self.child(name).has_images(depth - 1) for name in self.folders)
        )

    def place(self, without: tuple[str, ...] = ()) -> Place:
        return Place(self.path, "", without)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Archive:
    """Content of a folder of a zip, with the interface of `Folder`."""

    def __init__(self, path: Path, index: dict[str, tuple[list[str], list[str]]], within: str = ""):
        self.path, self.within, self._index = path, within, index
        self.where = os.path.join(path, within) if within else str(path)

    @property
    def folders(self) -> list[str]:
        return self._index.get(self.within, ([], []))[0]

    @property
    def files(self) -> list[str]:
        return self._index.get(self.within, ([], []))[1]

    def child(self, name: str) -> Archive:
        return Archive(self.path, self._index, os.path.join(self.within, name))

    def parent(self) -> Archive:
        return Archive(self.path, self._index, os.path.dirname(self.within))

    @property
    def has_images_beside(self) -> bool:
        return any(not name.lower().endswith(listing.TABLES) for name in self.files)

    def has_images(self) -> bool:
        """Return True if there is an image at any depth."""
        return self.has_images_beside or any(self.child(name).has_images() for name in self.folders)

    def place(self, without: tuple[str, ...] = ()) -> Place:
        return Place(self.path, self.within, without)

    def read(self, name: str) -> bytes:
        return listing.read_member(self.path, os.path.join(self.within, name))


def _index(paths: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Names of the folders and of the files in each folder of an archive, as {path: (folders, files)}."""
    files: dict[str, list[str]] = {"": []}
    for path in paths:
        folder, _, name = path.rpartition("/")
        files.setdefault(folder, []).append(name)
    folders: dict[str, set[str]] = {"": set()}
    for folder in files:
        while folder:
            above, _, name = folder.rpartition("/")
            folders.setdefault(folder, set())
            folders.setdefault(above, set()).add(name)
            folder = above
    return {
        folder: (
            sorted(folders[folder], key=os.fsencode),
            sorted(files.get(folder, []), key=os.fsencode),
        )
        for folder in folders
    }


Tree = Folder | Archive


def tree(root: Path, cache: Path) -> Tree:
    """Return the folder or zip at `root`, or the folder that holds a list."""
    if root.suffix.lower() == ".zip" and root.is_file():
        files = listing.of_zip(root, cache)
        return Archive(root, _index([*files.paths(), *files.tables]))
    return Folder(root if root.is_dir() else root.parent)


def inner(folder: Tree, within: str) -> Tree:
    """Return a folder at any depth below another."""
    for name in within.split("/"):
        folder = folder.child(name)
    return folder


def content(place: Place, split: str, cache: Path, key: str, root: Path) -> Content:
    """The files of a split. The paths in a list may be relative to `root`, the data set's folder."""
    if place.is_list:
        found = open_list(place.path, split, cache, key, root if root.is_dir() else None)
        return Content(found.files, found.labels, found.notes)
    if not place.path.is_dir() and place.path.suffix.lower() != ".zip":
        raise ValueError(
            f"{key}: {place.path} is neither a folder, a .zip, nor a list of files (.csv, .tsv, .txt)"
        )
    files = (
        listing.of_folder(place.path, cache)
        if place.path.is_dir()
        else listing.of_zip(place.path, cache)
    )
    if place.within or place.without:
        prefix = f"{place.within}/" if place.within else ""
        without = tuple(f"{prefix}{name}/" for name in place.without)
        paths = files.paths()
        chosen = [
            i
            for i, path in enumerate(paths)
            if path.startswith(prefix) and not path.startswith(without or ("/",))
        ]
        if len(chosen) < len(files) or place.within:
            files = files.take(chosen, place.within)
    return Content(files, None)


def locate(root: Path, train: str, val: str, cache: Path) -> Splits:
    """Find the splits of a data set.

    Args:
        root: A folder, a zip or a list file.
        train: The training split: a folder, list or zip, absolute or below root; "." for root itself; "" to find it by its name.
        val: The same for validation; "none" if there is none.
        cache: Folder of the listings.
    """
    base = tree(root, cache)
    if train in (".", "./"):
        splits = Splits(
            Place(root),
            None,
            val_error=f"data.val: {root} has no validation split, as data.train=. takes all of it",
        )
    elif train:
        place = _named(base, train)
        error = f"data.train: {base.where} has no folder or list {train!r}{_instead(base)}; name the one that holds the training images"
        splits = Splits(
            place,
            None,
            train_error="" if place else error,
            notes=[] if val else _inner_note(base, place),
        )
    elif root.is_file() and isinstance(base, Folder):
        splits = Splits(Place(root), None)
    else:
        splits = _found_train(base, val)
    return _with_val(splits, root, base, val, cache)


def _inner_note(base: Tree, train: Place | None) -> list[str]:
    """A note where the folder that is named for training has splits inside."""
    if train is None or _is_file(train):
        return []
    found = _inner_splits(inner(base, train.within) if train.within else Folder(train.path))
    return (
        [
            f"{train.where} has splits inside its folders ({found[0]}/, {found[1]}/), and all of them are for training"
        ]
        if found
        else []
    )


def _with_val(splits: Splits, root: Path, base: Tree, val: str, cache: Path) -> Splits:
    """The splits with the validation split added, and the training split without it."""
    ask = (
        "name the one that holds the validation images, or leave out what needs a validation split"
    )
    if val == NONE:
        return replace(
            splits, val_error=f"data.val: {root} has no validation split, as data.val=none says"
        )
    if val:
        place = _named(base, val)
        error = f"data.val: {base.where} has no folder or list {val!r}{_instead(base)}; {ask}"
        return replace(
            _apart(splits, place),
            val=place,
            val_role=role(Path(val).stem) or "val",
            val_error="" if place else error,
        )
    if splits.val_error:
        return splits
    above = root if root.is_dir() else None
    if (
        splits.train
        and splits.train.is_list
        and open_list(splits.train.path, "train", cache, root=above).by_split
    ):
        return replace(splits, val=splits.train)
    top = _top(base)
    prefer_lists = splits.train is not None and splits.train.is_list
    found = _candidates(top, "val", prefer_lists) or _candidates(top, "test", prefer_lists)
    found = [place for place in found if place != splits.train]
    if len(found) > 1:
        names = " and ".join(os.path.basename(place.where) for place in found)
        which = f"say which has the validation images, as in data.val={os.path.basename(found[0].where)}"
        return replace(splits, val_error=f"data.val: {top.where} holds {names}; {which}")
    if not found:
        absent = f"data.val: {base.where} has no folder or list for validation, such as val/{_instead(base)}"
        return replace(splits, val_error=f"{absent}; {ask}")
    return replace(splits, val=found[0], val_role=role(Path(found[0].where).stem) or "val")


def _apart(splits: Splits, val: Place | None) -> Splits:
    """The training split without a validation split that lies in it."""
    train = splits.train
    if (
        val is None
        or train is None
        or train.is_list
        or val.is_list
        or not val.where.startswith(train.where + os.sep)
    ):
        return splits
    inner = os.path.relpath(val.where, train.where)
    return replace(
        splits, train=replace(train, without=tuple(dict.fromkeys((*train.without, inner))))
    )


def _named(base: Tree, name: str) -> Place | None:
    """Find a folder, list or zip by its name in the configuration: absolute, or below the root or a folder that wraps the data set."""
    path = Path(name).expanduser()
    if path.is_absolute():
        return (
            Place(path)
            if path.is_dir()
            or (path.is_file() and path.suffix.lower() in (*listing.TABLES, ".zip"))
            else None
        )
    name = os.path.normpath(name)
    for folder in _wrappers(base):
        if isinstance(folder, Archive):
            if folder.child(name).has_images():
                return folder.child(name).place()
        elif (folder.path / name).exists():
            return Place(folder.path / name)
    return None


def _wrappers(base: Tree) -> Iterator[Tree]:
    """Yield the root, then the only folder in it that holds images, then the only one in that, and so on."""
    yield base
    for _ in range(_DEEPEST_WRAPPER):
        holding = (
            []
            if base.has_images_beside
            else list(itertools.islice(filter(_holds(base), base.folders), 2))
        )
        if len(holding) != 1:
            return
        base = base.child(holding[0])
        yield base


def _holds(folder: Tree) -> Callable[[str], bool]:
    return lambda name: folder.child(name).has_images()


def _top(base: Tree) -> Tree:
    """The first folder with a training split, behind folders that wrap the data set, whatever these are called.

    Without one, the first folder with names that look like splits, and else the innermost.
    """
    wrappers = list(_wrappers(base))
    for folder in wrappers:
        if any(role(name) == "train" for name in folder.folders) or any(
            _file_role(name) == "train" for name in folder.files
        ):
            return folder
    return next(
        (folder for folder in wrappers if any(map(looks_like, folder.folders))), wrappers[-1]
    )


def _candidates(top: Tree, wanted: str, prefer_lists: bool) -> list[Place]:
    """The folders of a role, or its lists and zips where there is none. `prefer_lists` turns this round."""
    folders = [top.child(name).place() for name in top.folders if role(name) == wanted]
    files = (
        [Place(top.path / name) for name in top.files if _file_role(name) == wanted]
        if isinstance(top, Folder)
        else []
    )
    return (files or folders) if prefer_lists else (folders or files)


def _file_role(name: str) -> str | None:
    stem, suffix = os.path.splitext(name)
    return role(stem) if suffix.lower() in (*listing.TABLES, ".zip") else None


def _found_train(base: Tree, val: str) -> Splits:
    """The training split by its name, or the whole root where nothing in it looks like a split."""
    top = _top(base)
    trains = _candidates(top, "train", prefer_lists=False)
    if len(trains) > 1:
        names = " and ".join(os.path.basename(place.where) for place in trains)
        return _refused(
            f"{top.where} holds {names}; say which has the training images",
            f"data.train={os.path.basename(trains[0].where)}",
        )
    if (
        isinstance(top, Archive)
        and not trains
        and any(_file_role(name) == "train" for name in top.files)
    ):
        return _refused(
            f"{top.where} holds lists of its splits, which are not read inside a zip; unpack it", ""
        )
    if trains and not _is_file(trains[0]):
        return _train_folder(base, top, trains[0], val)
    return Splits(trains[0], None) if trains else _rest(base, top, val)


def _is_file(place: Place) -> bool:
    return not place.within and place.path.is_file()


def _train_folder(base: Tree, top: Tree, train: Place, val: str) -> Splits:
    """A folder called train: a split, unless it may as well be one class of several."""
    name = os.path.basename(train.where)
    others = [other for other in top.folders if other != name]
    alone = not any(role(other) or looks_like(other) or other == val for other in others)
    if (
        alone
        and len(list(itertools.islice(filter(_holds(top.child(name)), top.child(name).folders), 2)))
        < 2
    ):
        beside = list(filter(_holds(top), others))
        if len(beside) + 1 >= _FEW:
            note = f"{train.where} is read as one of {len(beside) + 1} classes; give data.train={name} if it is the training split"
            return Splits(base.place(), None, notes=[note])
        if beside:
            text = f"{top.where} holds {name}/ beside {_names(beside)}, so it may be the training split or one class of several"
            return _refused(f"{text}; say which", f"data.train={name}")
    if inner := _inner_splits(top.child(name)):
        return _refused_inner(top.child(name).where, f"{name}/", inner)
    not_read = [other for other in others if not role(other) and other != val]
    return Splits(
        train, None, notes=[f"not read: {_names(not_read)} in {top.where}"] if not_read else []
    )


def _rest(base: Tree, top: Tree, val: str) -> Splits:
    """No training split by name: all images below the root, without what is held out."""
    held = [name for name in top.folders if role(name) and name != val]
    looking = [name for name in top.folders if not role(name) and looks_like(name) and name != val]
    if not held and not looking:
        return _refused_structure(base, top) or Splits(base.place(), None)
    others = list(
        filter(
            _holds(top),
            (
                name
                for name in top.folders
                if name not in held and name not in looking and name != val
            ),
        )
    )
    if looking and len(looking) * _FEW > len(others) + len(looking):
        train = [f"data.train={name}" for name in looking if looks_like(name) == "train"][:1]
        held_out = [
            f"data.val={name}"
            for name in (*held, *looking)
            if role(name) or looks_like(name) == "held out"
        ][:1]
        text = f"{top.where} holds {_names([*held, *looking])}, which are called like splits; say which is which"
        return _refused(text, " ".join(train + held_out))
    notes = [f"{name}/ is read as one of {len(others) + len(looking)} classes" for name in looking]
    if not held:
        return Splits(base.place(), None, notes=notes)
    if not others and not looking and not top.has_images_beside:
        return _refused(
            f"{top.where} holds {_names(held)} and no training images; say where they are",
            "data.train=FOLDER",
        )
    notes.append(f"{_names(held)} in {top.where} held out; everything else there is for training")
    return Splits(top.place(tuple(held)), None, notes=notes)


def _refused_structure(base: Tree, top: Tree) -> Splits | None:
    """A refusal where folders, lists or images look like splits though nothing at the top is called like one."""
    if inner := _inner_splits(top):
        return _refused_inner(
            top.where, "" if top is base else f"{os.path.relpath(top.where, base.where)}/", inner
        )
    if alike := _alike(top):
        folders, shared = alike
        text = f"{top.where} holds {_names(folders)} with the same folders in each ({_names(shared)}), so they may be splits"
        return _refused(
            f"{text}; say which is which", f"data.train={folders[0]} data.val={folders[1]}"
        )
    for folder in _wrappers(base):
        for above in (folder, *_without_images(folder)):
            if lists := _lists(above):
                return _refused_lists(base, above, *lists)
    kinds: dict[str, str] = {}
    for name in top.files[:: max(1, len(top.files) // _CHECKED_FILES)]:
        if (kind := looks_like(name)) and listing.is_image(name):
            kinds.setdefault(kind, name)
    if len(kinds) > 1:
        text = f"{top.where} holds images that are called like splits ({', '.join(sorted(kinds.values()))}); list those of each split"
        return _refused(text, "data.train=LIST data.val=LIST")
    return None


def _refused_lists(base: Tree, folder: Tree, train: str, held_out: str) -> Splits:
    """A refusal where lists that nobody named look like those of the splits."""
    text = f"{folder.where} holds lists that are called like splits"
    if isinstance(base, Archive):
        return _refused(f"{text}, which are not read inside a zip; unpack it", "")
    below = os.path.relpath(folder.where, base.where)
    names = [os.path.normpath(os.path.join(below, name)) for name in (train, held_out)]
    train, held_out = names if train != held_out else ("LIST", "LIST")
    return _refused(
        f"{text}; say which images are for training", f"data.train={train} data.val={held_out}"
    )


def _inner_splits(top: Tree) -> tuple[str, str] | None:
    """The folders of a training and of a held-out split that lie in one folder, which is `top` or any below it."""
    waiting = [("", top, 0)]
    for path, folder, depth in waiting:  # grows, so that the folders nearest to the top come first
        kinds = {looks_like(name): name for name in reversed(folder.folders)}
        if "train" in kinds and "held out" in kinds and folder.child(kinds["train"]).has_images():
            return path + kinds["train"], path + kinds["held out"]
        if depth < _DEEPEST_WRAPPER and len(waiting) < _CHECKED_FOLDERS:
            waiting += [
                (f"{path}{name}/", folder.child(name), depth + 1)
                for name in folder.folders[:_CHECKED]
            ]
    return None


def _refused_inner(where: str, prefix: str, inner: tuple[str, str]) -> Splits:
    train, held_out = inner
    text = f"{where} has splits inside its folders ({train}/, {held_out}/); name them, or a list of the training images"
    return _refused(text, f"data.train={prefix}{train} data.val={prefix}{held_out}")


def _alike(top: Tree) -> tuple[list[str], list[str]] | None:
    """Folders that hold the same folders, as splits hold the same classes, and the names that they share."""
    if top.has_images_beside or not 2 <= len(top.folders) < _FEW:
        return None
    folders = list(filter(_holds(top), top.folders))
    inner = [set(top.child(name).folders) for name in folders]
    all_names = max(inner, key=len, default=set())
    shared = all_names.intersection(*inner)
    if len(folders) < 2 or len(shared) < 2 or any(names - all_names for names in inner):
        return None
    return folders, sorted(shared)


def _without_images(folder: Tree) -> Iterator[Tree]:
    """The folders in a folder, and those in them, that hold no image."""
    for name in folder.folders[:_CHECKED]:
        child = folder.child(name)
        if not child.has_images():
            yield child
            yield from (child.child(inner) for inner in child.folders[:_CHECKED])


def _lists(folder: Tree) -> tuple[str, str] | None:
    """The lists of a folder that look like those of the training and of the held-out images; one file may be both."""
    kinds: dict[str, str] = {}
    tables = [
        name
        for name in folder.files
        if name.lower().endswith(listing.TABLES) and _RECORDS.isdisjoint(_words(name))
    ]
    order = ("train", "val", "test", None)
    for name in sorted(tables, key=lambda name: (order.index(_file_role(name)), name)):
        for word in _words(name):
            if kind := looks_like(word):
                kinds.setdefault(kind, name)
    return (kinds["train"], kinds["held out"]) if len(kinds) > 1 else None


def _refused(text: str, names: str) -> Splits:
    """A layout that is not taken as splits though it looks like them."""
    remedy = f", as in {names}" if names else ""
    error = f"data.train: {text}{remedy}, or give data.train=. if all images there are for training"
    return Splits(None, None, train_error=error)


def _instead(base: Tree) -> str:
    """Names of the folders that exist, for a message about one that does not."""
    top = _top(base)
    return (
        f"; {'it' if top is base else top.where} has {_names(top.folders)}" if top.folders else ""
    )


def _names(folders: list[str]) -> str:
    shown = [f"{name}/" for name in folders[:5]]
    return ", ".join(shown) + (f", ... ({len(folders)} in all)" if len(folders) > 5 else "")
