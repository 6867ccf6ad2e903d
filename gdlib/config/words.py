"""Words of the configuration that stand for what is written elsewhere in it.

They are replaced before anything is checked.

`like: name` takes the keys of another entry of the same kind. A dataset may name `offsets`, a
    method other methods, and an
ablation several methods: it is one ablation for each. Whatever else is wrong is left as it is, and
told later.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gdlib.config.mistakes import check_name
from gdlib.registry import UnknownName
from gdlib.text import updated

ALIKE = ("studies", "datasets", "teachers", "students", "ablations", "recipes")
# What goes with a key: it is not taken over by an entry whose source, network or folder is another
# one.
BELONGS = {
    "source": ("options", "unlabelled"),
    "model": ("options", "weights"),
    "folder": ("download", "by_hand"),
}


def spelt_out(raw: Any) -> Any:
    """Return a configuration without such words.

    Raises:
        UnknownName: a name that nothing has, or that leads back to itself.
    """
    if not isinstance(raw, dict):
        return raw
    raw = {**raw}
    for section in ALIKE:
        if isinstance(entries := raw.get(section), dict):
            raw[section] = {name: _like(section, name, entries) for name in entries}
    if isinstance(methods := raw.get("methods"), dict):
        raw["methods"] = {name: _spelt_method(name, methods) for name in methods}
    _name_offsets(raw)
    _one_each(raw)
    return raw


def _like(section: str, name: str, entries: Mapping[str, Any], chain: tuple[str, ...] = ()) -> Any:
    """An entry with all keys of the one that it is like."""
    entry = entries[name]
    if not isinstance(entry, dict) or not isinstance(other := entry.get("like"), str):
        return entry
    where = f"{section}.{name}.like"
    check_name(where, other, entries)
    _check_circle(where, (*chain, name), other)
    base = _like(section, other, entries, (*chain, name))
    own = {key: value for key, value in entry.items() if key != "like"}
    if not isinstance(base, dict):
        return own
    for key, rest in BELONGS.items():
        if key in own and own[key] != base.get(key):
            base = {one: value for one, value in base.items() if one not in rest}
    return updated(base, own)


def _spelt_method(name: str, methods: Mapping[str, Any]) -> Any:
    """A method in which every name of another one is replaced by the terms of that."""
    method = methods[name]
    if isinstance(method, list):
        return list(_terms(name, methods))
    if isinstance(method, dict) and isinstance(method.get("terms"), list):
        return {**method, "terms": list(_terms(name, methods))}
    return method


def _terms(name: str, methods: Mapping[str, Any], chain: tuple[str, ...] = ()) -> Iterator[Any]:
    method = methods[name]
    terms = method.get("terms") if isinstance(method, dict) else method
    for term in terms if isinstance(terms, list) else ():
        if not isinstance(term, str):
            yield term
            continue
        where = f"methods.{name}"
        check_name(where, term, methods)
        _check_circle(where, (*chain, name), term)
        if isinstance(methods[term], dict) and methods[term].get("recipe"):
            raise UnknownName(
                f'{where}: "{term}" changes the recipe too; name methods of terms alone, or write '
                "its terms"
            )
        yield from _terms(term, methods, (*chain, name))


def _check_circle(where: str, chain: tuple[str, ...], name: str) -> None:
    if name == chain[-1]:
        raise UnknownName(f'{where}: "{name}" names itself; name another one')
    if name in chain:
        circle = " names ".join(f'"{one}"' for one in (*chain[chain.index(name) :], name))
        raise UnknownName(f"{where}: {circle}; one of them must be written out")


def _name_offsets(raw: dict[str, Any]) -> None:
    """Put the offsets of the catalogue where a dataset names some."""
    known, datasets = raw.get("offsets") or {}, raw.get("datasets")
    for key, data in datasets.items() if isinstance(datasets, dict) else ():
        if isinstance(data, dict) and isinstance(name := data.get("offsets"), str):
            check_name(f"datasets.{key}.offsets", name, known)
            datasets[key] = {**data, "offsets": known[name]}


def _one_each(raw: dict[str, Any]) -> None:
    """Make one ablation for each method of an ablation of several, and name all of them where a
    study names that.
    """
    ablations, studies = raw.get("ablations"), raw.get("studies")
    if not isinstance(ablations, dict):
        return
    out, families = {}, {}
    for key, one in ablations.items():
        if not isinstance(one, dict) or not isinstance(methods := one.get("method"), list):
            out[key] = one
            continue
        title = str(one.get("title") or f"{key} {{method}}")
        members = {
            f"{key}_{m}": {**one, "method": m, "title": title.replace("{method}", str(m))}
            for m in methods
        }
        if taken := sorted(members.keys() & ablations.keys()):
            raise UnknownName(
                f'ablations.{key}: there is an ablation "{taken[0]}" already; rename one'
            )
        out |= members
        families[key] = list(members)
    raw["ablations"] = out
    for name, study in studies.items() if isinstance(studies, dict) else ():
        if isinstance(study, dict) and isinstance(chosen := study.get("ablations"), list):
            members = [
                one
                for key in chosen
                for one in (families.get(key, [key]) if isinstance(key, str) else [key])
            ]
            studies[name] = {**study, "ablations": members}
