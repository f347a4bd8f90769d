"""The spans of a rollout by the rule of `agl.store.membership`, and the rollouts that may own its traces."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agl.store.cassandra import span_partition
from agl.store.cassandra.keyspace import Keyspace
from agl.store.cassandra.span_partition import IndexedSpan, Located
from agl.store.membership import trace_id_of

_RESPONSES = "SELECT is_answer, start_ns, span, home, arrived_ns FROM responses WHERE response_id = ?"
_TRACES = "SELECT home FROM traces WHERE trace_id = ?"


@dataclass(frozen=True, slots=True)
class ResponseEntry(Located):
    """A row of `responses`: a span that requested a response, or the gateway call that returned it."""

    is_answer: bool
    start_ns: int
    span: bytes
    home: str
    arrived_ns: int | None

    @property
    def order(self) -> int:
        """Time of arrival; the start, which the sender chose, where an earlier version did not keep it."""
        return self.start_ns if self.arrived_ns is None else self.arrived_ns


@dataclass
class RolloutSpans:
    """The spans that name the rollout, and those of its traces that name none, by trace id."""

    named: list[IndexedSpan] = field(default_factory=list)
    traces: dict[str, list[IndexedSpan]] = field(default_factory=dict)

    def all(self) -> list[IndexedSpan]:
        return self.named + [span for spans in self.traces.values() for span in spans]


def find_spans(db: Keyspace, rollout_ids: Sequence[str]) -> dict[str, RolloutSpans]:
    """The spans of each rollout, in rounds that read for all of them at once."""
    found = {name: RolloutSpans() for name in rollout_ids}
    for span in span_partition.read(db, found):
        if span.is_named:
            found[span.home].named.append(span)
    new = {name: spans.named for name, spans in found.items()}
    traces = {name: {trace.hex()} if (trace := trace_id_of(name)) else set[str]() for name in found}
    while any(new.values()) or any(traces.values()):
        entries = _response_entries(db, [span for spans in new.values() for span in spans])
        for name, spans in new.items():
            traces[name] |= {span.trace for span in spans} | _joined_traces(entries, spans)
            traces[name] -= found[name].traces.keys()
        unnamed: dict[str, list[IndexedSpan]] = {trace: [] for trace in sorted(set().union(*traces.values()))}
        for span in span_partition.read(db, unnamed):
            if not span.is_named:
                unnamed[span.trace].append(span)
        for name, spans in found.items():
            spans.traces |= {trace: unnamed[trace] for trace in sorted(traces[name])}
            new[name] = [span for trace in sorted(traces[name]) for span in unnamed[trace]]
            traces[name] = set()
    return found


def find_owners(db: Keyspace, spans: RolloutSpans) -> dict[str, set[str]]:
    """For each trace the rollouts to which its spans that name none may belong: by the trace or by a response.

    May have a rollout too many: then the next `gc` deletes the spans.
    """
    named = db.run([(_TRACES, (bytes.fromhex(trace),)) for trace in spans.traces])
    owners = {trace: {home for (home,) in rows} for trace, rows in zip(spans.traces, named, strict=True)}
    entries = _response_entries(db, [span for unnamed in spans.traces.values() for span in unnamed])
    for trace, unnamed in spans.traces.items():
        for span in unnamed:
            found = entries.get(span.response_id or "", ())
            owners[trace] |= {entry.home for entry in found if entry.is_named and entry.is_answer != span.is_answer}
    return owners


def _response_entries(db: Keyspace, spans: Iterable[IndexedSpan]) -> dict[str, list[ResponseEntry]]:
    """All entries for the responses of `spans`, by response id."""
    ids = sorted({span.response_id for span in spans if span.response_id})
    results = zip(ids, db.run([(_RESPONSES, (response_id,)) for response_id in ids]), strict=True)
    return {response_id: [ResponseEntry(*row) for row in rows] for response_id, rows in results}


def _joined_traces(entries: Mapping[str, Sequence[ResponseEntry]], spans: Sequence[IndexedSpan]) -> set[str]:
    """Rule 3: the traces that share a response with `spans`, of spans on the other side that name no rollout."""
    traces: set[str] = set()
    for span in spans:
        found = entries.get(span.response_id or "", [])
        first = min((entry for entry in found if not entry.is_answer), key=lambda entry: entry.order, default=None)
        for entry in found:
            if entry.is_named or entry.is_answer == span.is_answer:
                continue
            request = span if entry.is_answer else entry
            if first is not None and request.span == first.span:
                traces.add(entry.trace)
    return traces
