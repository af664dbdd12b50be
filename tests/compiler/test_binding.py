"""The cut by binding times: what goes into which program, and that the programs in turn give the whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import ancestors, contents, feed, graph_of, operators, run, session
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from controlrt.compiler.binding import LAYOUT, STAGES, Stage, cut, dependencies
from controlrt.compiler.compile import LABELS, Passes, load_program, one_picture
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.compiler.passes.geglu import Geglu
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.compiler.passes.upsample_convolution import UpsampleConvolution
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.profile import ShapeProfile

RNG = np.random.default_rng(0)
INPUTS = "float[batch, 4] latents, int64[rows] rows, float[batch, 4] timestep, float[rows, 4] prompt_embeds"
INPUTS += ", float[rows, 4] ip_embeds, float[batch, 4] hint"
OF = {"timestep": "timestep", "prompt_embeds": "prompt", "ip_embeds": "image", "hint": "hint", "rows": LAYOUT}
CONSTANTS: dict[str, NDArray[Any]] = {
    "kernel": RNG.standard_normal((4, 4), np.float32),
    "wide": RNG.standard_normal((4, 6), np.float32),
    "half": np.array(0.5, np.float32),
    "shape_22": np.array([0, 2, 2]),
    "shape_4": np.array([0, 4]),
    "ends": np.array([2, 3]),
    "sides": np.array([1, 4, 5, 5]),
    "repeats": np.array([1, 3]),
    "first": np.array([0, 0, 0, 0, 1]),
    "minus_1": np.array([-1]),
    "zero_1": np.array([0]),
    "one_1": np.array([1]),
    "two_1": np.array([2]),
}


def step_of(body: str, outputs: str = "float[rows, n] y", inputs: str = INPUTS) -> ir.Model:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return graph_of(inputs, outputs, body, **{name: value for name, value in CONSTANTS.items() if name in words})


def values_of(batch: int, index: list[int], seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    names = {"latents": batch, "timestep": batch, "hint": batch} | dict.fromkeys(
        ("prompt_embeds", "ip_embeds"), len(index)
    )
    values = {name: rng.standard_normal((count, 4), np.float32) for name, count in names.items()}
    return values | {"rows": np.array(index)}


def run_stages(programs: Mapping[str, ir.Model], values: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """As the runtime does: every entry of an early stage by itself, what it gives laid out by picture or row."""
    values = dict(values)
    made: dict[str, NDArray[Any]] = {}
    for stage, model in programs.items():
        running = session(model)
        if stage == "step":
            made |= feed(running, values | made)
            continue
        given = dict(values)
        if stage == "prompt_timestep":
            given["timestep"] = values["timestep"][values["rows"]]
        wanted = [tensor.name for tensor in running.get_inputs()]
        assert "rows" not in wanted
        entries = len(given[wanted[0]])
        parts = [feed(running, {name: given[name][[entry]] for name in wanted}) for entry in range(entries)]
        made |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return made


def assert_same_as_whole(model: ir.Model, found: Mapping[Stage, ir.Model], values: dict[str, NDArray[Any]]) -> None:
    expected = run(model, **values)
    made = run_stages(found, values)
    for name, value in expected.items():
        # one entry at a time may take another kernel than the whole batch: float32 rounding
        np.testing.assert_allclose(made[name], value, rtol=0, atol=2e-6 * max(np.abs(value).max(), 1e-3))


def names(values: Any) -> list[str]:
    return [value.name for value in values]


SETS = {
    "t": "t = Neg (timestep)",
    "two of a kind": "t = Mul (timestep, timestep)",
    "p": "t = MatMul (prompt_embeds, kernel)",
    "both": "e = Gather <axis = 0> (timestep, rows) t = Add (e, prompt_embeds)",
    "h": "t = Tanh (hint)",
    "hint and timestep": "t = Add (hint, timestep)",
    "latents": "t = Add (latents, timestep)",
    "constants": "a = Neg (kernel) t = Abs (a)",
    "index": "t = Shape (rows)",
    "optional input left out": "t = Clip (hint, , half)",
    "both outputs of a node": "s, t = Split <axis = 1, num_outputs = 2> (hint)",
}
EXPECTED = {
    "t": {"timestep"},
    "two of a kind": {"timestep"},
    "p": {"prompt"},
    "both": {"timestep", "prompt", LAYOUT},
    "h": {"hint"},
    "hint and timestep": {"hint", "timestep"},
    "latents": {"step", "timestep"},
    "constants": set(),
    "index": {LAYOUT},
    "optional input left out": {"hint"},
    "both outputs of a node": {"hint"},
}


@pytest.mark.parametrize("name", SETS)
def test_what_values_depend_on(name: str) -> None:
    model = step_of(f"{SETS[name]} y = Identity (latents)".replace(", ,", ', "",'))
    found = {value.name: labels for value, labels in dependencies(model.graph, OF).items()}
    assert found["t"] == EXPECTED[name]
    assert found["latents"] == found["y"] == {"step"}


EVERY_STAGE = """
    t = MatMul (timestep, kernel)
    p = MatMul (prompt_embeds, wide)
    te = Gather <axis = 0> (t, rows)
    pt = Mul (te, prompt_embeds)
    i = MatMul (ip_embeds, kernel)
    h = Tanh (hint)
    x = Mul (latents, t)
    xh = Add (x, h)
    xr = Gather <axis = 0> (xh, rows)
    xi = Mul (xr, i)
    a = Sub (xi, pt)
    y = Concat <axis = 1> (a, p)"""


def test_every_stage() -> None:
    model = step_of(EVERY_STAGE, "float[rows, 10] y")
    found = cut(model, OF)
    assert list(found) == list(STAGES)
    inputs = {stage: names(program.graph.inputs) for stage, program in found.items()}
    outputs = {stage: names(program.graph.outputs) for stage, program in found.items()}
    assert inputs == {
        "timestep": ["timestep"],
        "prompt": ["prompt_embeds"],
        "prompt_timestep": ["timestep", "prompt_embeds"],
        "image": ["ip_embeds"],
        "hint": ["hint"],
        "step": ["latents", "rows", "timestep_0", "prompt_0", "prompt_timestep_0", "image_0", "hint_0"],
    }
    assert outputs == {
        "timestep": ["timestep_0"],
        "prompt": ["prompt_0"],
        "prompt_timestep": ["prompt_timestep_0"],
        "image": ["image_0"],
        "hint": ["hint_0"],
        "step": ["y"],
    }
    step = found["step"]
    assert sorted(operators(step)) == sorted(["Mul", "Add", "Gather", "Mul", "Sub", "Concat"])
    shapes = {value.name: list(value.shape) for value in step.graph.inputs}
    assert shapes["timestep_0"] == ["batch", 4]
    assert shapes["prompt_0"] == ["rows", 6]
    assert shapes["prompt_timestep_0"] == ["rows", 4]
    assert shapes["image_0"] == ["rows", 4]
    assert shapes["hint_0"] == ["batch", 4]
    for stage, axis in (
        ("timestep", "steps"),
        ("prompt", "prompts"),
        ("prompt_timestep", "entries"),
        ("image", "prompts"),
        ("hint", "batch"),
    ):
        program = found[stage]
        for value in (*program.graph.inputs, *program.graph.outputs):
            assert value.shape[0] == axis, stage
    for batch, index in ((1, [0]), (1, [0, 0]), (2, [0, 1, 0, 1]), (3, [2, 2, 0, 1])):
        assert_same_as_whole(model, found, values_of(batch, index))


def test_the_model_passed_in_is_untouched() -> None:
    model = step_of(EVERY_STAGE, "float[rows, 10] y")
    before = contents(model)
    cut(model, OF)
    assert contents(model) == before


def test_only_the_step() -> None:
    model = step_of("y = Neg (latents)")
    found = cut(model, OF)
    assert list(found) == ["step"]
    assert names(found["step"].graph.inputs) == ["latents"]


def test_an_early_input_read_as_it_is() -> None:
    """It crosses like a computed value, so the plan sees one kind of thing."""
    model = step_of("y = Add (latents, prompt_embeds)")
    found = cut(model, OF)
    assert operators(found["prompt"]) == ["Identity"]
    assert names(found["step"].graph.inputs) == ["latents", "prompt_0"]
    assert_same_as_whole(model, found, values_of(2, [0, 1]))


PACKED = """
    a = MatMul (timestep, kernel) b = MatMul (timestep, wide) c = Tanh (a)
    x = Mul (latents, a) y0 = Concat <axis = 1> (x, b) y = Concat <axis = 1> (y0, c)"""


def test_values_of_one_kind_cross_as_one() -> None:
    model = step_of(PACKED, "float[batch, 14] y")
    found = cut(model, OF)
    (packed,) = found["timestep"].graph.outputs
    assert list(packed.shape) == ["steps", 14]
    assert names(found["step"].graph.inputs) == ["latents", "timestep_0"]
    assert operators(found["step"]).count("Split") == 1
    assert_same_as_whole(model, found, values_of(3, [0, 1, 2]))


APART = {
    "another rank": (
        "a = MatMul (timestep, kernel) b = Reshape (a, shape_22) c = MatMul (b, b)",
        "float[batch, 4] y",
        "d = Reshape (c, shape_4) e = Relu (a) f = Mul (latents, e) g = Reshape (f, shape_22) h = MatMul (g, c) "
        "y = Reshape (h, shape_4)",
    ),
    "another type": (
        "a = MatMul (timestep, kernel) b = Cast <to = 11> (a)",
        "float[batch, 4] y",
        "c = Mul (latents, a) d = Cast <to = 11> (c) e = Add (d, b) y = Cast <to = 1> (e)",
    ),
    "another extent further on": (
        "a = Reshape (timestep, shape_22) b = Transpose <perm = [0, 2, 1]> (a) u = Concat <axis = 2> (b, a)",
        "float[batch, 2, 4] y",
        "x = Reshape (latents, shape_22) v = Mul (x, b) w = Concat <axis = 2> (v, x) y = Mul (w, u)",
    ),
    "a vector": (
        "a = MatMul (timestep, kernel) s = ReduceSum <keepdims = 0> (timestep, one_1)",
        "float[batch, 4] y",
        "x = Mul (latents, a) z = ReduceSum <keepdims = 0> (latents, one_1) v = Mul (z, s) u = Unsqueeze (v, one_1) "
        "y = Add (x, u)",
    ),
}


@pytest.mark.parametrize(("early", "outputs", "late"), APART.values(), ids=APART)
def test_values_of_several_kinds_cross_apart(early: str, outputs: str, late: str) -> None:
    model = step_of(f"{early} {late}", outputs)
    found = cut(model, OF)
    assert names(found["timestep"].graph.outputs) == ["timestep_0", "timestep_1"]
    assert_same_as_whole(model, found, values_of(3, [0, 1, 2]))


def test_stages_are_packed_by_themselves() -> None:
    """Values of one shape, but not of one stage."""
    model = step_of("a = Neg (timestep) b = Neg (hint) c = Mul (latents, a) y = Add (c, b)", "float[batch, 4] y")
    found = cut(model, OF)
    assert names(found["step"].graph.inputs) == ["latents", "timestep_0", "hint_0"]
    assert_same_as_whole(model, found, values_of(2, [0, 1]))


def test_an_expansion_stays_behind_the_cut() -> None:
    """One entry per picture crosses, and all values that are expanded are expanded at once."""
    model = step_of(
        "a = MatMul (timestep, kernel) b = Tanh (a) ar = Gather <axis = 0> (a, rows) br = Gather <axis = 0> (b, rows) "
        "br2 = Gather <axis = 0> (b, rows) x = Gather <axis = 0> (latents, rows) c = Mul (x, ar) d = Add (c, br) "
        "y = Sub (d, br2)"
    )
    found = cut(model, OF)
    step = found["step"]
    (packed,) = (value for value in step.graph.inputs if value.name == "timestep_0")
    assert list(packed.shape) == ["batch", 8]
    assert operators(step).count("Gather") == 2  # of the latents, and of what crossed
    for index in ([0, 1], [1, 0, 1, 1]):
        assert_same_as_whole(model, found, values_of(2, index))


COPIES = {
    "Expand": ("e = Expand (u, sides)", "float[batch, 4, 5, 5] y"),
    "Tile": ("e = Tile (timestep, repeats)", "float[batch, 12] y"),
    "Gather": ("e = Gather <axis = 1> (timestep, first)", "float[batch, 5] y"),
}


@pytest.mark.parametrize(("copy", "outputs"), COPIES.values(), ids=COPIES)
def test_a_copy_stays_behind_the_cut(copy: str, outputs: str) -> None:
    """What crosses is what the copy is made of."""
    head = "t = MatMul (timestep, kernel)"
    body = f"{head} u = Unsqueeze (t, ends) {copy.replace('timestep', 't')} z = ReduceSum (latents, one_1)"
    body += " w = Unsqueeze (z, ends) y = Mul (e, w)" if "Expand" in copy else " y = Mul (e, z)"
    model = step_of(body, outputs)
    found = cut(model, OF)
    (packed,) = found["timestep"].graph.outputs
    assert list(packed.shape)[:2] == ["steps", 4]
    assert np.prod(list(packed.shape)[1:]) == 4
    assert_same_as_whole(model, found, values_of(2, [0, 1]))


def test_a_copy_that_does_not_grow_crosses() -> None:
    model = step_of("e = Gather <axis = 1> (timestep, zero_1) y = Mul (e, latents)", "float[batch, 4] y")
    (packed,) = cut(model, OF)["timestep"].graph.outputs
    assert list(packed.shape) == ["steps", 1]


def test_values_of_constants_alone() -> None:
    """They belong to whoever reads them, the step or a stage or both."""
    model = step_of(
        "k = Neg (kernel) t = MatMul (timestep, k) x = MatMul (latents, k) y = Add (x, t)", "float[batch, 4] y"
    )
    found = cut(model, OF)
    assert operators(found["timestep"]) == ["Neg", "MatMul", "Identity"]
    assert sorted(operators(found["step"])) == ["Add", "MatMul", "Neg"]
    assert_same_as_whole(model, found, values_of(2, [0, 1]))


def test_an_output_of_constants_alone() -> None:
    model = step_of("y = Neg (kernel) z = Neg (latents)", "float[4, 4] y, float[batch, 4] z")
    found = cut(model, OF)
    assert list(found) == ["step"]
    assert names(found["step"].graph.outputs) == ["y", "z"]
    assert_same_as_whole(model, found, values_of(2, [0, 1]))


def test_an_output_known_early() -> None:
    model = step_of("a = Neg (hint) b = Neg (timestep) y = Add (latents, b)", "float[batch, 4] a, float[batch, 4] y")
    found = cut(model, OF)
    assert names(found["hint"].graph.outputs) == ["a"]
    assert names(found["step"].graph.outputs) == ["y"]
    assert names(found["step"].graph.inputs) == ["latents", "timestep_0"]
    assert_same_as_whole(model, found, values_of(2, [0, 1]))


EARLY_OUTPUTS = {
    "read by the step too": ("a = Neg (hint) y = Add (latents, a)", "float[batch, 4] a, float[batch, 4] y"),
    "packed with another": (
        "a = Neg (hint) b = Tanh (a) c = Add (latents, a) y = Add (c, b)",
        "float[batch, 4] a, float[batch, 4] y",
    ),
    "an expansion": (
        "a = Neg (timestep) e = Gather <axis = 0> (a, rows) y = Neg (latents)",
        "float[rows, 4] e, float[batch, 4] y",
    ),
    "an expansion that is read too": (
        "a = Neg (timestep) e = Gather <axis = 0> (a, rows) x = Gather <axis = 0> (latents, rows) y = Add (x, e)",
        "float[rows, 4] e, float[rows, 4] y",
    ),
    "of prompt and timestep": (
        "t = Gather <axis = 0> (timestep, rows) e = Add (t, prompt_embeds) y = Add (latents, timestep)",
        "float[rows, 4] e, float[batch, 4] y",
    ),
    "an input": ("e = Identity (hint) y = Neg (latents)", "float[batch, 4] e, float[batch, 4] y"),
}


@pytest.mark.parametrize(("body", "outputs"), EARLY_OUTPUTS.values(), ids=EARLY_OUTPUTS)
def test_outputs_known_early(body: str, outputs: str) -> None:
    model = step_of(body, outputs)
    found = cut(model, OF)
    given = [name for program in found.values() for name in names(program.graph.outputs)]
    assert {"y", "e" if "] e" in outputs else "a"} <= set(given)
    assert_same_as_whole(model, found, values_of(2, [0, 1, 1]))


@pytest.mark.parametrize("copy", ["r = Identity (rows)", "r = Reshape (rows, minus_1)"])
def test_copies_of_the_index(copy: str) -> None:
    """As torch.export writes them, and as they stay where GuidanceSharing was left out."""
    model = step_of(
        f"{copy} t = Gather <axis = 0> (timestep, r) e = Add (t, prompt_embeds) x = Gather <axis = 0> (latents, r) "
        "y = Mul (x, e)"
    )
    found = cut(model, OF)
    assert names(found["prompt_timestep"].graph.inputs) == ["timestep", "prompt_embeds"]
    assert_same_as_whole(model, found, values_of(2, [1, 0, 1]))


def test_without_an_index_or_labels() -> None:
    model = graph_of("float[n, 4] x, float[n, 4] t", "float[n, 4] y", "a = Neg (t) y = Add (x, a)")
    assert list(cut(model, {})) == ["step"]
    found = cut(model, {"t": "timestep"})
    assert list(found) == ["timestep", "step"]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, str]:
    """Graphs of up to a dozen nodes that read inputs of every stage, and up to three of their values as outputs."""
    kinds = {"latents": "batch", "timestep": "batch", "hint": "batch", "prompt_embeds": "rows", "ip_embeds": "rows"}
    widths = dict.fromkeys(kinds, 4)
    nodes = []
    for number in range(draw(st.integers(1, 12))):
        made, read = f"v{number}", draw(st.sampled_from(sorted(kinds)))
        alike = [n for n in sorted(kinds) if (kinds[n], widths[n]) == (kinds[read], widths[read])]
        choices = ["Add", "Neg", "Tanh", "Concat", "Slice"]
        choices += ["MatMul"] if widths[read] == 4 else []
        choices += ["Gather"] * 3 if kinds[read] == "batch" else []
        operator = draw(st.sampled_from(choices))
        kinds[made], widths[made] = kinds[read], widths[read]
        if operator == "Add":
            nodes.append(f"{made} = Add ({read}, {draw(st.sampled_from(alike))})")
        elif operator == "Concat":
            other = draw(st.sampled_from([n for n in sorted(kinds) if kinds[n] == kinds[read] and n != made]))
            widths[made] = widths[read] + widths[other]
            nodes.append(f"{made} = Concat <axis = 1> ({read}, {other})")
        elif operator == "Slice":
            widths[made] = 2
            nodes.append(f"{made} = Slice ({read}, zero_1, two_1, one_1)")
        elif operator == "MatMul":
            nodes.append(f"{made} = MatMul ({read}, kernel)")
        elif operator == "Gather":
            kinds[made] = "rows"
            nodes.append(f"{made} = Gather <axis = 0> ({read}, rows)")
        else:
            nodes.append(f"{made} = {operator} ({read})")
    computed = [name for name in kinds if name.startswith("v")]
    chosen = draw(st.lists(st.sampled_from(computed), min_size=1, max_size=3, unique=True))
    return " ".join(nodes), ", ".join(f"float[{kinds[name]}, {widths[name]}] {name}" for name in chosen)


@settings(max_examples=200, deadline=None)
@given(graph=graphs(), batch=st.integers(1, 3), shared=st.booleans(), data=st.data())
def test_any_graph(graph: tuple[str, str], batch: int, shared: bool, data: st.DataObject) -> None:
    """With the expansions where they were written, and sunk first."""
    index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=5))
    original, model = step_of(*graph), step_of(*graph)
    if shared:
        GuidanceSharing()(model)
    before = contents(model)
    found = cut(model, OF)
    assert contents(model) == before
    assert_same_as_whole(original, found, values_of(batch, index))
    step = found.get("step")
    if step is not None:
        assert not {"timestep", "prompt_embeds", "ip_embeds", "hint"} & set(names(step.graph.inputs))


def test_a_t2i_adapter_is_a_hint_program() -> None:
    """Mou et al. 2023 (arXiv 2302.08453): its features depend on the control picture alone, so no step is left."""
    torch = pytest.importorskip("torch")
    from diffusers import T2IAdapter

    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=4).eval()
    hint = torch.rand(2, 3, 32, 48)
    program = torch.onnx.export(
        adapter,
        (hint,),
        dynamo=True,
        opset_version=23,
        input_names=["hint"],
        output_names=["feature_0", "feature_1"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},),
        verbose=False,
    )
    found = cut(program.model, {"hint": "hint"})
    assert list(found) == ["hint"]
    assert names(found["hint"].graph.outputs) == ["feature_0", "feature_1"]
    for batch in (1, 3):
        hint = torch.rand(batch, 3, 32, 48)
        made = run(found["hint"], hint=hint.numpy())
        for value, expected in zip(made.values(), adapter(hint), strict=True):
            # convolutions of two libraries: float32 sums in another order
            np.testing.assert_allclose(value, expected.numpy(), rtol=0, atol=1e-5 * expected.abs().max().item())


every_family = pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "consistency"], indirect=True, scope="module")
PROFILES = {batch: ShapeProfile.parse("128x128", batch) for batch in ("1", "1-4")}
FOR_ONNX_RUNTIME: Passes = (RowAgnosticReshapes(), UpsampleConvolution(), GuidanceSharing())
FOR_OPENVINO: Passes = (RowAgnosticReshapes(), AttentionLayout(), UpsampleConvolution(), Geglu(), GuidanceSharing())


@pytest.fixture(scope="module", params=["unet", "controlnet.first"])
def part(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["for onnxruntime", "for openvino", "for openvino, one picture"])
def staged(request: pytest.FixtureRequest, exported: Path, part: str) -> tuple[ir.Model, dict[Stage, ir.Model]]:
    """A traced step after the passes, and its programs."""
    profile = PROFILES["1" if "one picture" in request.param else "1-4"]
    program = next(program for program in read_manifest(exported).programs if program.name == part)
    model = load_program(program, exported, profile)
    for each in FOR_OPENVINO if "openvino" in request.param else FOR_ONNX_RUNTIME:
        each(model)
    labels = {value.name: LABELS[value.name] for value in model.graph.inputs if value.name in LABELS}
    return model, cut(model, labels)


ADDED = {"sdxl": ("text_embeds", "time_ids"), "consistency": ("timestep_cond",)}
"""What is embedded beside the timestep."""
STAGES_OF = {
    ("sd15", "unet"): ["timestep", "prompt", "step"],
    ("sd21", "unet"): ["timestep", "prompt", "step"],
    ("sdxl", "unet"): ["prompt", "prompt_timestep", "step"],
    ("consistency", "unet"): ["prompt", "prompt_timestep", "step"],
    ("sd15", "controlnet.first"): ["timestep", "prompt", "hint", "step"],
    ("sd21", "controlnet.first"): ["timestep", "prompt", "hint", "step"],
    ("sdxl", "controlnet.first"): ["prompt", "prompt_timestep", "hint", "step"],
    ("consistency", "controlnet.first"): ["timestep", "prompt", "hint", "step"],
}


@every_family
def test_stages_of_a_checkpoint(family: Any, part: str, staged: tuple[ir.Model, dict[Stage, ir.Model]]) -> None:
    """SDXL adds pooled prompt and sizes to the timestep's embedding, a consistency model's UNet the guidance scale, so
    nothing of it depends on the timestep alone."""
    model, found = staged
    inputs = {stage: set(names(program.graph.inputs)) for stage, program in found.items()}
    assert list(inputs) == STAGES_OF[family.name, part]
    expected = {
        "timestep": {"timestep"},
        "prompt": {"prompt_embeds"},
        "prompt_timestep": {"timestep", *ADDED.get(family.name, ())},
        "hint": {"hint"},
    }
    for stage in list(inputs)[:-1]:
        assert inputs[stage] == expected[stage]
    early = {"timestep", "prompt_embeds", *ADDED.get(family.name, ()), "hint"}
    crossing = {name for stage, program in found.items() if stage != "step" for name in names(program.graph.outputs)}
    assert inputs["step"] - {"rows"} == set(names(model.graph.inputs)) - early - {"rows"} | crossing
    assert names(found["step"].graph.outputs) == names(model.graph.outputs)


@every_family
def test_nothing_early_is_left_in_a_step(staged: tuple[ir.Model, dict[Stage, ir.Model]]) -> None:
    """Every operator of a step needs the latents, or only hands on what crossed: unpacks it, expands or copies it."""
    _, found = staged
    step = found["step"]
    crossing = {name for stage, program in found.items() if stage != "step" for name in names(program.graph.outputs)}
    for node in step.graph:
        read = {value.name for value in ancestors(node.outputs[0]) if value.is_graph_input()}
        if read & crossing and read <= crossing | {"rows"}:
            assert node.op_type in ("Split", "Gather"), node


@every_family
def test_stages_in_turn_give_the_step(staged: tuple[ir.Model, dict[Stage, ir.Model]]) -> None:
    model, found = staged
    fixed = model.graph.inputs[0].shape[0] == 1
    before, programs = session(model), {stage: session(program) for stage, program in found.items()}
    for seed, (batch, index) in enumerate([(1, [0, 0]), (1, [0]), (2, [0, 1, 0, 1]), (3, [2, 0, 1, 1])]):
        if fixed and batch > 1:
            continue
        dims = one_picture(PROFILES["1-4"]) | {"batch": batch, "rows": len(index)}
        values: dict[str, NDArray[Any]] = {}
        for number, value in enumerate(model.graph.inputs):
            shape = [dim if isinstance(dim, int) else dims[dim.value] for dim in value.shape]
            values[value.name] = np.random.default_rng([seed, number]).standard_normal(shape, np.float32)
        values |= {"rows": np.array(index), "timestep": np.linspace(20, 900, batch).astype(np.float32)}
        expected, made = feed(before, values), dict(values)
        for stage, running in programs.items():
            entries = made | {"timestep": values["timestep"][values["rows"]]} if stage == "prompt_timestep" else made
            made |= feed(running, entries)
        for name, value in expected.items():
            # another batch may take other kernels: rounding, through a whole network
            np.testing.assert_allclose(made[name], value, rtol=0, atol=3e-6 * np.abs(value).max())


@every_family
def test_what_crosses_is_small(staged: tuple[ir.Model, dict[Stage, ir.Model]]) -> None:
    """One table for each kind of use: of timesteps, one that is read by picture and one that is expanded to rows."""
    _, found = staged
    outputs = {stage: list(program.graph.outputs) for stage, program in found.items()}
    assert len(outputs.get("timestep", [])) <= 2
    assert len(outputs.get("prompt_timestep", [])) <= 1
    assert len(outputs.get("hint", [])) <= 1
    for stage in ("timestep", "prompt_timestep"):
        for value in outputs.get(stage, []):
            assert np.prod(list(value.shape)[1:]) < 4000
