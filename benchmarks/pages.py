"""Pages of results: what they need installed, the rendering of the templates of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.benchmark import Result, slug
from benchmarks.tables import Table, table_of
from dist_train.errors import UseError

TEMPLATES = Path(__file__).parent


def everything(one: Result) -> list[Table]:
    """The tables of the page: another with all keys of the rows where the others do not show them all."""
    rows = one.document["rows"]
    shown = {key for table in one.tables for key in table.keys}
    more = any(key not in shown for row in rows for key in row)
    return one.tables + ([table_of("Everything measured", None, rows, folded=True)] if more else [])


def require_page() -> None:
    """Raise UseError where what makes pages is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UseError(f'the report needs {error.name}: pip install -e ".[benchmarks]"') from None


def render(template: str, **values: Any) -> str:
    """A page from a template of this package, in which every value is escaped."""
    import jinja2

    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["slug"] = slug
    return pages.get_template(template).render(**values)
