"""From a graph and the user's flags to a proposal: what each tensor is for a session. Called by the import, before axes.py.

Whoever serves a model with a wrong role serves wrong numbers without an error. So what is not clear becomes a doubt, and with one
doubt nothing is written.
"""

from __future__ import annotations

from engram_models.importing.errors import ImportRefusedError, shown
from engram_models.importing.flags import Flags
from engram_models.importing.interface import GraphTensor, Interface
from engram_models.importing.names import is_data, is_length, is_rate
from engram_models.importing.pairing import Pairs, no_state, pair_states
from engram_models.importing.proposal import Line, Proposal


def propose(interface: Interface, flags: Flags) -> Proposal:
    """Roles of all tensors, without batch axes and shapes.

    Raises ImportRefusedError where flags contradict the file or another flag."""
    pairs = pair_states(interface, flags)
    proposal = Proposal([], doubts=list(pairs.doubts), notes=list(pairs.notes))
    lines = [line for t in interface.inputs if (line := _line(t, flags, pairs, proposal)) is not None]
    inputs = [line for line in lines if line.role == "input"]
    windows = [_window(line, flags.contexts[line.tensor], interface) for line in inputs if line.context]
    states = [line for line in lines if line.is_state] + windows
    outputs = _outputs(interface, flags, pairs, proposal)
    proposal.lines = [*inputs, *states, *outputs]
    if not states and not proposal.doubts:
        proposal.doubts.append(no_state(interface))
    if not inputs and not proposal.doubts:
        proposal.doubts.append(
            "every input is taken for a state: name the one that a step takes with --input "
            f"{interface.inputs[0].name if interface.inputs else 'NAME'}"
        )
    return proposal


def _line(tensor: GraphTensor, flags: Flags, pairs: Pairs, proposal: Proposal) -> Line | None:
    name = tensor.name
    line = Line(name, "input", tensor.dtype, tensor.dims)
    if name in pairs.outputs:
        counts = tensor.whole and tensor.dims is not None and len(tensor.dims) <= 1
        line.role, line.output = "counter" if counts else "recurrent", pairs.outputs[name]
        line.how.append(pairs.how[name])
    elif name in flags.constants:
        line.role = "constant"
        line.how.append("flag --constant")
    elif name in flags.feedbacks:
        line.role, (line.output, line.context) = "window", flags.feedbacks[name]
        line.how.append("flag --context")
    elif name in flags.inputs or name in flags.contexts:
        line.context = flags.contexts.get(name, 0)
        line.how.append("flag --input" if name in flags.inputs else "flag --context")
    elif tensor.default:
        return None  # a weight, or a default that stays what it is
    else:
        if doubt := _doubt(tensor, proposal):
            proposal.doubts.append(doubt)
        line.how.append("named like data" if is_data(name) else "no output is its next value")
    return line


def _doubt(tensor: GraphTensor, proposal: Proposal) -> str:
    """What is one number may be set once for a session or given with each step."""
    name, said = tensor.name, f"{shown(tensor.name)} ({tensor.dtype} {tensor.shape_words})"
    if any(doubt.startswith(shown(name)) for doubt in proposal.doubts):
        return ""
    few = tensor.dims is not None and len(tensor.dims) <= 1
    if tensor.whole and few and is_rate(name):
        return f"{said} is the same for a whole session: --constant {name}=16000, or what rate it is"
    if tensor.whole and few and is_length(name):
        return f"{said} is the length of a step's input: --constant {name}=LENGTH where it is always the same, else --input {name}"
    single = tensor.one_element and len(tensor.dims or ()) <= 1
    if single and not is_data(name):
        return (
            f"{said} is one number: --constant {name}=VALUE if a session keeps it, --input {name} if each step gives it"
        )
    return ""


def _window(line: Line, size: int, interface: Interface) -> Line:
    name = f"{line.tensor}_context"
    taken = {t.name for t in (*interface.inputs, *interface.outputs)}
    while name in taken:
        name += "_"
    return Line(name, "window", line.dtype, None, of=line.tensor, context=size, how=["flag --context"])


def _outputs(interface: Interface, flags: Flags, pairs: Pairs, proposal: Proposal) -> list[Line]:
    states = set(pairs.outputs.values())
    answers = [t for t in interface.outputs if t.name not in states or t.name in flags.outputs | pairs.answers]
    if not answers and len(states) == 1:
        answers = [
            t for t in interface.outputs if t.name in states
        ]  # the state is all that it gives: it is the answer, too
    if not answers and states and not proposal.doubts:
        raise ImportRefusedError(
            f"all outputs are states; name the one that answers a step as well: --output {interface.outputs[0].name}"
        )
    how = {True: ["also a state"], False: ["no input takes it"]}
    return [Line(t.name, "output", t.dtype, t.dims, how=how[t.name in states]) for t in answers]
