"""Fills the patterns of the navigation in mkdocs.yml with the pages that are there.

A pattern stands for the matching pages that no earlier entry has taken, by their paths; a section
whose patterns match nothing is left out.
"""

from fnmatch import fnmatchcase


def on_files(files, *, config):
    """Expand the patterns before the navigation is built."""
    pages = sorted(file.src_uri for file in files.documentation_pages())
    taken = set()
    config.nav = _expand(config.nav, pages, taken)


def _expand(entries, pages, taken):
    expanded = []
    for entry in entries:
        if isinstance(entry, dict):
            [(title, value)] = entry.items()
            if isinstance(value, list):
                if value := _expand(value, pages, taken):
                    expanded.append({title: value})
                continue
            taken.add(value)
            expanded.append({title: value})
        else:
            matching = [p for p in pages if fnmatchcase(p, entry) and p not in taken]
            taken.update(matching)
            # An entry without a wildcard stays as it is, so that a missing page is reported.
            expanded += matching if "*" in entry else [entry]
    return expanded
