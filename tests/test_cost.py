"""Costs by hand count, rates on nets with known parameter counts, and targets by name."""

import importlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from effuse.capture import capture
from effuse.cost import node_bytes, node_flops, part_costs, rate_costs
from effuse.errors import ConfigError
from effuse.graph import calls, emit, emit_input, fake_mode, set_outputs
from effuse.inspect_model import inspect_network, load_folder, resolve
from effuse.kernels import dynamic as dynamic  # registers the ops
from effuse.plan import ROLE_DEPENDS, Role
from effuse.program import Part

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "configs"
EMOJI = CONFIGS.parent / "models" / "emoji-unet"


class Lambda(nn.Module):
    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, sample, context=None):
        given = [sample] if context is None else [sample, context]
        return self.function(*given, *self.weights)


def part_of(function, *shapes, weights=(), **options):
    values = [torch.randn(shape) for shape in shapes]
    inputs = dict(zip(("sample", "context"), values, strict=False))
    return capture(Lambda(function, *weights).eval(), inputs, **options)


def flops_of(*args, **options):
    program = part_of(*args, **options)
    return sum(node_flops(node) for node in calls(program.parts[0].graph))


HAND_COUNTED = {
    "linear": (F.linear, [(2, 5, 7)], [(3, 7), (3,)], 2 * (2 * 5) * 7 * 3),
    "linear of a vector": (F.linear, [(7,)], [(3, 7)], 2 * 7 * 3),
    "conv1d": (F.conv1d, [(2, 4, 10)], [(6, 4, 3)], 2 * (2 * 6 * 8) * 4 * 3),
    "conv2d": (F.conv2d, [(1, 3, 8, 6)], [(5, 3, 3, 3)], 2 * (5 * 6 * 4) * 3 * 9),
    "grouped, strided, padded": (
        lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2),
        [(2, 4, 8, 8)], [(6, 2, 3, 3)], 2 * (2 * 6 * 4 * 4) * 2 * 9,
    ),
    "padding by word": (
        lambda x, w: F.conv2d(x, w, padding="same"),
        [(1, 3, 8, 6)], [(5, 3, 3, 3)], 2 * (5 * 8 * 6) * 3 * 9,
    ),
    "unbatched conv2d": (F.conv2d, [(3, 8, 6)], [(5, 3, 3, 3)], 2 * (5 * 6 * 4) * 3 * 9),
    "conv3d": (F.conv3d, [(1, 2, 4, 5, 6)], [(3, 2, 2, 2, 2)], 2 * (3 * 3 * 4 * 5) * 2 * 8),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        [(1, 4, 5, 5)], [(4, 3, 2, 2)], 2 * (4 * 5 * 5) * 3 * 4,
    ),
    "convolution": (
        lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        [(1, 3, 8, 6)], [(5, 3, 3, 3)], 2 * (5 * 6 * 4) * 3 * 9,
    ),
    "mm": (torch.mm, [(3, 4)], [(4, 5)], 2 * 3 * 4 * 5),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)], [], 2 * 2 * 3 * 4 * 5),
    "matmul": (torch.matmul, [(2, 1, 3, 4), (6, 4, 5)], [], 2 * 2 * 6 * 3 * 4 * 5),
    "matmul by a vector": (torch.matmul, [(2, 3, 4), (4,)], [], 2 * 2 * 3 * 4),
    "addmm": (lambda x, b, w: torch.addmm(b, x, w), [(3, 4)], [(5,), (4, 5)], 2 * 3 * 4 * 5),
    "baddbmm": (
        lambda x, y, b: torch.baddbmm(b, x, y),
        [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)], 2 * 2 * 3 * 4 * 5,
    ),
    "attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        [(2, 3, 5, 8), (2, 3, 7, 8)], [], 2 * 2 * 3 * 5 * 7 * (8 + 8),
    ),
    "attention without heads": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        [(2, 5, 8), (2, 7, 8)], [], 2 * 2 * 5 * 7 * (8 + 8),
    ),
    "nothing else": (lambda x: F.silu(x) * 2 + x.softmax(-1), [(3, 4)], [], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND_COUNTED)
def test_hand_counted_flops(case):
    function, shapes, weights, count = HAND_COUNTED[case]
    assert flops_of(function, *shapes, weights=weights) == count


def test_int8_ops_cost_what_they_replace():
    graph = torch.fx.Graph()
    mode = fake_mode(graph)
    shapes = {"x": (2, 4, 8, 8), "w": (6, 2, 3, 3), "s": (6,), "y": (2, 5, 7), "v": (3, 7)}
    node = {k: emit_input(graph, k, mode.from_tensor(torch.zeros(v))) for k, v in shapes.items()}
    ops = torch.ops.effuse
    conv = emit(graph, ops.conv2d_dynamic.default, node["x"], node["w"], node["s"], None,
                [2, 2], [1, 1], [1, 1], 2)  # fmt: skip
    linear = emit(graph, ops.linear_dynamic.default, node["y"], node["v"], node["s"], None)
    set_outputs(graph, [conv, linear])
    assert node_flops(conv) == 2 * (2 * 6 * 4 * 4) * 2 * 9
    assert node_flops(linear) == 2 * (2 * 5) * 7 * 3
    assert node_bytes(linear) == 4 * (2 * 5 * 7 + 3 * 7 + 6 + 2 * 5 * 3)


def test_open_sizes_count_at_their_examples():
    def net(x, w):
        x = F.conv2d(x, w, padding=1)
        flat = x.flatten(2)
        return flat @ flat.transpose(1, 2)

    shapes, weights = [(2, 3, 8, 6)], [(4, 3, 3, 3)]
    dynamic = {"batch": (1, 8), "height": (4, 32), "width": (4, 32)}
    count = 2 * (2 * 4 * 48) * 27 + 2 * 2 * 4 * 48 * 4
    assert flops_of(net, *shapes, weights=weights) == count
    assert flops_of(net, *shapes, weights=weights, dynamic=dynamic) == count


def test_part_costs():
    program = part_of(F.linear, (5, 7), weights=[(3, 7), (3,)])
    costs = part_costs(program.parts[0], program.weights)
    assert costs == {"nodes": 1, "parameters": 24, "weight_bytes": 96, "flops": 2 * 5 * 7 * 3}


class Rates(nn.Module):
    """Known counts: const 3 + 12, schedule 20, prompt 42 + 63, step 72 + 8 + 9; a buffer of 9."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))
        self.table = nn.Linear(3, 9, bias=False)  # const: 27, read by const calls only
        self.time = nn.Linear(1, 9)  # schedule: 18
        self.text = nn.Linear(6, 9, bias=False)  # prompt: 54
        self.both = nn.Linear(9, 9, bias=False)  # prompt: 81, reads timestep and prompt
        self.step = nn.Linear(9, 9, bias=False)  # step: 81
        self.turned = nn.Parameter(torch.randn(9, 9))  # step: 81, through a view and a cast
        self.shared = nn.Linear(9, 9, bias=False)  # step: 81, read by a prompt call as well
        self.register_buffer("offset", torch.randn(9))

    def forward(self, sample, timestep, encoder_hidden_states):
        time = F.silu(self.time(timestep[:, None]))
        text = self.shared(self.text(encoder_hidden_states))
        joint = self.both(time + text)
        x = self.shared(self.step(sample)) @ self.turned.double().t().float()
        return x + joint + self.table(self.token).cos() + self.offset


def rates_inputs():
    return {
        "sample": torch.randn(2, 9),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 6),
    }


def test_rates_of_a_hand_written_net():
    found = inspect_network(Rates(), rates_inputs())
    assert {rate: cost["parameters"] for rate, cost in found.rates.items()} == {
        "const": 3 + 27,
        "schedule": 18,
        "prompt": 54 + 81,
        "step": 3 * 81,
    }
    assert {rate: cost["flops"] for rate, cost in found.rates.items()} == {
        "const": 2 * 27,
        "schedule": 2 * 2 * 9,
        "prompt": 2 * 2 * (54 + 81 + 81),
        "step": 2 * 2 * (81 + 81 + 81),
    }
    assert found.parameters == 30 + 18 + 135 + 243
    assert found.leaves_step_program == pytest.approx(1 - 243 / 426)


def test_buffers_count_without_names():
    model = Rates().eval()
    costs = rate_costs(capture(model, rates_inputs()))
    assert costs["step"]["parameters"] == 3 * 81 + 9


def test_inputs_are_derived():
    found = inspect_network(resolve(str(EMOJI), {}))
    roles = [role for _, role, _, _ in found.rows]
    assert roles.count("latent") == 1 and roles.count("timestep") == 1
    assert {shape[0] for _, role, shape, _ in found.rows if role == "latent"} == {1}
    assert 0 < found.leaves_step_program < 1


def test_a_network_without_conditions_has_all_rates():
    found = inspect_network(nn.Linear(4, 3), {"input": torch.zeros(2, 4)})
    assert set(found.rates) == {"const", "schedule", "prompt", "step"}
    assert found.rates["step"] == {"parameters": 15, "flops": 48}
    assert found.leaves_step_program == 0


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

        def forward(self, sample, encoder_hidden_states):
            return self.one(sample) + self.other(encoder_hidden_states)

    inputs = {"sample": torch.zeros(2, 4), "encoder_hidden_states": torch.zeros(2, 4)}
    found = inspect_network(Tied(), inputs)
    assert found.parameters == 24
    assert found.rates["step"]["parameters"] == 20
    assert found.rates["prompt"]["parameters"] == 4


def test_roles_can_be_given():
    found = inspect_network(Rates(), rates_inputs(), roles={"encoder_hidden_states": "latent"})
    assert found.rates["prompt"] == {"parameters": 0, "flops": 0}
    assert ("encoder_hidden_states", "latent", (2, 6), "float32") in found.rows


def test_hoisted_parts_cost_what_the_whole_does():
    hoist = importlib.import_module("effuse.passes.hoist")
    base = importlib.import_module("effuse.passes.base")
    log = importlib.import_module("effuse.log")
    program = capture(Rates().eval(), rates_inputs())
    parts = hoist.split(program, base.Work(log=log.Log())).parts
    assert [part.name for part in parts] == ["schedule", "prompt", "conditioning", "full"]
    split = program.with_parts(*parts)
    whole, cut = rate_costs(program), rate_costs(split)
    assert {r: c["parameters"] for r, c in whole.items()} == {
        r: c["parameters"] for r, c in cut.items()
    }
    assert whole["step"]["flops"] == cut["step"]["flops"]


def test_only_the_default_variant_is_counted():
    program = capture(Rates().eval(), rates_inputs())
    twin = Part("shallow", ROLE_DEPENDS[Role.LATENT], program.parts[0].graph, program.outputs)
    assert rate_costs(program.with_parts(*program.parts, twin)) == rate_costs(program)


def test_inspection_leaves_the_model_alone():
    model = Rates().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inspect_network(model, rates_inputs())
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_inspection_as_json():
    data = inspect_network(Rates(), rates_inputs()).to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["inputs"][0] == {
        "label": "sample", "role": "latent", "shape": [2, 9], "dtype": "float32"
    }  # fmt: skip
    assert set(data) == {"rates", "inputs", "parameters", "leaves_step_program"}


BAD_TARGETS = {
    "diffusers.FluxTransformer2DModell": "did you mean 'FluxTransformer2DModel'",
    "diffusers.DDIMScheduler": "not a subclass of torch.nn.Module",
    "diffusers.__version__": "not a subclass of torch.nn.Module",
    "no_such_module_here.Net": "cannot import 'no_such_module_here'",
    "FluxTransformer2DModel": "neither a folder",
    "some/folder.that/is not there": "neither a folder",
    "missing.json": "cannot be read",
}


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_bad_targets(target):
    with pytest.raises(ConfigError, match=BAD_TARGETS[target]):
        resolve(target, {})


def test_bad_settings():
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        resolve("diffusers.FluxTransformer2DModel", {"num_layer": 2})
    with pytest.raises(ConfigError, match="cannot be built"):
        resolve("diffusers.UNet2DConditionModel", {"block_out_channels": [32]})


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(str(tmp_path), {})
    (tmp_path / "config.json").write_text('{"act_fn": "silu"}')
    with pytest.raises(ConfigError, match="no _class_name"):
        resolve(str(tmp_path), {})
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModle"}')
    with pytest.raises(ConfigError, match="did you mean 'UNet2DModel'"):
        resolve(str(tmp_path), {})
    (tmp_path / "net.json").write_text('{"clas": "x"}')
    with pytest.raises(ConfigError, match="expected the keys class and settings"):
        resolve(str(tmp_path / "net.json"), {})


def test_resolve_a_saved_folder():
    model = resolve(str(EMOJI), {})
    assert not model.training
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert type(model).__name__ == json.loads((EMOJI / "config.json").read_text())["_class_name"]


def test_load_a_saved_folder(tmp_path):
    model = load_folder(EMOJI)
    assert not model.training and not any(t.is_meta for t in model.parameters())
    (tmp_path / "config.json").write_text((EMOJI / "config.json").read_text())
    with pytest.raises(ConfigError, match="the weights cannot be loaded"):
        load_folder(tmp_path)
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="the weights cannot be loaded"):
        load_folder(tmp_path)


def test_a_saved_folder_without_a_weight_is_refused(tmp_path):
    shutil.copytree(EMOJI, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    stored = load_file(path)
    name = sorted(stored)[0]
    save_file({each: value for each, value in stored.items() if each != name}, path)
    with pytest.raises(ConfigError, match=f"1 of the network's {len(stored)} .* such as '{name}'"):
        load_folder(tmp_path)


def test_resolve_a_class_outside_diffusers():
    model = resolve("torch.nn.Linear", {"in_features": 3, "out_features": 4})
    assert model.weight.shape == (4, 3) and model.weight.is_meta


def zeros(*shape, **options):
    return torch.zeros(*shape, device="meta", **options)


def eager_flops(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def test_scaled_down_flux():
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
    layers = {"num_layers": 2, "num_single_layers": 4}
    sizes = {"joint_attention_dim": 48, "pooled_projection_dim": 24, "in_channels": 16}
    model = resolve(str(CONFIGS / "flux-dev.json"), heads | layers | sizes)
    inputs = {
        "hidden_states": zeros(1, 64, 16),
        "timestep": zeros(1),
        "guidance": zeros(1),
        "encoder_hidden_states": zeros(1, 8, 48),
        "pooled_projections": zeros(1, 24),
        "img_ids": zeros(64, 3),
        "txt_ids": zeros(8, 3),
        "return_dict": False,
    }
    found = inspect_network(model, inputs)
    counts = {rate: cost["parameters"] for rate, cost in found.rates.items()}
    width = 32
    affine = width * width + width
    assert counts["const"] == 0
    assert counts["schedule"] == 256 * width + width + affine
    modulation = (2 * 2 * 6 + 4 * 3 + 2) * affine  # two streams, single blocks, the last norm
    guidance, pooled = 256 * width + width + affine, 24 * width + width + affine
    first = 3 * affine + 2 * 16  # the first block projects the prompt before it meets the latent
    assert counts["prompt"] == modulation + guidance + pooled + 48 * width + width + first
    assert sum(counts.values()) == found.parameters
    assert sum(cost["flops"] for cost in found.rates.values()) == eager_flops(model, inputs)


def test_scaled_down_sdxl():
    small = {
        "block_out_channels": [32, 64, 128],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    model = resolve(str(CONFIGS / "sdxl.json"), small)
    inputs = {
        "sample": zeros(1, 4, 16, 16),
        "timestep": zeros(1),
        "encoder_hidden_states": zeros(1, 7, 48),
        "added_cond_kwargs": {"text_embeds": zeros(1, 24), "time_ids": zeros(1, 6)},
        "return_dict": False,
    }
    found = inspect_network(model, inputs)
    counts = {rate: cost["parameters"] for rate, cost in found.rates.items()}
    named = dict(model.named_parameters())
    cross = [name for name in named if ".attn2.to_k" in name or ".attn2.to_v" in name]
    added = [name for name in named if name.startswith("add_embedding")]
    times = [name for name in named if "time_emb_proj" in name]
    assert counts["schedule"] == sum(
        tensor.numel() for name, tensor in named.items() if name.startswith("time_embedding")
    )
    assert counts["prompt"] == sum(named[name].numel() for name in cross + added + times)
    assert sum(counts.values()) == found.parameters
    assert sum(cost["flops"] for cost in found.rates.values()) == eager_flops(model, inputs)


def test_dit_xl_2_at_full_size():
    start = time.process_time()
    model = resolve(str(CONFIGS / "dit-xl-2.json"), {})
    inputs = {
        "hidden_states": zeros(1, 4, 32, 32),
        "timestep": zeros(1),
        "class_labels": zeros(1, dtype=torch.int64),
        "return_dict": False,
    }
    found = inspect_network(model, inputs)
    assert found.parameters == 749_808_016
    assert found.leaves_step_program >= 0.39
    assert time.process_time() - start < 60
