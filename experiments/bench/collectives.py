"""What moves between devices in a step: the collectives of an optimised HLO program, how often each runs, how many bytes."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_KIND = "|".join(KINDS)
# A type ends where the name of the operation begins; it holds no quotation mark, as what follows the operands may.
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = ([^"]*?) ([a-z][\w-]*)\((.*)$')
_OPERATION = re.compile(rf"^({_KIND})(-start|-done)?$")
_OPENS = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"\b(?:body|condition)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count[^\d}]*"?n"?[^\d}]*(\d+)')


class Collective(NamedTuple):
    """One instruction that moves arrays between devices, several arrays where XLA has combined them."""

    kind: str
    arrays: tuple[str, ...]
    """What comes out on each device, as `f32[64,32]`."""
    devices: int
    """That take part in one exchange."""
    bytes: int
    """Of its arrays on one device, before or behind it, whichever are more: the whole of what is gathered or scattered."""
    times: int | None
    """It runs a step. None: in a loop whose number of rounds the program does not tell."""

    @property
    def sent(self) -> float:
        """Bytes that each of n devices sends on a ring: all where they only pass on, else (n−1)/n, in an all-reduce twice that."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return (2 if self.kind == "all-reduce" else 1) * (self.devices - 1) / self.devices * self.bytes


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program, each instruction once, in the order in which they stand.

    An asynchronous one, as on a GPU, is two instructions, `-start` and `-done`; it is counted where it ends, as what comes
    out there is what a synchronous one would give. What is in a loop's body runs as often as the loop, where XLA knows that
    (`known_trip_count`); of a conditional's branches each is taken to run. Exchanges of a device with itself are left out.

    >>> text = '''HloModule m, num_partitions=4
    ... ENTRY %main (p: f32[8]) -> f32[32] {
    ...   %p = f32[8]{0} parameter(0)
    ...   %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}
    ...   ROOT %d = f32[32]{0} all-gather-done(%s)
    ... }'''
    >>> collectives(text)
    [Collective(kind='all-gather', arrays=('f32[32]',), devices=4, bytes=128, times=1)]
    """
    program = _parsed(hlo)
    times = _runs(program)
    header = hlo.partition("\n")[0]
    everyone = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header))
    found = []
    for name, instructions in program.bodies.items():
        begun = {x.name: x for x in instructions}
        for x in instructions:
            operation = _OPERATION.match(x.opcode)
            if operation is None or operation[2] == "-start" or name not in times:
                continue
            # Who takes part stands where an asynchronous one begins.
            start = begun.get(_first_operand(x.rest), x) if operation[2] else x
            devices = _devices(operation[1], start.rest, everyone)
            arrays = _ARRAY.findall(x.type)
            nbytes = sum(_bytes(dtype, dims) for dtype, dims in arrays)
            nbytes *= devices if operation[1] == "reduce-scatter" else 1
            if devices > 1:
                spelled = tuple(f"{dtype}[{dims}]" for dtype, dims in arrays)
                found.append(Collective(operation[1], spelled, devices, nbytes, times[name]))
    return found


def table(hlo: str) -> list[dict[str, Any]]:
    """The same for a JSON file: equal ones are one row with their `count`; the dearest first."""
    found = collections.Counter(collectives(hlo))
    rows = sorted(found.items(), key=lambda item: (-item[0].bytes * (item[0].times or 1) * item[1], item[0].kind))
    return [{**one._asdict(), "sent": one.sent, "count": count} for one, count in rows]


def totals(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of a `table`, by kind and in all (`"all"`): how many run a step, their bytes, and the bytes that each device sends.

    What runs an unknown number of times is counted once, and told as `unknown`: the others are then lower bounds.
    """
    found: dict[str, dict[str, float]] = {"all": {"runs": 0, "bytes": 0, "sent": 0, "unknown": 0}}
    for row in rows:
        runs = row["count"] * (1 if row["times"] is None else row["times"])
        for kind in ("all", row["kind"]):
            into = found.setdefault(kind, {"runs": 0, "bytes": 0, "sent": 0, "unknown": 0})
            into["runs"] += runs
            into["bytes"] += runs * row["bytes"]
            into["sent"] += runs * row["sent"]
            into["unknown"] += row["count"] if row["times"] is None else 0
    return found


# ---- reading the text ------------------------------------------------------------------------------------------------


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str
    """Behind the parenthesis that opens its operands."""


class _Program(NamedTuple):
    entry: str
    bodies: dict[str, list[_Instruction]]


def _parsed(hlo: str) -> _Program:
    """From each computation to its instructions."""
    entry, inside = "", ""
    bodies: dict[str, list[_Instruction]] = collections.defaultdict(list)
    for line in hlo.splitlines():
        if line[:1] not in ("", " ", "}") and (opened := _OPENS.match(line)):
            inside = opened[2]
            entry = inside if opened[1] else entry
        elif found := _INSTRUCTION.match(line):
            bodies[inside].append(_Instruction(*found.groups()))
    return _Program(entry, bodies)


def _runs(program: _Program) -> dict[str, int | None]:
    """How often each computation runs a step: the sum over its callers; those that nothing calls are left out."""
    found: dict[str, int | None] = {program.entry: 1}
    for name in _callers_first(program):
        of_caller = found[name]
        for called, rounds in _calls(program.bodies.get(name, [])):
            known = found.get(called, 0)
            unknown = None in (known, of_caller, rounds)
            found[called] = None if unknown else (known or 0) + (of_caller or 0) * (rounds or 0)
    return found


def _callers_first(program: _Program) -> list[str]:
    """Computations that run, each behind all that call it: HLO knows no recursion."""
    seen: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in seen:
            for called, _ in _calls(program.bodies.get(name, [])):
                visit(called)
            seen[name] = None  # behind all that it calls

    visit(program.entry)
    return list(reversed(seen))


def _calls(instructions: list[_Instruction]) -> Iterator[tuple[str, int | None]]:
    """What these call, and how many times each."""
    for x in instructions:
        if x.opcode == "while":
            trips = _TRIPS.search(x.rest)
            for name in _LOOP.findall(x.rest):
                yield name, int(trips[1]) if trips else None
            continue
        operation = _OPERATION.match(x.opcode)
        # Where the pair is written as `reduce-scatter-start`, the computation that it wraps says the same once more; one
        # written as `async-start` has it there alone, and its end names it again.
        if (operation and operation[2]) or x.opcode in ("async-update", "async-done"):
            continue
        for name in _CALLED.findall(x.rest):
            yield name, 1
        for names in _BRANCHES.findall(x.rest):
            for name in re.findall(r"[\w.-]+", names):
                yield name, 1


def _first_operand(rest: str) -> str:
    """The name that stands last in the first operand: `%s`, or `(f32[8], f32[32]) %s` where types are printed."""
    inside = re.match(r"((?:\([^()]*\)|[^(),])*)", rest)
    return (inside[1].split() or [""])[-1].lstrip("%") if inside else ""


def _devices(kind: str, rest: str, everyone: int) -> int:
    """How many devices take part in one exchange: groups are listed, tiled, or axes of a mesh, or all are one."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", rest.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
        return 2 if any(a != b for a, b in pairs) or not pairs else 1
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?=(\d+)", named[1])}
        # An axis may be cut: `'data':(1)4` is four of its devices.
        along = re.findall(r"'?([\w.]+)'?(?::\(\d+\)(\d+))?(?:,|$)", named[2].replace(" ", ""))
        return math.prod(int(part) if part else sizes.get(name, 1) for name, part in along)
    return everyone


def _bytes(dtype: str, dims: str) -> int:
    """Of one array; a token or a key has none."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    each = 8 if dtype == "pred" else int(bits[1]) if bits else 0
    return math.prod(int(n) for n in dims.split(",") if n) * each // 8
