"""A user's own policy: a TOML file, or a Python function that returns a `Recipe`.

    base = "predictive-layer"     # optional: a named policy whose parts are the defaults
    summary = "what it does"
    placement = "balanced"
    predictor = "ridge"
    split = "exact"

    [rule]
    name = "replicate"
    next_batch = false

    [precision]                   # for policies that offload
    name = "by-score"
    low = "int8"

A table `found` may stand there, too, and is not read: `moesim tune` writes there how it found the policy.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from moesim.predictors import PREDICTORS
from moesim.sim.eviction import EVICTIONS
from moesim.sim.policies.placements import PLACEMENTS
from moesim.sim.policies.precision import PRECISION_RULES
from moesim.sim.policies.recipe import MISSES, ROUTINGS, RULES, SPLITS, Recipe
from moesim.sim.policies.systems import POLICIES
from moesim.traces import InputError

IGNORED = "found"
CHOICES: dict[str, Mapping[str, Any]] = {
    "placement": PLACEMENTS,
    "split": SPLITS,
    "predictor": {name: name for name in PREDICTORS},
    "miss": {name: name for name in MISSES},
    "eviction": {name: name for name in EVICTIONS},
    "routing": {name: name for name in ROUTINGS},
}
"""Keys that name a part, and what they may name."""
PLAIN = {"summary": str, "double_buffered": bool, "phase_locked": bool, "pooled": bool, "simulated_only": bool}
TABLES: dict[str, Mapping[str, type[Any]]] = {"rule": RULES, "precision": PRECISION_RULES}
"""Keys that name a part with options of its own, in a table."""
LARGEST = 1 << 20
"""Bytes of a policy file; nobody writes a longer one."""


def is_own(name: str) -> bool:
    """Whether `name` is meant as a file or as a function."""
    return name.endswith(".toml") or ":" in name


def own_recipe(name: str) -> Recipe:
    """The recipe of a file or function. Raises InputError, for a file with the line that is wrong."""
    return _from_file(Path(name)) if name.endswith(".toml") else _from_function(name)


def recipe_toml(recipe: Recipe) -> str:
    """The parts as TOML that `own_recipe` reads back."""
    lines = [f"summary = {_quoted(recipe.summary)}"]
    for key, known in CHOICES.items():
        part = getattr(recipe, key)
        if part is not None:
            lines.append(f"{key} = {_quoted(_name_of(part, known))}")
    lines += [f"{key} = {str(getattr(recipe, key)).lower()}" for key, kind in PLAIN.items() if kind is bool]
    for key, kinds in TABLES.items():
        part = getattr(recipe, key)
        lines += ["", f"[{key}]", f"name = {_quoted(_name_of(type(part), kinds))}"]
        values: dict[str, Any] = asdict(cast(Any, part)) if is_dataclass(part) else {}
        lines += [f"{option} = {_value(value)}" for option, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of the parts, whatever the policy is called; empty where a part is a function without a name."""
    try:
        return hashlib.sha256(recipe_toml(replace(recipe, summary="")).encode()).hexdigest()
    except InputError:
        return ""


def _from_function(name: str) -> Recipe:
    module, _, attribute = name.partition(":")
    where = str(Path.cwd())
    if where not in sys.path:
        sys.path.insert(0, where)  # a function in a file beside the trace, as with `python -m`
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"--policy {name}: {type(error).__name__}: {error}") from None
    if not isinstance(made, Recipe):
        raise InputError(f"--policy {name}: must return a moesim.sim.policies.Recipe, not {type(made).__name__}")
    return made


def _from_file(path: Path) -> Recipe:
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: larger than {LARGEST} bytes, not a policy")
        text = path.read_text(encoding="utf-8")
        told = tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no TOML: {error}") from None

    def wrong(key: str, what: str) -> InputError:
        return InputError(f"{path}, line {_line_of(text, key)}: {what}")

    return _composed(told, wrong)


def _composed(told: dict[str, Any], wrong: Callable[[str, str], InputError]) -> Recipe:
    told.pop(IGNORED, None)
    base = told.pop("base", None)
    if base is not None and not _is_name(base, POLICIES):
        raise wrong("base", f"base = {base!r} is no named policy; known: {', '.join(POLICIES)}")
    parts: dict[str, Any] = {}
    for key, value in told.items():
        if key in CHOICES:
            if not _is_name(value, CHOICES[key]):
                raise wrong(key, f"{key} = {value!r} is not known; known: {', '.join(CHOICES[key])}")
            parts[key] = CHOICES[key][value]
        elif key in PLAIN:
            if not isinstance(value, PLAIN[key]):
                raise wrong(key, f"{key} must be a {PLAIN[key].__name__}, got {value!r}")
            parts[key] = value
        elif key in TABLES:
            parts[key] = _part(key, value, wrong)
        else:
            raise wrong(key, f"{key} is not a part of a policy; known: base, {', '.join([*CHOICES, *PLAIN, *TABLES])}")
    if base is not None:
        return replace(POLICIES[base], **parts)
    if "placement" not in parts:
        raise wrong("", "no placement and no base; a policy needs one of them")
    return Recipe(**{"summary": "", **parts})


def _part(what: str, told: Any, wrong: Callable[[str, str], InputError]) -> Any:
    """A rule or precision from its table."""
    kinds = TABLES[what]
    if not isinstance(told, dict) or not _is_name(told.get("name"), kinds):
        raise wrong(what, f"{what} needs a name, one of: {', '.join(kinds)}")
    kind = kinds[told.pop("name")]
    known: dict[str, Any] = {one.name: one for one in fields(kind)} if is_dataclass(kind) else {}
    for key, value in told.items():
        if key not in known:
            raise wrong(key, f"{key} is not an option of this {what}; known: {', '.join(known) or 'none'}")
        if type(value) is int and "float" in str(known[key].type):
            told[key] = float(value)
        elif type(value).__name__ not in str(known[key].type):
            raise wrong(key, f"{key} must be {known[key].type}, got {value!r}")
    for key, field in known.items():
        if field.default is MISSING and key not in told:
            raise wrong(what, f"this {what} needs {key} ({field.type})")
    try:
        return kind(**told)
    except InputError as error:
        raise wrong(str(error).partition(" ")[0], str(error)) from None


def _is_name(value: Any, known: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and value in known


def _line_of(text: str, key: str) -> int:
    """The first line that sets `key` or opens its table; 1 where none does."""
    for number, line in enumerate(text.splitlines(), 1):
        if key and re.match(rf"\s*\[?\s*[\"']?{re.escape(key)}[\"']?\s*[\]=.]", line):
            return number
    return 1


def _name_of(part: Any, known: Mapping[str, Any]) -> str:
    for name, one in known.items():
        if one is part or (isinstance(part, str) and one == part):
            return name
    raise InputError(f"{part!r} has no name that a policy file could give it")


def _quoted(text: str) -> str:
    # JSON's strings are TOML's, but for one character that TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else _quoted(value) if isinstance(value, str) else str(value)
