"""What makes up a rollout: the spans that name it, and those of its traces that name none; see `Store.query_rows`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agl.store.cassandra import home
from agl.store.cassandra.database import Database
from agl.store.cassandra.home import Placed

_RESPONSES = "SELECT is_answer, start_ns, span, home FROM responses WHERE response_id = ?"
_TRACES = "SELECT home FROM traces WHERE trace_id = ?"


@dataclass(frozen=True, slots=True)
class Telling:
    """A span that tells of an answer: a request for it, or the gateway's call that gave it."""

    is_answer: bool
    start_ns: int
    span: bytes
    home: str

    @property
    def trace(self) -> str:
        return self.span[:16].hex()

    @property
    def is_named(self) -> bool:
        return self.home != self.trace


@dataclass
class Members:
    """`named` are the spans that name the rollout; `traces` the others by their trace, each of which stands alone."""

    named: list[Placed] = field(default_factory=list)
    traces: dict[str, list[Placed]] = field(default_factory=dict)

    def all(self) -> list[Placed]:
        return self.named + [span for spans in self.traces.values() for span in spans]


def members(db: Database, rollout_id: str) -> Members:
    """Spans of a rollout, which has the id of its trace where no span names it."""
    trace = _trace(rollout_id)
    found = Members([span for span in home.read(db, [rollout_id]) if span.is_named])
    news = found.named
    wanted = {trace} if trace else set[str]()
    while news or wanted:
        wanted = (wanted | {span.trace for span in news} | _joined(db, news)) - found.traces.keys()
        found.traces |= {trace: [] for trace in wanted}
        news = [span for span in home.read(db, sorted(wanted)) if not span.is_named]
        for span in news:
            found.traces[span.trace].append(span)
        wanted = set()
    return found


def owners(db: Database, members: Members) -> dict[str, set[str]]:
    """Rollouts that the unnamed spans of each trace may belong to: by the trace, or by their answers.

    Rather one too many: then they go the next time.
    """
    named = db.run([(_TRACES, (bytes.fromhex(trace),)) for trace in members.traces])
    found = {trace: {name for (name,) in rows} for trace, rows in zip(members.traces, named, strict=True)}
    told = tell(db, [span for spans in members.traces.values() for span in spans])
    for trace, spans in members.traces.items():
        for span in spans:
            others = told.get(span.response_id or "", ())
            found[trace] |= {other.home for other in others if other.is_named and other.is_answer != span.is_answer}
    return found


def tell(db: Database, spans: Iterable[Placed]) -> dict[str, list[Telling]]:
    """All that tell of the answers that `spans` tell of, by response id."""
    names = sorted({span.response_id for span in spans if span.response_id})
    rows = db.run([(_RESPONSES, (name,)) for name in names])
    return {name: [Telling(*row) for row in found] for name, found in zip(names, rows, strict=True)}


def _joined(db: Database, spans: Sequence[Placed]) -> set[str]:
    """Traces that `spans` reach by an answer: those of unnamed calls that answered their request, and the reverse."""
    told = tell(db, spans)
    reached: set[str] = set()
    for span in spans:
        others = told.get(span.response_id or "", [])
        first_ns = min((other.start_ns for other in others if not other.is_answer), default=None)
        for other in others:
            if other.is_named or other.is_answer == span.is_answer:
                continue
            # An answer belongs to the first that asked for it: what came later was given it from a cache.
            if first_ns == (span.start_ns if other.is_answer else other.start_ns):
                reached.add(other.trace)
    return reached


def _trace(rollout_id: str) -> str | None:
    try:
        return bytes.fromhex(rollout_id).hex() if len(rollout_id) == 32 else None
    except ValueError:
        return None
