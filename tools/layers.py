"""What config files and a command line give, as layers of options: a later layer wins over an earlier one."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from dalikd.pipelines.files import load_yaml, read_text
from dalikd.tools.classes import CLASSES, check_class_path, trust, whole
from dalikd.tools.signature import check_words, check_yaml, element, expand_path, is_path, option_types
from dalikd.trainers.renamed import RENAMED, take_old_names, told

__all__ = [
    "OPTIONS",
    "WITH_TASK",
    "Grammar",
    "Layer",
    "grammar",
    "named_task",
    "nested",
    "options_class",
    "read_layers",
    "take_apart",
]

#: The commands whose config files may hold options of all of them, and their options classes. Benchmarks stand last:
#: they are imported where they are called, and where a config has a key that no other command knows.
OPTIONS: dict[str, str] = {
    "train": "dalikd.trainers.tasks.supervised.TrainOptions",
    "distill": "dalikd.trainers.tasks.distill.DistillOptions",
    "mutual": "dalikd.trainers.tasks.mutual.MutualOptions",
    "probe": "dalikd.trainers.tasks.probe.ProbeOptions",
    "measure": "dalikd.trainers.measure.MeasureOptions",
    "preview": "dalikd.trainers.preview.PreviewOptions",
    "cache": "dalikd.trainers.teacher_cache.fill.CacheOptions",
    "evaluate": "dalikd.trainers.evaluate.EvaluateOptions",
    "study": "dalikd.trainers.study.options.StudyOptions",
    "doctor": "dalikd.tools.doctor.DoctorOptions",
    "bench step": "dalikd.tools.bench.common.StepOptions",
    "bench scaling": "dalikd.tools.bench.common.ScalingOptions",
    "bench methods": "dalikd.tools.bench.methods.MethodsOptions",
    "bench teacher": "dalikd.tools.bench.common.TeacherOptions",
    "bench passes": "dalikd.tools.bench.common.TeacherOptions",
    "bench published": "dalikd.tools.bench.common.PublishedOptions",
}
#: the command that a benchmark measures or a preview is of: it takes that one's section of a config too, and writes
#: nothing where that one does
_MEASURED = {
    "preview": "measure",
    "bench step": "distill",
    "bench scaling": "distill",
    "bench methods": "distill",
    "bench teacher": "measure",
    "bench passes": "measure",
    "bench published": "distill",
}
#: commands whose options class may be another one, by its class path
WITH_TASK = ("train", "distill")
#: options that take several words
_LISTS = {
    **dict.fromkeys(("train", "distill", "mutual", "probe"), ("trackers",)),
    "measure": ("augmentation", "metrics"),
    "preview": ("augmentation",),
    "study": ("augmentation", "seeds", "epoch_factor", "pair", "only"),
    "bench scaling": ("processes",),
    "bench methods": ("methods",),
}


class Grammar(NamedTuple):
    """What may be given to a command.

    Attributes:
        command: its name; one that is not in OPTIONS shares no config with others.
        types: of its options, by their dotted names.
        lists: names of the options that take several words.
        line: what the command line is called in messages, where it may hold whatever a config file may.
    """

    command: str
    types: Mapping[str, Any]
    lists: Collection[str] = ()
    line: str = ""

    @property
    def names(self) -> set[str]:
        """The options, and groups of them."""
        return _heads(self.types)


class Layer(NamedTuple):
    """Options that were given in one place.

    Attributes:
        place: the config file; empty: the command line.
        content: options by name. Groups are nested, and so is what a file holds for one command alone.
    """

    place: str
    content: dict[str, Any]

    def parts(self, command: str, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """What it holds for a command, later parts winning: what all commands share, then the command's own section."""
        if not self.place:
            yield self.content
            return
        measured = _MEASURED.get(command)
        kept = set(names) - ({"output", "json"} if measured else set())
        shared = [self.content, self.content.get(measured or "", {})]
        parts = [{key: value for key, value in part.items() if key in kept} for part in shared]
        yield from (part for part in (*parts, self.content.get(command)) if part)


@cache
def grammar(command: str, component: type | None = None) -> Grammar:
    """Of a command in OPTIONS, with its own options class or another one."""
    types = option_types(component or options_class(command)) | ({"task": str | None} if command in WITH_TASK else {})
    return Grammar(command, types, _LISTS.get(command) or _LISTS.get(_MEASURED.get(command, ""), ()))


def options_class(command: str, task: str | None = None) -> type:
    """The options class of a command in OPTIONS, or the one that is named instead.

    Raises:
        ValueError: there is no such class, or its options are not of training.
    """
    if task is None:
        return resolve_name(OPTIONS[command])
    from dalikd.trainers.tasks.base import TrainingOptions

    check_class_path("--task", task)
    try:
        found = resolve_name(task)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--task {task}: there is no such class ({error}); give its whole path") from error
    if not (isinstance(found, type) and issubclass(found, TrainingOptions)):
        raise ValueError(f"--task {task}: give a class that is made from dalikd.trainers.tasks.base.TrainingOptions")
    return found


def named_task(command: str, argv: Sequence[str]) -> str | None:
    """The class path that `task` is last set to, on a command line or in its config files."""
    named: list[str | None] = [None]
    for option, values in take_apart(argv) if command in WITH_TASK else ():
        if option == "--import":
            trust(_one(option, values))
        elif option == "--task":
            named += values
        elif option in ("--config", "--resume") and values:
            path = Path(expand_path(option, values[0])) / ("config.yaml" if option == "--resume" else "")
            content = _load(path)[0] if path.is_file() and "task" in read_text(path) else {}
            sections = [content, content.get(command)]
            found = [section["task"] for section in sections if isinstance(section, dict) and section.get("task")]
            if not all(isinstance(task, str) for task in found):
                raise ValueError(f"{path}: task is {str(found[0])[:40]}: give the class path of an options class")
            named = [*named, *found] if option == "--config" else [None, *found, *named[1:]]
    return named[-1]


def _heads(names: Collection[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


# ------------------------------------------------------------------------------------------------ the command line


def take_apart(
    argv: Sequence[str], positional: Sequence[str] = (), lists: Collection[str] = ()
) -> list[tuple[str, list[str]]]:
    """Options with the words after them, up to the next option. A word may begin with one dash.

    Args:
        argv: the arguments.
        positional: names of the options that may be given without their name, one word each; with one of them each
            option takes one word.
        lists: those that take several: of the positional ones all words that are left; where none of these is a list,
            of the others all words up to the next option.

    Raises:
        ValueError: a word belongs to no option.
    """
    pieces = [word.split("=", 1) if word.startswith("--") else [word] for word in argv]
    words, names = deque(piece for split in pieces for piece in split), deque(positional)
    found: list[tuple[str, list[str]]] = []
    while words:
        option = words.popleft()
        if option != "-h" and not option.startswith("--"):
            if not names:
                raise ValueError(f"{option}: options begin with --, and have a value")
            words.appendleft(option)
            option = f"--{names[0] if names[0] in lists else names.popleft()}"
        values = []
        several = not positional or (option[2:] in lists and not set(positional) & set(lists))
        while words and not words[0].startswith("--") and (several or not values):
            values.append(words.popleft())
        found.append((option, values))
    return found


def read_layers(
    argv: Sequence[str], form: Grammar, positional: Sequence[str] = (), *, old_names: bool = False
) -> list[Layer]:
    """Take a command line apart, and read the config files that it names.

    The config of a folder that is gone on with comes first, and may have old names of options. The options between two
    files are one layer.

    Args:
        argv: the arguments.
        form: what they may be.
        positional: names of the options that may be given without their name.
        old_names: whether config files may have old names of options.

    Raises:
        FileNotFoundError: no such config file.
        ValueError: an option or a key of a file is unknown or has no value, or a value is not written as it is meant.
    """
    layers: list[Layer] = []
    resumed: list[Layer] = []
    given: dict[str, Any] = {}

    def end_line() -> None:
        if given:
            content = nested(given)
            checked = _checked(form.line, content, None, form, old_names=False) if form.line else content
            layers.append(Layer(form.line, checked))
            given.clear()

    for option, values in take_apart(argv, positional, form.lists):
        name = option.removeprefix("--")
        if name == "print_config":
            continue
        if name == "import" and (form.command in OPTIONS or form.line):
            trust(_one(option, values))
            continue
        if name == "config" or name.endswith("+"):  # what is added to is read before
            end_line()
        if name == "config":
            layers.append(_file(_one(option, values), form, old_names=old_names))
        elif name in ("resume", "verify") and name in form.types and form.command in OPTIONS and not form.line:
            folder = expand_path(option, _one(option, values))
            resumed = [_file(_folder_config(option, folder), form, old_names=True), Layer("", {"output": folder})]
            given[name] = folder
        else:
            value = _value(option, values, form)
            given[name] = given[name] + value if positional and name in form.lists and name in given else value
    end_line()
    return resumed + layers


def _one(option: str, values: Sequence[str]) -> str:
    if not values:
        raise ValueError(f"{option} needs a value")
    if values[1:]:
        raise ValueError(f"{values[1]}: options begin with --, and have a value")
    return values[0]


def _value(option: str, values: list[str], form: Grammar) -> Any:
    """What was given to an option: a word, or the words of a list, which commas and brackets divide too."""
    name = option.removeprefix("--")
    head, _, rest = name.partition(".")
    if not name or (form.line and head in OPTIONS and not rest):
        raise ValueError(f"{option}: options begin with --, and have a value")
    old = (rest if head in OPTIONS else name).replace(".init_args.", ".")
    if old in RENAMED and name not in form.types:
        raise ValueError(_renamed("--", old))
    if name in form.lists and is_path(element(form.types[name])) and values:
        return [expand_path(option, word) for word in values]  # they may have commas, brackets and spaces
    if name in form.lists:
        divided = [word.strip("[]").replace(",", " ").replace('"', " ").replace("'", " ").split() for word in values]
        if not any(divided):
            raise ValueError(f"{option} needs at least one value")
        return [value for words in divided for value in words]
    plain = name.removesuffix("+")
    if not (form.line or any(_is_in(plain, known) or _is_in(known, plain) for known in form.types)):
        raise ValueError(f"unrecognized arguments: {' '.join([option, *values])}{_close(name, form.types)}")
    if not values:
        raise ValueError(f"{option} needs a value: expected one argument")
    check_words(option, values, form.types)
    return values[0]


def _is_in(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def nested(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Options with dotted names as groups of options; a class with its options in its long form."""
    content: dict[str, Any] = {}
    for key, value in options.items():
        head, *rest = str(key).split(".")
        if head in CLASSES:
            rest = ["init_args", *rest] if rest and rest[0] not in ("class_path", "init_args", "dict_kwargs") else rest
            value = value if rest or value is None else whole(value)
        for name in reversed(rest):
            value = {name: value}
        content[head] = _joined(content[head], value) if head in content else value
    return content


def _joined(old: Any, new: Any) -> Any:
    old = load_yaml(old, old[:40])[0] if isinstance(old, str) and old.startswith("{") else old
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _joined(old[key], new[key]) if key in old else new[key] for key in new}}


# ---------------------------------------------------------------------------------------------------- config files


def _folder_config(option: str, folder: str) -> str:
    path, kind = Path(folder) / "config.yaml", "run" if option == "--resume" else "teacher cache"
    if not path.exists():
        raise FileNotFoundError(f"{option} {folder}: there is no {kind} ({path} is missing); name a {kind} folder")
    return str(path)


def _file(name: str, form: Grammar, *, old_names: bool) -> Layer:
    path = Path(expand_path("--config", name))
    if not path.is_file():
        raise FileNotFoundError(f"--config {name}: no such file")
    return Layer(str(path), _checked(str(path), *_load(path), form, old_names=old_names))


def _load(path: Path) -> tuple[dict[str, Any], Any]:
    """The content of a config file, and the same with every scalar as it is written."""
    content, written = load_yaml(read_text(path), str(path))
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines")
    return content or {}, written


def _checked(place: str, content: dict[str, Any], written: Any, form: Grammar, *, old_names: bool) -> dict[str, Any]:
    """The content of a config file, nested: options, and sections named after commands. All keys are known.

    Args:
        place: the file.
        content: what it holds.
        written: the same with every scalar as it is written; None: of the command line.
        form: of the command that reads it.
        old_names: whether options may have old names.
    """
    shared = {key: value for key, value in content.items() if key not in OPTIONS or form.command not in OPTIONS}
    checked: dict[str, Any] = {}
    for section in ("", *(key for key in content if key not in shared)):
        options, text = (content[section] or {}, (written or {}).get(section)) if section else (shared, written)
        if not isinstance(options, dict):
            raise ValueError(f"{place}: {section} must hold options as `name: value` lines")
        prefix, options, text = (
            f"{section}." if section else "",
            nested(options),
            nested(text if isinstance(text, dict) else {}),
        )
        own = form if section == form.command and not form.line else None
        types = _possible([own or grammar(section)]) if section else _shared(options, form)
        for old, new in take_old_names(options, types).items():
            if not old_names or (new == RENAMED[old] and " " in new):
                raise ValueError(f"{place}: {_renamed(prefix, old)}")
        known = _heads(types)
        for key in options:
            if key.removesuffix("+") not in known:
                raise ValueError(f"{place}: unknown key {prefix}{key}{_close(key, known | set(OPTIONS))}")
        if written is not None:
            check_yaml(f"{place}: {prefix}", options, text, types)
        checked |= {section: options} if section else options
    return checked


def _renamed(prefix: str, old: str) -> str:
    new = told(old)
    if new == RENAMED[old] and " " in new:
        return f"{prefix}{old}: {new}"
    return f"{prefix}{old} is now {prefix}{new.replace(', ', f', {prefix}').replace(' and ', f' and {prefix}')}"


def _close(key: str, known: Collection[str]) -> str:
    close = get_close_matches(key, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _shared(options: Mapping[str, Any], form: Grammar) -> dict[str, list[Any]]:
    """The types that options may have in a file that several commands read."""
    forms = [form]
    for command in OPTIONS if form.command in OPTIONS else ():
        if command in _MEASURED and _heads(options) <= {name for each in forms for name in each.names}:
            break
        forms.append(grammar(command))
    return _possible(forms)


def _possible(forms: Sequence[Grammar]) -> dict[str, list[Any]]:
    """The types that each option may have in a config: for those that take several words one value is enough."""
    types: dict[str, list[Any]] = {}
    for form in forms:
        for name, hint in form.types.items():
            types.setdefault(name, []).extend([hint, element(hint)] if name in form.lists else [hint])
    return types
