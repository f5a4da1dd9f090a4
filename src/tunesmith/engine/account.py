"""What adapters cost: parameters, bytes, floating-point operations and training memory, in closed form."""

from dataclasses import asdict, dataclass

from torch import nn

from .adapter import ValueAdapter
from .model import adapters, hubs, record_of, state_of, trainable, unwrap
from .pack import packed_size
from .sites import kind_of
from .store import tensors

ADAMW_STATES = 2


@dataclass(frozen=True)
class SiteSummary:
    path: str
    kind: str
    method: str
    trainable: int


@dataclass(frozen=True)
class Summary:
    """Counts of parameters, `bytes` of the adapter's file, FLOPs per token and bytes of training memory.

    Trained values that take the place of the base's count once in `total` and in the FLOPs.
    `flops` is one forward of the base's matrices and the adapter's parameters, 2 per multiply-add and token;
    `train_flops` adds the backward to the inputs (as much again) and to the adapter (2 per parameter more).
    `train_bytes` is weights, gradients and AdamW's two states of what trains; activations depend on the batch.
    """

    name: str
    trainable: int
    total: int
    bytes: int
    base_bytes: int
    flops: int
    train_flops: int
    train_bytes: int
    sites: list[SiteSummary]

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    def to_dict(self) -> dict:
        return asdict(self) | {"percent": self.percent}

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[SiteSummary]] = {}
        for s in self.sites:
            groups.setdefault((s.path.split(".")[-1], s.kind, s.method), []).append(s)
        rows = [("layers", "kind", "method", "sites", "trained")]
        rows += [(name, kind, method, str(len(g)), f"{sum(s.trainable for s in g):,}") for (name, kind, method), g in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.rjust(w) if i > 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
        lines.append(f"{self.name}: {self.trainable:,} of {self.total:,} parameters train ({self.percent:.3f}%), {self.bytes / 2**20:.2f} MiB on disk")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """The cost of the adapters that train (those in use, unless several are mixed)."""
    state, root = state_of(model), unwrap(model)
    chosen = trainable(model)
    ids = {id(p) for p in chosen.values()}
    base = {id(p): p for path, p in root.named_parameters() if ".tunesmith." not in f".{path}"}
    for hub in hubs(model).values():
        base |= {id(swap.other): swap.other for swap in hub.swaps if isinstance(swap.other, nn.Parameter)}
    sites, seen, replaced = [], set(), 0
    for path, hub in hubs(model).items():
        for name, adapter in hub.adapters.items():
            own = {id(p): p.numel() for p in adapter.parameters() if id(p) in ids and id(p) not in seen}
            seen |= own.keys()
            replaced += sum(own.values()) if isinstance(adapter, ValueAdapter) else 0
            if own:
                config = record_of(model, name).sites.get(path)
                sites.append(SiteSummary(path, hub.site.kind, config.method if config else "trained in full", sum(own.values())))
    count = sum(p.numel() for p in chosen.values())
    adapter_bytes = sum(p.numel() * p.element_size() for p in chosen.values())
    matrices = sum(m.weight.numel() for m in root.modules() if kind_of(m) == "linear")
    flops = 2 * (matrices + count - replaced)
    names = [n for n in state.records if any(id(p) in ids for a in adapters(model, n).values() for p in a.parameters())]
    stored = {id(t): t for n in names for a in adapters(model, n).values() for t in tensors(a).values()}
    return Summary(
        "+".join(names), count, sum(p.numel() for p in base.values()) + count - replaced, sum(packed_size(t) for t in stored.values()),
        sum(p.nbytes for p in base.values()), flops, 2 * flops + 2 * count, (2 + ADAMW_STATES) * adapter_bytes, sites,
    )
