"""Which output is the next value of which input. By flags, by clear names, or where nothing else has its shape; never by order.

Whatever is left open becomes a doubt that names the flag. Called by roles.py; pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.flags import Flags
from engram_models.importing.interface import GraphTensor, Interface
from engram_models.importing.names import is_data, is_kept, is_length, is_rate, names_pair, says_nothing, says_time

_NAMED_MOST = 6


@dataclass(slots=True)
class Pairs:
    outputs: dict[str, str] = field(default_factory=dict)  # of each state
    how: dict[str, str] = field(default_factory=dict)
    answers: set[str] = field(default_factory=set)  # outputs that are states and answers as well
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pair_states(interface: Interface, flags: Flags) -> Pairs:
    """Raises ImportRefusedError where flags contradict the file."""
    pairs = Pairs()
    outputs = {t.name: t for t in interface.outputs}
    named = _by_names(interface.inputs, interface.outputs)
    _by_flags(interface, flags, named, pairs)
    told = flags.inputs | set(flags.constants) | set(flags.feedbacks) | set(flags.contexts)
    open_inputs = [t for t in interface.inputs if t.name not in told and t.name not in pairs.outputs]
    open_outputs = [t for t in interface.outputs if t.name not in pairs.outputs.values()]
    found = _by_names(open_inputs, open_outputs)
    _take_names(found, open_inputs, flags, outputs, pairs)
    left = [t for t in open_inputs if t.name not in pairs.outputs and not t.default]
    free = [t for t in open_outputs if t.name not in pairs.outputs.values() and t.name not in flags.outputs]
    given = [t for t in interface.inputs if t.name in flags.inputs | set(flags.contexts)]
    _by_shape(left, free, given, named, pairs)
    _doubt(left, free, given, pairs)
    if pairs.doubts and (mute := [shown(t.name) for t in free if t.mute and t.name not in pairs.outputs.values()]):
        pairs.notes.append(
            f"{', '.join(mute[:_NAMED_MOST])}: so torch's exporter calls them; with output_names=[...] at the export, "
            "such as h_out for h, names pair the states"
        )
    return pairs


def fits(given: GraphTensor, taken: GraphTensor) -> bool:
    """Whether their types are equal and their dimensions can be."""
    if given.dtype != taken.dtype:
        return False
    if given.dims is None or taken.dims is None:
        return True
    return len(given.dims) == len(taken.dims) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(given.dims, taken.dims, strict=True)
    )


def _by_flags(interface: Interface, flags: Flags, named: dict[str, str], pairs: Pairs) -> None:
    inputs, outputs = {t.name: t for t in interface.inputs}, {t.name: t for t in interface.outputs}
    for name, output in flags.states.items():
        if not fits(inputs[name], outputs[output]):
            raise ImportRefusedError(
                f"--state {name}={output}: {shown(name)} is {_type(inputs[name])} and {shown(output)} is {_type(outputs[output])}; "
                "a state goes out as it came in"
            )
        pairs.outputs[name], pairs.how[name] = output, "flag --state"
        if named.get(name, output) != output:
            pairs.how[name] += f", though by its name it would be {named[name]}"


def _by_names(inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]) -> dict[str, str]:
    """Pairs that names make clear: the clearest first, and of equally clear ones only those without a rival."""
    found: dict[str, str] = {}
    graded = [(names_pair(a.name, b.name), a, b) for a in inputs for b in outputs if fits(a, b) and not b.mute]
    for grade in (1, 2, 3, 4):
        edges = [(a.name, b.name) for clear, a, b in graded if clear == grade]
        edges = [(a, b) for a, b in edges if a not in found and b not in found.values()]
        ins, outs = [a for a, _ in edges], [b for _, b in edges]
        found.update({a: b for a, b in edges if ins.count(a) == 1 and outs.count(b) == 1})
    return found


def _take_names(
    found: dict[str, str], inputs: Sequence[GraphTensor], flags: Flags, outputs: dict[str, GraphTensor], pairs: Pairs
) -> None:
    """All that names pair but `frame_in`, `frame_out`: what is named like data is data, unless a name says that it is of before.

    `left_in`, `left_out` are a state only where another input is data by its name.
    """
    by_name = {t.name: t for t in inputs}
    timed = {a for a, b in found.items() if says_time(a) or says_time(b)}
    weak = {a for a in found if is_data(a) and a not in timed}
    others = flags.inputs | set(flags.contexts)
    others |= {t.name for t in inputs if t.name not in found and not t.default and not (t.whole and t.one_element)}
    unsure = {a for a, b in found.items() if not is_kept(a) and not is_kept(b) and a not in timed | weak}
    if weak or flags.contexts or any(is_data(name) for name in others):
        unsure = set()
    for name, output in found.items():
        if output in flags.outputs and not says_time(name):
            continue
        if name not in weak | unsure:
            if not by_name[name].default or is_kept(name):
                pairs.outputs[name], pairs.how[name] = output, f"names {name} / {output}"
                if is_data(output) and not says_time(output):
                    pairs.answers.add(output)  # prev_action / action: what is fed back is an answer, too
        elif others and (name in unsure or not flags.states):
            pairs.doubts.append(
                f"{shown(name)} and {shown(output)} may be a state, or an input and an output: "
                f"--state {name}={output} or --input {name}"
            )


def _by_shape(
    left: list[GraphTensor],
    free: list[GraphTensor],
    told: Sequence[GraphTensor],
    named: dict[str, str],
    pairs: Pairs,
) -> None:
    """A pair whose type and shape no other open input or output has, where a name says that it is kept and something else is data.

    What is only left over, because a flag took the output that its name pairs it with, is a doubt.

    Names that say nothing are enough where there is no other such pair: two of them may as well be an input and its answer.
    """
    numbers = [t for t in left if not _scalar(t) and t.dims is not None]
    only: list[tuple[GraphTensor, GraphTensor]] = []
    for tensor in numbers:
        takers = [t for t in free if fits(tensor, t)]
        if tensor.name in named or any(t.name in named.values() for t in takers):
            continue
        if len(takers) == 1 and takers[0].dims is not None and sum(fits(t, takers[0]) for t in numbers) == 1:
            only.append((tensor, takers[0]))
    likely = [(a, b) for a, b in only if not is_data(a.name) and not is_data(b.name) and not is_length(a.name)]
    for tensor, taker in likely:
        data = [t for t in numbers if t is not tensor and t.name not in pairs.outputs] + list(told)
        mute = says_nothing(tensor.name) and (is_kept(taker.name) or (says_nothing(taker.name) and len(likely) == 1))
        if data and (is_kept(tensor.name) or mute):
            pairs.outputs[tensor.name] = taker.name
            pairs.how[tensor.name] = f"only {taker.name} has its type and shape"


def _doubt(left: list[GraphTensor], free: list[GraphTensor], told: Sequence[GraphTensor], pairs: Pairs) -> None:
    """What is named like a state, or shaped like an output, and was not paired; but for the only one that may be the input."""
    open_inputs = [t for t in left if t.name not in pairs.outputs and not _scalar(t)]
    only = open_inputs[0] if len(open_inputs) == 1 and not told else None
    outputs = [t for t in free if t.name not in pairs.outputs.values()]
    for tensor in left:
        if tensor.name in pairs.outputs or any(shown(tensor.name) in doubt for doubt in pairs.doubts):
            continue
        able = [t for t in outputs if fits(tensor, t)]
        takers = [t for t in able if t.mute or not is_data(t.name)]
        kept = is_kept(tensor.name) and not is_data(tensor.name) and not is_rate(tensor.name)
        if _scalar(tensor) and not kept:
            if takers and not (is_rate(tensor.name) or is_length(tensor.name)):
                pairs.doubts.append(_which(tensor, takers, f", --constant {tensor.name}=VALUE"))
            continue
        if is_data(tensor.name) or is_length(tensor.name) or not (kept or takers):
            continue
        if tensor is only and pairs.outputs and not kept:
            continue
        single = tensor.one_element and len(tensor.dims or ()) <= 1
        pairs.doubts.append(_which(tensor, takers or able, f", --constant {tensor.name}=VALUE" if single else ""))


def _which(tensor: GraphTensor, takers: Sequence[GraphTensor], more: str = "") -> str:
    if not takers:
        return (
            f"{shown(tensor.name)} ({_type(tensor)}) is named like a state, and no output that is left has its type and shape: "
            f"--state {tensor.name}=OUTPUT, --input {tensor.name} where a step takes it, or --constant {tensor.name}=VALUE"
        )
    names = ", ".join(shown(t.name) for t in takers[:_NAMED_MOST]) + (" ..." if len(takers) > _NAMED_MOST else "")
    flag = f"--state {tensor.name}={takers[0].name if len(takers) == 1 else 'OUTPUT'}"
    return (
        f"{shown(tensor.name)} ({_type(tensor)}) may be a state whose next value is {names}, and names do not say: "
        f"{flag}{more} or --input {tensor.name}"
    )


def no_state(interface: Interface) -> str:
    """What may be meant where a file has no state at all."""
    takes = [t for t in interface.inputs if not t.default][:_NAMED_MOST]
    gives = interface.outputs[:_NAMED_MOST]
    return (
        f"no state was found: it takes {_listed(takes)} and gives {_listed(gives)}. Name what it keeps with --state IN=OUT, "
        "or keep its past inputs with --context INPUT=K. A model in two files is merged first: onnx.compose.merge_models"
    )


def _listed(tensors: Sequence[GraphTensor]) -> str:
    return ", ".join(f"{shown(t.name)} ({_type(t)})" for t in tensors) or "nothing"


def _scalar(tensor: GraphTensor) -> bool:
    return tensor.whole and tensor.one_element


def _type(tensor: GraphTensor) -> str:
    return f"{tensor.dtype} {tensor.shape_words}"
