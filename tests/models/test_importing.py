"""`engram models import` on files of the shapes that people bring: imported with the fewest flags, held against their owner's loop."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from engram_models.batching import ALONE, Batching
from engram_models.bundle import Bundle, load_bundle
from engram_models.commands import models
from engram_models.graph_step import GraphStep
from engram_models.importing.flags import Flags
from engram_models.importing.interface import Interface
from engram_models.importing.pairing import pair_states
from tests import zoo

FLAGS = {  # where the file alone does not say it
    "speech_activity": ["--constant", "sr=16000", "--context", "input=64", "--shape", "input=512"],
    "encoder_cache": ["--input", "length"],
    "chain_first": ["--state", "input_3=tf_op_layer_stack_2"],
    "time_first": ["--shape", "T=4"],
}


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    models.configure(parser)
    return models.run(parser.parse_args([str(word) for word in words]))


def bring(path: Path, *flags: object) -> Bundle:
    """Imported, or the test fails."""
    assert command("import", path, "--models", path.parent, *flags) == 0
    return load_bundle(path.parent / path.stem / "1")


def refused(capsys: pytest.CaptureFixture[str], path: Path, *flags: object) -> str:
    """What is said when it is refused; nothing is written then."""
    capsys.readouterr()
    assert command("import", path, "--models", path.parent, *flags) == 1
    assert not (path.parent / path.stem).exists()
    return capsys.readouterr().err


def served(bundle: Bundle, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Outputs [steps, rows, *shape] of inputs alike, all rows in one call."""
    schema = bundle.schema
    step = GraphStep(bundle.read_graph(), schema, ALONE if bundle.one_by_one else Batching())
    steps, rows = next(iter(inputs.values())).shape[:2]
    states: Any = bundle.initial_states(rows)
    found: dict[str, list[NDArray[Any]]] = {spec.name: [] for spec in schema.outputs}
    for number in range(steps):
        given = [np.ascontiguousarray(inputs[spec.name][number].reshape(rows, *spec.shape)) for spec in schema.inputs]
        outputs, states = step(given, states)
        for spec, value in zip(schema.outputs, outputs, strict=True):
            found[spec.name].append(value)
    return {name: np.array(several) for name, several in found.items()}


def check_case(case: zoo.Case, bundle: Bundle) -> None:
    inputs = case.draw(5, 3)
    wanted = case.run(inputs)
    for name, values in served(bundle, inputs).items():
        np.testing.assert_allclose(
            values.astype(np.float64),
            wanted[name].reshape(values.shape).astype(np.float64),
            rtol=1e-4,
            atol=1e-5,
            err_msg=name,
        )


@pytest.mark.parametrize("name", zoo.CASES)
def test_a_file_gives_what_its_owners_loop_gives(name: str, tmp_path: Path) -> None:
    case = zoo.CASES[name]()
    bundle = bring(case.write(tmp_path), *FLAGS.get(name, []))
    assert bundle.batch == case.batch
    assert bool(bundle.why) == bundle.one_by_one
    assert {spec.name for spec in bundle.schema.state} >= set(case.states)
    check_case(case, bundle)


@pytest.mark.parametrize("name", FLAGS)
def test_what_the_file_does_not_say_is_asked_for_by_flag(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zoo.CASES[name]().write(tmp_path)
    flags = FLAGS[name]
    said = refused(capsys, path)
    assert f"{flags[0]} {flags[1].partition('=')[0]}" in said


def test_the_table_says_what_each_tensor_is_and_how_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zoo.CASES["speech_activity"]().write(tmp_path)
    bring(path, *FLAGS["speech_activity"], "--json")
    found = json.loads(capsys.readouterr().out)
    rows = {row["tensor"]: row for row in found["tensors"]}
    assert rows["state"]["role"] == "recurrent"
    assert rows["state"]["paired_with"] == "stateN"
    assert rows["state"]["batch_axis"] == 1
    assert rows["sr"]["role"] == "constant"
    assert rows["input_context"]["role"] == "window"
    assert rows["input"]["shape"] == [512]
    assert "names state / stateN" in rows["state"]["how"]
    assert command("show", "speech_activity", "--models", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "sr int64 scalar, constant, by default 16000, shared" in shown
    assert "any batch" in shown


def test_show_says_that_a_batch_of_one_was_relabelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(zoo.CASES["robot_policy"]().write(tmp_path))
    capsys.readouterr()
    assert command("show", "robot_policy", "--models", tmp_path) == 0
    assert "relabelled" in capsys.readouterr().out


def test_show_says_why_a_model_is_run_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(zoo.CASES["quantised"]().write(tmp_path))
    capsys.readouterr()
    assert command("show", "quantised", "--models", tmp_path) == 0
    assert "one by one: outputs may depend on the batch" in capsys.readouterr().out


# What names and shapes do not make clear.


def cell(
    states: Sequence[tuple[str, str]], width: int = 8, dim: Any = "batch", data: str = "obs", **options: Any
) -> onnx.ModelProto:
    """x and states [B, width] -> y [B, 3] and new states, each other in its own way."""
    net = zoo.Net(30)
    total = net.linear(data, 5, width)
    for number, (given, taken) in enumerate(states):
        new = net.op("Add", total, net.op("Mul", given, net.const(0.5 + 0.1 * number)))
        total = net.op("Tanh", net.op("Add", new, net.const(0.1 * number)), out=taken)
    net.linear(total, width, 3, out="answer")
    kind = ("float32", [dim, width])
    return net.model(
        {data: ("float32", [dim, 5]), **{given: kind for given, _ in states}},
        {"answer": ("float32", [dim, 3]), **{taken: kind for _, taken in reversed(states)}}, **options,
    )  # fmt: skip


def write(model: onnx.ModelProto, folder: Path, name: str = "model") -> Path:
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    "states",
    [
        [("h_in", "h_out"), ("c_in", "c_out")],
        [("h0", "hn"), ("c0", "cn")],
        [("h", "h_n"), ("c", "c_n")],
        [("h_0", "h_1"), ("c_0", "c_1")],
        [("h", "new_h"), ("c", "new_c")],
        [("hidden_in", "hiddenOut"), ("cell_in", "cellOut")],
        [("state0", "next_state0"), ("state1", "next_state1")],
        [("state_0", "state_0_out"), ("state_1", "state_1_out")],
        [("past.0.key", "present.0.key"), ("past.1.key", "present.1.key")],
        [("prev_z", "next_z"), ("prev_a", "next_a")],
        [("in_cache0", "out_cache0"), ("in_cache1", "out_cache1")],
        [("hin", "hout"), ("cin", "cout")],
        [("serving_default_h_in:0", "h_out"), ("serving_default_c_in:0", "c_out")],
        [("layers.0/state", "layers.0/state_new"), ("layers.1/state", "layers.1/state_new")],
        [("cached_conv1_0", "new_cached_conv1_0"), ("cached_conv2_0", "new_cached_conv2_0")],
        [("past_key_values.0.key", "present.0.key"), ("past_key_values.0.value", "present.0.value")],
        [("r1i", "r1o"), ("r2i", "r2o")],
        [("h_enc", "enc_h"), ("c_enc", "enc_c"), ("h_dec", "dec_h")],
        [("conv_in", "conv_out"), ("h_in", "h_out")],
    ],
    ids=lambda states: states[0][0],
)
def test_states_of_equal_shape_are_paired_by_clear_names(states: list[tuple[str, str]]) -> None:
    assert pair_states(Interface.of(cell(states)), Flags()).outputs == dict(states)


@pytest.mark.parametrize(
    "states",
    [
        [("h", "17"), ("c", "18")],
        [("a", "p"), ("b", "q")],
        [("input_2", "Identity_1"), ("input_3", "Identity_2")],
        [("s1", "new_s"), ("s2", "new_state")],
    ],
    ids=lambda states: states[0][0],
)
def test_states_that_names_do_not_pair_are_doubted(states: list[tuple[str, str]]) -> None:
    found = pair_states(Interface.of(cell(states)), Flags())
    assert not found.outputs
    assert f"--state {states[0][0]}=" in " ".join(found.doubts)
    told = pair_states(Interface.of(cell(states)), Flags(states=dict(states)))
    assert told.outputs == dict(states)
    assert not told.doubts


def test_what_goes_in_and_out_beside_states_may_be_an_input_and_an_output() -> None:
    interface = Interface.of(
        cell([("left_in", "left_out"), ("right_in", "right_out"), ("h_in", "h_out")], data="boost")
    )
    found = pair_states(interface, Flags())
    assert found.outputs == {"h_in": "h_out"}
    assert "--state left_in=left_out or --input left_in" in found.doubts[0]
    assert "--state right_in=right_out or --input right_in" in found.doubts[1]
    told = pair_states(interface, Flags(inputs={"left_in"}, states={"right_in": "right_out"}))
    assert told.outputs == {"h_in": "h_out", "right_in": "right_out"}
    assert not told.doubts


def test_a_flag_wins_over_names_and_the_table_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(cell([("h_in", "h_out"), ("c_in", "c_out")]), tmp_path)
    bundle = bring(path, "--state", "h_in=c_out", "--state", "c_in=h_out")
    assert [line.partition(",")[0] for line in bundle.config["tensors"]][1:3] == [
        "recurrent h_in from c_out",
        "recurrent c_in from h_out",
    ]
    assert "though by its name it would be h_out" in capsys.readouterr().out


def test_what_a_flag_leaves_over_is_not_paired_against_its_name() -> None:
    interface = Interface.of(cell([("h_in", "h_out"), ("c_in", "c_out")]))
    found = pair_states(interface, Flags(states={"c_in": "h_out"}))
    assert found.outputs == {"c_in": "h_out"}
    assert "--state h_in=c_out" in found.doubts[0]


def test_swapped_states_are_refused_by_the_recorded_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = zoo.CASES["two_states"]()
    path = case.write(tmp_path)
    inputs = case.draw(6, 1)
    np.savez(tmp_path / "run.npz", **inputs, **case.run(inputs))  # type: ignore[arg-type]
    said = refused(capsys, path, "--state", "h=cn", "--state", "c=hn", "--verify", tmp_path / "run.npz")
    assert "step" in said
    bring(path, "--verify", tmp_path / "run.npz")
    assert "6 steps of 1 row came out as recorded" in capsys.readouterr().out


def test_a_state_that_nothing_pairs_is_not_taken_for_an_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = zoo.Net(31)
    net.linear(net.op("Add", "x", "hidden"), 6, 4, out="y")
    kind = ("float32", ["batch", 6])
    model = net.model({"x": kind, "hidden": kind}, {"y": ("float32", ["batch", 4])})
    said = refused(capsys, write(model, tmp_path))
    assert "--state hidden=" in said
    assert "--input hidden" in said


def test_a_file_without_a_state_is_told_what_may_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = zoo.Net(31)
    net.linear("x", 6, 6, out="y")
    kind = ("float32", ["batch", 6])
    said = refused(capsys, write(net.model({"x": kind}, {"y": kind}), tmp_path))
    assert "no state was found" in said
    assert "--context" in said
    assert "onnx.compose" in said


def test_a_fed_back_action_is_a_state_and_an_answer(tmp_path: Path) -> None:
    net = zoo.Net(32)
    both = net.op("Concat", "obs", "prev_action", axis=1)
    net.op("Tanh", net.linear(both, 8, 3), out="action")
    small = ("float32", ["N", 3])
    model = net.model({"obs": ("float32", ["N", 5]), "prev_action": small}, {"action": small})
    bundle = bring(write(model, tmp_path))
    assert [spec.name for spec in bundle.schema.outputs] == ["action"]
    assert [spec.name for spec in bundle.schema.state] == ["prev_action"]
    x = np.random.default_rng(1).standard_normal((3, 2, 5)).astype(np.float32)
    again = served(bundle, {"obs": x})["action"]
    assert not np.array_equal(again[0], again[1])


# Batch axes.


def test_time_that_is_called_batch_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An LSTM over a first dimension that somebody called batch: rows would be steps of one another."""
    path = write(over_time("batch"), tmp_path)
    said = refused(capsys, path)
    assert "--shape" in said
    bundle = bring(path, "--shape", "batch=4")
    assert bundle.schema.inputs[0].shape == (4, 6)
    assert bundle.one_by_one


def over_time(name: str | None) -> onnx.ModelProto:
    net = zoo.Net(33)
    w, r, b = net.weight(1, 36, 6), net.weight(1, 36, 12), net.weight(1, 72)
    frames = net.op("Unsqueeze", "x", net.const([1]))
    y, _ = net.ops("GRU", frames, w, r, b, "", "h0", outs=["all", "hn"], hidden_size=12)
    net.linear(net.op("Squeeze", y, net.const([1, 2])), 12, 3, out="y")
    return net.model(
        {"x": ("float32", [name, 6]), "h0": ("float32", [1, 1, 12])},
        {"y": ("float32", [name, 3]), "hn": ("float32", [1, 1, 12])},
    )


@pytest.mark.parametrize("name", ["T", "seq_len", None])
def test_time_is_no_batch(name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(over_time(name), tmp_path)
    assert "--shape x=" in refused(capsys, path)
    bundle = bring(path, "--shape", "x=2x6")
    assert bundle.schema.inputs[0].shape == (2, 6)
    assert bundle.one_by_one


def test_a_shape_without_the_batch_fits_where_two_dimensions_may_be_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = zoo.Net(34)
    net.op("ReduceMean", net.op("MatMul", net.weight(5, 8), "frames"), net.const([2]), keepdims=0, out="seen")
    net.op("Tanh", net.op("Add", "seen", "h"), out="y")
    net.op("Mul", "y", net.const(0.5), out="h_out")
    frames = ["frames_dynamic_axes_1", 8, "frames_dynamic_axes_2"]  # as torch names them
    inputs = {"frames": ("float32", frames), "h": ("float32", ["h_dynamic_axes_1", 5])}
    kind = ("float32", [frames[0], 5])
    path = write(net.model(inputs, {"y": kind, "h_out": kind}), tmp_path)
    assert "--shape frames=8xSIZE" in refused(capsys, path)
    bundle = bring(path, "--shape", "frames=8x3")
    assert (bundle.batch, bundle.schema.inputs[0].shape) == ("any", (8, 3))
    assert "--shape: dimension 1 of 'frames' is 8 in the file" in refused(
        capsys, path.rename(tmp_path / "other.onnx"), "--shape", "frames=7x3"
    )


def test_dimensions_without_names_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = zoo.Net(34)
    w, r, b = net.weight(1, 36, 6), net.weight(1, 36, 12), net.weight(1, 72)
    y, _ = net.ops("GRU", "x", w, r, b, "", "h0", outs=["all", "hn"], hidden_size=12)
    net.linear(net.op("Squeeze", y, net.const([1])), 12, 3, out="y")
    model = net.model(
        {"x": ("float32", [None, None, 6]), "h0": ("float32", [1, None, 12])},
        {"y": ("float32", [None, None, 3]), "hn": ("float32", [1, None, 12])},
    )
    path = write(model, tmp_path)
    assert "--shape x=" in refused(capsys, path)
    bundle = bring(path, "--shape", "x=4x6")
    assert bundle.batch == "any"
    assert bundle.schema.inputs[0].shape == (4, 6)
    assert [spec.shape for spec in bundle.schema.outputs] == [(4, 3)]


def test_a_state_without_a_batch_axis_makes_rows_go_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = zoo.Net(35)
    mean = net.op("ReduceMean", "x", net.const([0]), keepdims=0)
    net.op(
        "Add",
        net.op("Mul", "running_state", net.const(0.9)),
        net.op("Mul", mean, net.const(0.1)),
        out="running_state_out",
    )
    net.op("Sub", "x", "running_state_out", out="y")
    model = net.model(
        {"x": ("float32", ["batch", 6]), "running_state": ("float32", [6])},
        {"y": ("float32", ["batch", 6]), "running_state_out": ("float32", [6])},
    )
    path = write(model, tmp_path)
    assert "--shape batch=1" in refused(capsys, path)
    bundle = bring(path, "--shape", "batch=1")
    assert bundle.one_by_one
    assert "no batch axis" in bundle.why


def test_a_cache_that_grows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = zoo.Net(36)
    net.op("Concat", "past_key", net.linear("x", 6, 6), axis=1, out="present_key")
    net.op("ReduceMean", "present_key", net.const([1]), out="y", keepdims=0)
    model = net.model(
        {"x": ("float32", ["batch", 1, 6]), "past_key": ("float32", ["batch", "past", 6])},
        {"y": ("float32", ["batch", 6]), "present_key": ("float32", ["batch", "total", 6])},
    )
    assert "a state keeps its size" in refused(capsys, write(model, tmp_path), "--shape", "past=8")


def of_torch(outputs: Sequence[str], batch: Any = "s77") -> onnx.ModelProto:
    """As torch's exporter writes it without names: a sum that is kept, an answer that is a sum too, both called by operators."""
    net = zoo.Net(37)
    net.op("ReduceSum", net.op("Mul", "x", "sum"), net.const([1]), out=outputs[0], keepdims=1)
    net.op("Add", "sum", "x", out=outputs[1])
    one = ("float32", [batch, 1])
    model = net.model({"x": one, "sum": one}, dict.fromkeys(outputs, one))
    for node, name in zip(model.graph.node[1:], ("sum_1", "add"), strict=True):
        node.metadata_props.add(key="pkg.torch.onnx.fx_node", value=f"%{name} : [num_users=1] = call_function[...]")
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/somebody/secret.py", line 7')
    return model


def test_what_an_exporter_calls_by_its_operator_pairs_no_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(of_torch(["sum_1", "add"]), tmp_path)
    said = refused(capsys, path)
    assert "'sum' (float32 s77x1) may be a state whose next value is 'sum_1', 'add'" in said
    assert command("import", path, "--models", tmp_path / "other") == 1
    assert "with output_names=[...] at the export" in capsys.readouterr().out
    bundle = bring(path, "--state", "sum=add")
    assert bundle.batch == "any"
    assert b"secret" not in bundle.read_graph()


def test_outputs_that_are_called_like_data_are_named_where_nothing_else_fits() -> None:
    """Values of TorchScript have such names."""
    model = cell([("h", "x.31"), ("c", "x.56")], data="obs")
    assert all(
        "whose next value is 'x.56', 'x.31'" in doubt for doubt in pair_states(Interface.of(model), Flags()).doubts
    )


def test_names_that_are_given_at_the_export_pair_states(tmp_path: Path) -> None:
    bundle = bring(write(of_torch(["y", "sum_out"]), tmp_path))
    assert [spec.name for spec in bundle.schema.state] == ["sum"]
    assert [spec.name for spec in bundle.schema.outputs] == ["y"]


def test_rows_that_every_tensor_has_are_called_no_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = bring(write(cell([("h", "h_out")], dim=2), tmp_path))
    assert bundle.schema.inputs[0].shape == (2, 5)
    assert "a session has all 2" in capsys.readouterr().out
    bring(write(cell([("h", "h_out")]), tmp_path, "free"))
    assert "a session has all" not in capsys.readouterr().out


def test_a_number_beside_states_with_a_batch_axis_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = zoo.Net(38)
    net.op("Add", net.op("Mul", "h", "decay"), "x", out="h_out")
    net.op("Mul", "decay", net.const(0.9), out="decay_out")
    net.op("Neg", "h_out", out="y")
    row, one = ("float32", ["batch", 4]), ("float32", [])
    model = net.model({"x": row, "h": row, "decay": one}, {"y": row, "h_out": row, "decay_out": one})
    path = write(model, tmp_path)
    said = refused(capsys, path, "--state", "decay=decay_out")
    assert "the state 'decay' has no batch axis, and 'h' has 'batch'" in said
    assert "--shape batch=1" in said
    assert bring(path, "--state", "decay=decay_out", "--shape", "batch=1").one_by_one


# Values, windows, and what the graph has of its own.


def test_initial_values_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(cell([("h_in", "h_out"), ("c_in", "c_out")]), tmp_path)
    h = np.linspace(-1, 1, 8).astype(np.float32)
    np.savez(tmp_path / "wrong.npz", nothing=h)
    assert "the array 'nothing' is no state" in refused(capsys, path, "--initial", tmp_path / "wrong.npz")
    np.savez(tmp_path / "small.npz", h_in=h[:5])
    assert "has the shape 5" in refused(capsys, path, "--initial", tmp_path / "small.npz")
    np.savez(tmp_path / "initial.npz", h_in=h)
    bundle = bring(path, "--initial", tmp_path / "initial.npz")
    np.testing.assert_array_equal(bundle.initial(bundle.schema.state[0]), h)


@pytest.mark.parametrize("key", ["h_initial_value", "initial_value_of_h", "init.h", "default_state"])
def test_initial_values_come_from_metadata(key: str, tmp_path: Path) -> None:
    model = cell([("h", "h_out")], metadata={key: ", ".join(map(str, range(8)))})
    initial = bring(write(model, tmp_path)).initial_states(1)[0]
    assert initial[0].tolist() == list(range(8))


def test_initial_values_in_metadata_that_name_no_state_are_doubted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"init_vector": str(list(range(8))), "init_seed": "7", "default_model": "small"}
    path = write(cell([("h", "h_out"), ("c", "c_out")], metadata=metadata), tmp_path)
    said = refused(capsys, path)
    assert "'init_vector'" in said
    assert "--initial FILE.npz with 'h', 'c' in it" in said
    np.savez(tmp_path / "initial.npz", h=np.arange(8.0), c=np.zeros(8))
    bring(path, "--initial", tmp_path / "initial.npz")


def test_dimensions_of_1_that_broadcast_are_told_apart(tmp_path: Path) -> None:
    net = zoo.Net(33)
    kept = net.op("Mul", "ema", net.const(0.9))
    net.op("Sub", "x", net.op("Add", kept, net.op("Mul", "x", net.const(0.1)), out="ema_out"), out="y")
    kind = ("float32", [1, 1, 1])
    bundle = bring(write(net.model({"x": kind, "ema": kind}, {"y": kind, "ema_out": kind}), tmp_path))
    assert bundle.batch == "any"


def test_an_input_with_a_default_is_a_weight_or_a_state(tmp_path: Path) -> None:
    """As files of before IR 4 have them: every weight is an input too."""
    model = cell([("h_in", "h_out")])
    h = np.full((1, 8), 0.25, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(h, "h_in"))
    for tensor in list(model.graph.initializer):
        if tensor.name != "h_in":
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    model.ir_version = 3
    bundle = bring(write(model, tmp_path))
    assert [spec.name for spec in bundle.schema.inputs] == ["obs"]
    assert [(spec.name, spec.initial) for spec in bundle.schema.state] == [("h_in", 0.25)]


@pytest.mark.parametrize("opset", [9, 13, 18])
def test_windows_of_past_inputs_and_outputs(opset: int, tmp_path: Path) -> None:
    """y = mean of the last 6 numbers and of the last 4 answers."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("ReduceMean", ["answers"], ["before"], axes=[1], keepdims=1),
        helper.make_node("Add", ["mean", "before"], ["y"]),
    ] if opset < 18 else [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("ReduceMean", ["answers", "axes"], ["before"], keepdims=1),
        helper.make_node("Add", ["mean", "before"], ["y"]),
    ]  # fmt: skip
    kinds = {"x": ["N", 6], "answers": ["N", 4]}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in kinds.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 1])],
        [onnx.numpy_helper.from_array(np.array([1]), "axes")] if opset >= 18 else [],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    bundle = bring(write(model, tmp_path), "--context", "x=4", "--context", "answers=y:4")
    assert [spec.shape for spec in bundle.schema.inputs] == [(2,)]
    assert {spec.name: (spec.role, spec.shape) for spec in bundle.schema.state} == {
        "answers": ("window", (4,)), "x_context": ("window", (4,)),
    }  # fmt: skip
    x = np.random.default_rng(3).standard_normal((7, 3, 2)).astype(np.float32)
    got = served(bundle, {"x": x})["y"]
    past, answers = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    for number in range(7):
        whole = np.concatenate([past, x[number]], 1)
        y = whole.mean(1, keepdims=True) + answers.mean(1, keepdims=True)
        np.testing.assert_allclose(got[number], y, atol=1e-6)
        past, answers = whole[:, -4:], np.concatenate([answers, y], 1)[:, -4:]


def test_names_that_are_in_the_way(tmp_path: Path) -> None:
    """Tensors within the graph have the names that the new one's get; an If reads a state that is transposed; a constant is given back."""
    net = zoo.Net(37)
    first = net.op("Gather", "h_in", net.const(0), axis=0, out="next_h_in")
    flag = net.op("Greater", "gain", net.const(0.0))

    def branch(name: str, scale: float) -> onnx.GraphProto:
        inner = zoo.Net(38, name)
        out = inner.op("Mul", "h_in", inner.const(scale), out=f"h_in.graph{'' if scale > 1 else '_2'}")
        return helper.make_graph(
            inner.nodes, name, [], [helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None)], inner.weights
        )

    net.ops("If", flag, outs=["scaled"], then_branch=branch("a", 2.0), else_branch=branch("b", 0.5))
    net.op("Tanh", net.op("Add", "scaled", net.op("Unsqueeze", "x y", net.const([0]))), out="h_out")
    net.op("Add", first, "x y", out="y")
    net.op("Identity", "gain", out="gain_used")
    state = ("float32", [2, "N", 4])
    model = net.model(
        {"x y": ("float32", ["N", 4]), "h_in": state, "gain": ("float32", [])},
        {"y": ("float32", ["N", 4]), "h_out": state, "gain_used": ("float32", [])},
    )
    bundle = bring(write(model, tmp_path), "--constant", "gain=1.5")
    assert [spec.name for spec in bundle.schema.inputs] == ["x_y"]
    x = np.random.default_rng(3).standard_normal((4, 3, 4)).astype(np.float32)
    got = served(bundle, {"x_y": x})["y"]
    h = np.zeros((2, 3, 4), np.float32)
    for number in range(4):
        np.testing.assert_allclose(got[number], h[0] + x[number], atol=1e-6)
        h = np.tanh(2 * h + x[number][None])


# Flags and files that are wrong.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--state", "h_in"], "--state IN=OUT"),
        (["--state", "nothing=h_out"], "no tensor 'nothing'"),
        (["--state", "h_in=nothing"], "no output 'nothing'"),
        (["--state", "h_in=answer"], "a state goes out as it came in"),
        (["--batch-axis", "h_in=7"], "it has 2 dimensions"),
        (["--batch-axis", "h_in=1"], "that dimension is 8"),
        (["--batch-axis", "h_in=x"], "is not a whole number"),
        (["--constant", "h_in=abc"], "is not a number"),
        (["--constant", "h_in=[[1],[2,3]]"], "must have equal lengths"),
        (["--context", "obs=5"], "nothing would be left"),
        (["--context", "obs=0"], "at least 1"),
        (["--shape", "obs=7"], "is 5 in the file"),
        (["--shape", "obs=5x5x5"], "it has 2 dimensions"),
        (["--initial", "/nothing.npz"], "cannot be read"),
        (["--verify", "/nothing.npz"], "cannot be read"),
        (["--name", "a b"], "name and version are"),
        (["--version", "../1"], "name and version are"),
        (["--constant", "h_in=1", "--state", "h_in=h_out"], "it can be one of them"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_are_refused_in_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, write(cell([("h_in", "h_out")]), tmp_path), *flags)
    assert words in said
    assert len(said.splitlines()) <= 2


def test_a_version_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(cell([("h_in", "h_out")]), tmp_path)
    bring(path)
    capsys.readouterr()
    assert command("import", path, "--models", tmp_path) == 1
    assert "--version" in capsys.readouterr().err
    assert command("import", path, "--models", tmp_path, "--version", "2") == 0


@pytest.mark.parametrize("way", ["a file", "not ours to write"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    if way == "a file":
        place.write_text("")
    elif os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    else:
        place.mkdir(0o500)
    assert command("import", tmp_path / "not-read.onnx", "--models", place / "models") == 1
    assert f"{place} {'is no directory' if way == 'a file' else 'cannot be written'}" in capsys.readouterr().err


def test_a_loop_without_an_end_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_models.importing.axes.SECONDS", 2.0)
    assert "ran for more than 2 s" in refused(capsys, zoo.endless().write(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupted", "ended"])
def test_an_import_that_is_stopped_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    path = zoo.endless().write(tmp_path)
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "engram", "models", "import", str(path), "--models", str(tmp_path / "models")]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + 60
    while not list((tmp_path / "temporary").glob("engram-import-*/call.json")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert said.count("\n") == (number == signal.SIGINT), said
    assert not list((tmp_path / "temporary").glob("engram-*"))
    assert not (tmp_path / "models").exists()


def test_a_chain_of_two_files_is_merged_first(tmp_path: Path) -> None:
    """As the hint says: onnx.compose names an operator set twice."""
    first, second = zoo.chain()
    merged = onnx.compose.merge_models(
        first.model, onnx.compose.add_prefix(second.model, "second/"), io_map=[("activation_2", "second/input_4")]
    )
    bundle = bring(write(merged, tmp_path), "--state", "input_3=tf_op_layer_stack_2")
    assert [spec.name for spec in bundle.schema.state] == ["input_3", "second/past"]
    inputs = first.draw(4, 2)
    middle = first.run(inputs)["activation_2"]
    wanted = second.run({"input_4": middle})["PartitionedCall_0"]
    got = served(bundle, inputs)["second/PartitionedCall_0"]
    np.testing.assert_allclose(got, wanted.reshape(got.shape), atol=1e-5)
