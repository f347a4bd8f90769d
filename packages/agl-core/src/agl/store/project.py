"""The project of a store: `?project=NAME` in its URI. Each project has a database of its own.

A file, a schema of PostgreSQL, or a keyspace: no query can find, join, change or delete what is of another project.
"""

import hashlib
import re
from typing import Final

from agl.config.section import DEFAULT_PROJECT, NAME_RULE, is_name
from agl.errors import StoreError
from agl.secret_url import SecretUrl

_OPTION: Final = "project="
_SHOWN_CHARACTERS: Final = 12
_DIGEST_CHARACTERS: Final = 10


def split_project(uri: str) -> tuple[SecretUrl, str]:
    """The URI without its project, and the project. Raises StoreError for a project against NAME_RULE."""
    url = SecretUrl(uri)
    base, _, query = url.secret.partition("?")
    options = query.split("&")
    kept = [option for option in options if not option.startswith(_OPTION)]
    if len(kept) == len(options):
        return url, DEFAULT_PROJECT
    project, *more = (option.removeprefix(_OPTION) for option in options if option.startswith(_OPTION))
    if more or not is_name(project):
        raise StoreError(f"store URI {url}: expected one project, and as its name {NAME_RULE}")
    return SecretUrl("?".join(filter(None, (base, "&".join(kept))))), project


def uri_of_project(uri: str, project: str) -> SecretUrl:
    """The URI of the store of `project` beside the one at `uri`."""
    base = split_project(uri)[0].secret
    return SecretUrl(f"{base}{'&' if '?' in base else '?'}{_OPTION}{project}")


def database_name(base: str, project: str, separator: str = "_") -> str:
    """Name of the database of a project: `base` for the default one, else one that no other project has.

    Of small letters and digits, whatever the project's name: databases and file systems may ignore case.
    """
    if project == DEFAULT_PROJECT:
        return base
    shown = re.sub("[^a-z0-9]", "_", project.lower())[:_SHOWN_CHARACTERS]
    return f"{base}{separator}{shown}_{hashlib.sha256(project.encode()).hexdigest()[:_DIGEST_CHARACTERS]}"
