"""Taking results out of the store: the report with what it cost, and models as plain Hugging Face directories."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from artifacts.record import Record
from artifacts.store import Store
from artifacts.trees import Tree
from artifacts.upload import Moved
from flows.display import clock
from flows.graph import Graph

MARK = "<!-- run-record -->"
"""Where the report's page has room for what is not part of its content: time, device, host, versions."""

LISTING = ".report-files.json"
"""Lists what a report wrote to its folder, so that nothing else is ever replaced."""


DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)


class ExportError(Exception):
    """Something cannot be taken out. The message says what, and what to do."""


def export_tree(store: Store, digest: str, folder: Path, progress: Moved | None = None) -> None:
    """Write a stored tree to `folder`, verified, all of it or nothing.

    Raises:
        ExportError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is not empty; name a new folder, so that nothing is overwritten")
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_names(store.tree(digest))
        store.materialise(digest, partial, progress)
        _make_plain(partial)
        _make_own(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_names(tree: Tree) -> None:
    """Refuse a tree whose files would be hidden, or be devices, in the folder of a person.

    Raises:
        ExportError: names the file.
    """
    for file in tree.files:
        for part in file.path.split("/"):
            if part.startswith(".") or DEVICE.match(part) or part.endswith((".", " ")):
                raise ExportError(
                    f"tree {tree.digest[:12]} has a file {file.path!r}, which no stage makes; nothing is written. "
                    "Ask who else can write to the store."
                )


def check_report_folder(folder: Path) -> None:
    """Refuse a folder that a report could not be written to without losing something.

    Raises:
        ExportError: it is a file, cannot be written, or holds files that are not of an earlier report.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; name a folder for the report with -o")
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise ExportError(f"{parent} cannot be written; name another folder for the report with -o")
    if folder.is_dir():
        known = _written(folder)
        foreign = [p for p in _files(folder) if p not in known]
        if foreign:
            raise ExportError(
                f"{folder} holds {foreign[0]!r}, which is not part of a report; name another folder with -o, "
                "so that nothing is overwritten"
            )


def export_report(store: Store, graph: Graph, records: dict[str, Record], folder: Path) -> Path:
    """Write the report and its figures to `folder`, replacing an earlier report there; return the page's path.

    What ran where and how long is written into the page and to `run.json`; it is not part of the report's artifact,
    because it differs from run to run while the results do not.
    """
    check_report_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        check_names(store.tree(records["report"].output))
        store.materialise(records["report"].output, partial)
        _make_own(partial)
        page = partial / "report.html"
        text = page.read_text(encoding="utf-8").replace(MARK, _cost_table(graph, records))
        page.write_text(text, encoding="utf-8")
        run = {name: _cost(record) for name, record in records.items()}
        (partial / "run.json").write_text(json.dumps(run, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (partial / LISTING).write_text(json.dumps([*_files(partial), LISTING]), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise ExportError(f"the report cannot be written to {folder}: {error.strerror}; name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "report.html"


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def _written(folder: Path) -> set[str]:
    """The files that an earlier report left in a folder."""
    try:
        return set(json.loads((folder / LISTING).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return set()


def _make_own(folder: Path) -> None:
    """Replace hard links into a local store by copies, so that editing an exported file cannot damage the store."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        copy = path.with_name(f".{uuid.uuid4().hex}")
        shutil.copyfile(path, copy)
        copy.replace(path)


def _make_plain(folder: Path) -> None:
    """Turn a model that is stored as a base and adapters into an ordinary model directory, merged; the adapters stay beside."""
    if (folder / "adapters").is_dir() and (folder / "config.json").is_file():
        from tasks.adapters import ADAPTERS, merge

        merged = folder.with_name(f"{folder.name}.merged")
        try:
            merge(folder, merged)
            (folder / ADAPTERS).rename(merged / ADAPTERS)
            shutil.rmtree(folder)
            merged.rename(folder)
        finally:
            shutil.rmtree(merged, ignore_errors=True)


def _cost(record: Record) -> dict[str, object]:
    accepted = {} if record.equivalent is None else {"accepted": record.equivalent}
    return {
        **accepted,
        "stage": record.stage,
        "key": record.key,
        "output": record.output,
        "seconds": record.seconds,
        "finished": record.finished,
        "bytes": record.size,
        "environment": record.environment,
    }


def _cost_table(graph: Graph, records: dict[str, Record]) -> str:
    rows = []
    accepted = []
    for node in graph:
        record = records[node.name]
        if record.equivalent is not None:
            text = f"{node.name}: {record.equivalent['because']} ({record.equivalent['by']})"
            accepted.append(f"<li>{html.escape(text)}</li>")
        where = record.environment
        finished = time.strftime("%Y-%m-%d %H:%M", time.gmtime(record.finished))
        device = where.get("accelerator") or where.get("device", "?")
        cells = [
            node.name,
            record.key[:12],
            record.output[:12],
            clock(record.seconds),
            finished,
            device,
            where.get("host", "?"),
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    total = clock(sum(record.seconds for record in records.values()))
    versions = sorted({f"{k} {v}" for r in records.values() for k, v in r.environment.get("versions", {}).items()})
    head = "".join(f"<th>{name}</th>" for name in ("node", "key", "output", "time", "finished (UTC)", "device", "host"))
    taken = f"<p>Not run, but accepted by hand as what another run had made:</p><ul>{''.join(accepted)}</ul>"
    return (
        f"<h3>What ran, where, and how long</h3><p>{total} of stage time in all. {html.escape(', '.join(versions))}.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f"{taken if accepted else ''}"
    )
