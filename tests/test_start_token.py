"""StartToken: golden text, a reject for each reason, constants, exact numbers, 8 bits after it."""

from __future__ import annotations

import functools
import logging

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effuse
from effuse.calibrate import calibrate, drive, layer_values
from effuse.capture import capture
from effuse.dump import dump
from effuse.graph import calls, module_path
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, Quantize, StartToken
from effuse.program import run_program, used_weights
from effuse.verify import check_variants, exact_bound, relative_error

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten, ops = torch.ops.aten, torch.ops.effuse

TIMES = (9.0, 7.0, 3.0, 1.0)
BOUND = exact_bound(torch.float32)
TOKENS, WIDTH = 5, 6
PASSES = (Canonicalize(),)
HOISTED = (Canonicalize(), Hoist())


class Encoder(nn.Module):
    """Causal attention over token codes: what follows a token does not change its states."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.mix = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, codes):
        x = self.table(codes)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        scale = torch.where(torch.arange(codes.shape[1]) == 0, 20.0, 1.0)  # as CLIP's
        return self.mix(x) * scale[:, None]


@functools.cache
def prompts(*starts):
    """One prompt for each start, (1, tokens, width), each going on in its own way."""
    codes = torch.tensor([[start, *(number + k for k in range(1, TOKENS))]
                          for number, start in enumerate(starts)])  # fmt: skip
    with torch.no_grad():
        return [Encoder()(row[None]) for row in codes]


class Net(nn.Module):
    """Cross-attention from 4 latent tokens; keys with a bias, values without; a gate from text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.query, self.leave = (nn.Linear(4, 4) for _ in range(3))
        self.key, self.value = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4, bias=False)
        self.gate = nn.Linear(WIDTH, 4)

    def heads(self, x):
        return x.unflatten(-1, (2, 2)).transpose(1, 2)

    def forward(self, sample, timestep, prompt):
        h = self.enter(sample) * timestep.float().cos()[:, None, None]
        q, k, v = self.query(h), self.key(prompt), self.value(prompt)
        y = F.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v))
        return self.leave(h + y.transpose(1, 2).flatten(2) * self.gate(prompt).mean(1, True))


def feed(given, sample=(1, 4, 4)):
    generator = torch.Generator().manual_seed(0)
    for prompt in given:
        for time in TIMES:
            latent = torch.randn(len(prompt), *sample[1:], generator=generator)
            yield {"sample": latent, "timestep": torch.tensor([time] * len(prompt)),
                   "prompt": prompt}  # fmt: skip


@functools.cache
def captured(kind=Net, example=0):
    given = list(feed(prompts(0, 0)))
    return capture(kind().eval(), given[example], timesteps=TIMES)


def start(program, given, *after, before=PASSES, fuel=None, **options):
    """The program with StartToken, which sees `given` prompts (None: no run at all)."""
    return run_passes(
        program,
        (*before, StartToken(**options), *after),
        lambda program: calibrate(program, feed(given), layer_values),
        drive=None if given is None else lambda program, watch: drive(program, feed(given), watch),
        fuel=fuel,
    )


def of(program):
    """The pass's record: rewrites, reasons."""
    record = next(record for record in program.records if record.name == "start_token")
    return record.rewrites.get("start", 0), dict(record.reasons.get("start", {}))


def text(program):
    return "\n".join(f"# {part.name}\n{dump(part.graph)}" for part in program.parts)


# ---- golden --------------------------------------------------------------------------------------

PROMPT = """\
%0: float32[1x5x6] = input prompt
%1: float32[4x6] = weight key.weight
%2: float32[4] = weight key.bias
%3: float32[4x6] = weight value.weight
%4: float32[4x6] = weight gate.weight
%5: float32[4] = weight gate.bias
%6: float32[1x1x4] = weight key.weight.start
%7: float32[1x1x6] = weight start.prompt
%8: float32[1x1x6] = aten.slice.Tensor(%0, 1, 0, 1)
%9: float32[1x1x6] = aten.sub.Tensor(%8, %7)
%10: float32[1x4x6] = aten.slice.Tensor(%0, 1, 1, 9223372036854775807)
%11: float32[1x5x6] = aten.cat.default([%9, %10], 1)
%12: float32[1x5x4] = aten.linear.default(%11, %1)  # key
%13: float32[1x1x4] = aten.slice.Tensor(%12, 1, 0, 1)  # key
%14: float32[1x1x4] = aten.add.Tensor(%13, %6)  # key
%15: float32[1x4x4] = aten.slice.Tensor(%12, 1, 1, 9223372036854775807)  # key
%16: float32[1x4x4] = aten.add.Tensor(%15, %2)  # key
%17: float32[1x5x4] = aten.cat.default([%14, %16], 1)  # key
%18: float32[1x1x4] = weight value.weight.start
%19: float32[1x5x4] = aten.linear.default(%11, %3)  # value
%20: float32[1x1x4] = aten.slice.Tensor(%19, 1, 0, 1)  # value
%21: float32[1x1x4] = aten.add.Tensor(%20, %18)  # value
%22: float32[1x4x4] = aten.slice.Tensor(%19, 1, 1, 9223372036854775807)  # value
%23: float32[1x5x4] = aten.cat.default([%21, %22], 1)  # value
%24: float32[1x5x2x2] = aten.unflatten.int(%17, -1, [2, 2])
%25: float32[1x2x5x2] = aten.transpose.int(%24, 1, 2)
%26: float32[1x5x2x2] = aten.unflatten.int(%23, -1, [2, 2])
%27: float32[1x2x5x2] = aten.transpose.int(%26, 1, 2)
%28: float32[1x5x4] = aten.linear.default(%0, %4, %5)  # gate
%29: float32[1x1x4] = aten.mean.dim(%28, [1], True)
return [%25, %27, %29]
"""


def test_golden_in_the_program_of_the_prompt():
    program = captured()
    before = dump(program.parts[0].graph)
    result = start(program, prompts(0, 0), before=HOISTED)
    assert dump(result.part("prompt").graph) == PROMPT
    assert dump(program.parts[0].graph) == before
    assert of(result)[0] == 2


# ---- rejects -------------------------------------------------------------------------------------


class Computed(Net):
    def forward(self, sample, timestep, prompt):
        key = F.linear(prompt, self.key.weight * sample.mean())
        return sample + self.leave(F.scaled_dot_product_attention(sample, key, key))


class Pooled(Net):
    def forward(self, sample, timestep, prompt):
        key = self.key(prompt[:, 1])[:, None]
        return sample + F.scaled_dot_product_attention(sample, key, key)


class Single(Net):
    def forward(self, sample, timestep, prompt):
        key = self.key(prompt[:, :1])
        return sample + F.scaled_dot_product_attention(sample, key, key)


class Queried(Net):
    def forward(self, sample, timestep, prompt):
        y = F.scaled_dot_product_attention(self.value(prompt), sample, sample)
        return sample + y.mean(1, True)


ZEROS = tuple(prompt * (torch.arange(TOKENS) > 0)[:, None] for prompt in prompts(0, 0))
REJECTS = [  # the reason, the network, the prompts that calibration sees, options, how often
    ("its input is not the prompt's alone", Net, prompts(0, 0), {}, 3),
    ("its weight or its bias is computed", Computed, prompts(0, 0), {}, 1),
    ("its input is no sequence of states", Pooled, prompts(0, 0), {}, 1),
    ("its input has a single token", Single, prompts(0, 0), {}, 1),
    ("no attention reads it as keys or values", Queried, prompts(0, 0), {}, 1),
    ("no calibration run shows how prompts start", Net, None, {}, 2),
    ("calibration has one prompt, which says nothing of others", Net, prompts(0), {}, 2),
    ("prompts start with different tokens", Net, prompts(0, 0, 7), {}, 2),
    ("prompts start with different tokens", Net, [torch.cat(prompts(0, 7))], {}, 2),
    ("the first token's states are zero", Net, ZEROS, {}, 2),
    ("among exclude", Net, prompts(0, 0), {"exclude": ("*",)}, 6),
    ("not among include", Net, prompts(0, 0), {"include": ("key",)}, 5),
]


@pytest.mark.parametrize(("reason", "kind", "given", "options", "count"), REJECTS)
@pytest.mark.parametrize("before", [PASSES, HOISTED], ids=["whole", "hoisted"])
def test_every_reason_not_to(reason, kind, given, options, count, before):
    batch = 1 if given is None else len(given[0])
    program = captured(kind) if batch == 1 else batched(kind, batch)
    rewrites, reasons = of(start(program, given, before=before, **options))
    assert reasons[reason] == count
    if reason.startswith(("prompts", "no cal", "cal", "the first", "among")):
        assert rewrites == 0


@functools.cache
def batched(kind, batch):
    (inputs, *_) = feed([torch.cat(prompts(*range(batch)))])
    return capture(kind().eval(), inputs, timesteps=TIMES)


def test_a_rejected_program_is_as_it_was():
    before = run_passes(captured(), HOISTED)
    result = start(captured(), prompts(0, 7), before=HOISTED)
    assert text(result) == text(before)
    assert result.weights.keys() == before.weights.keys()


def test_fuel_stops_it():
    program = run_passes(captured(), PASSES)
    assert text(start(program, prompts(0, 0), before=(), fuel=0)) == text(program)
    assert of(start(program, prompts(0, 0), before=(), fuel=1))[0] == 1


# ---- the constants, and the numbers --------------------------------------------------------------


def values_of(program, prompt, latent=0):
    torch.manual_seed(latent)
    sample = torch.randn(len(prompt), 4, 4)
    return {"sample": sample, "timestep": torch.tensor([7.0] * len(prompt)), "prompt": prompt}


def keys_and_values(program, prompt):
    """What attention reads of a prompt, (1, tokens, width)."""
    seen = {}
    with torch.no_grad():
        run_program(program, values_of(program, prompt), lambda part, *pair: seen.update([pair]))
    (attention,) = calls(program.part("full").graph, aten.scaled_dot_product_attention.default)
    found = [seen[node] for node in attention.args[1:3]]
    return [each.transpose(1, 2).flatten(2) for each in found]


@pytest.mark.parametrize("before", [PASSES, HOISTED], ids=["whole", "hoisted"])
def test_the_first_keys_and_values_are_constants(before):
    net = Net()
    result = start(captured(), prompts(0, 0), before=before)
    for prompt in prompts(0, 0, 0):  # the third one was never seen
        found = keys_and_values(result, prompt)
        for rows, layer, name in zip(found, (net.key, net.value), ("key", "value"), strict=True):
            assert torch.equal(rows[:, :1], result.weights[f"{name}.weight.start"])
            assert relative_error([rows], [layer(prompt)]) <= BOUND
    for other in ("key", "value"):
        assert result.weights[f"{other}.weight.start"].shape == (1, 1, 4)


@pytest.mark.parametrize("before", [PASSES, HOISTED], ids=["whole", "hoisted"])
def test_any_prompt_keeps_its_numbers_whatever_it_starts_with(before):
    net, result = Net(), start(captured(), prompts(0, 0), before=before)
    assert of(result)[0] == 2
    for prompt in (*prompts(0, 7), torch.zeros(1, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)):
        values = values_of(result, prompt)
        with torch.no_grad():
            error = relative_error(run_program(result, values), [net(**values)])
        assert error <= BOUND


def test_text_encoders_that_round_otherwise_in_a_batch_start_alike():
    one, other = prompts(0, 0)
    near = other * (1 + 2 * torch.finfo(torch.float32).eps)
    assert not torch.equal(near[:, 0], one[:, 0])
    assert of(start(captured(), (one, near)))[0] == 2


def test_a_second_run_changes_nothing():
    result = start(captured(), prompts(0, 0), before=HOISTED)
    again = start(result, prompts(0, 0), before=())
    assert text(again) == text(result)
    assert again.weights.keys() == result.weights.keys()


class Projected(Net):
    """Text states pass through layers of their own; keys and values come from one layer."""

    def __init__(self):
        super().__init__()
        self.text, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, sample, timestep, prompt):
        keys, values = self.both(F.gelu(self.text(prompt))).chunk(2, dim=-1)
        scores = torch.matmul(self.query(sample), (keys / 2).transpose(1, 2)).softmax(-1)
        return self.leave(sample + torch.matmul(scores, values))


@pytest.mark.parametrize("before", [PASSES, HOISTED], ids=["whole", "hoisted"])
def test_projected_states_and_keys_beside_values(before):
    result = start(captured(Projected), prompts(0, 0), before=before)
    assert of(result)[0] == 1
    assert "both.weight.start" in result.weights
    assert next(r for r in result.records if r.name == "start_token").error <= BOUND


def test_a_cache_behind_it_makes_variants_of_the_rewritten_program():
    result = start(captured(), prompts(0, 0), Cache(interval=2, warmup=1, order=0, mode="unit"))
    names = {name for name in result.weights if "start" in name}
    assert names == {"start.prompt", "key.weight.start", "value.weight.start"}
    assert names <= used_weights(result.part("full"))
    assert check_variants(result) is None


def conditional():
    heads = {"attention_head_dim": 2, "cross_attention_dim": WIDTH, "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), sample_size=8, layers_per_block=1, **heads,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def test_a_conditional_unet():
    """Every cross-attention of the network, found in the program of the prompt."""
    torch.manual_seed(0)
    net = conditional().eval()
    one, other = prompts(0, 0)

    def sample(model):
        for prompt in (one, other):
            for time in TIMES:
                model(torch.randn(1, 4, 8, 8), torch.tensor(time), prompt)

    program = capture(
        net, {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(7.0),
              "encoder_hidden_states": one}, timesteps=TIMES,
    )  # fmt: skip
    result = run_passes(
        program, (*HOISTED, StartToken()), drive=lambda each, watch: drive(each, sample, watch)
    )
    attentions = [path for path, _ in net.named_modules() if path.endswith("attn2")]
    assert of(result)[0] == 2 * len(attentions) > 0
    assert {module_path(node).rsplit(".", 1)[0] for node in calls(result.part("prompt").graph)
            if module_path(node).endswith("to_k")} == set(attentions)  # fmt: skip
    assert len([name for name in result.weights if name.startswith("start.")]) == 1


# ---- in 8 bits -----------------------------------------------------------------------------------

EIGHT_BITS = Quantize(min_sqnr_db=-100, edges=True)


@pytest.mark.parametrize("before", [PASSES, HOISTED], ids=["whole", "hoisted"])
def test_the_first_keys_and_values_stay_exact_in_8_bits(before):
    result = start(captured(), prompts(0, 0), EIGHT_BITS, before=before)
    formats = {layer.name: layer.format for layer in result.layers}
    assert formats["key"] == formats["value"] == ("w8a8" if before is PASSES else "w8")
    for rows, name in zip(keys_and_values(result, prompts(0, 0)[1]), ("key", "value"), strict=True):
        assert torch.equal(rows[:, :1], result.weights[f"{name}.weight.start"])


def test_the_other_tokens_gain_by_the_range_of_the_first():
    """Its states are some ten times theirs, and no longer widen the quantizer's steps."""
    given = prompts(0, 0)
    whole = run_passes(
        captured(), (*PASSES, EIGHT_BITS), lambda each: calibrate(each, feed(given), layer_values)
    )
    apart = start(captured(), given, EIGHT_BITS)
    with torch.no_grad():
        truth = Net().value(given[0])[:, 1:]
    errors = [
        (keys_and_values(program, given[0])[1][:, 1:] - truth).square().mean().item()
        for program in (whole, apart)
    ]
    assert errors[0] > 10 * errors[1]


def test_a_compiled_network_learns_it_from_its_calibration_run():
    inputs = next(iter(feed(prompts(0))))
    for given, rewrites in ((prompts(0, 0), {"start": 2}), (prompts(0, 7), {})):
        compiled = effuse.compile(
            Net().eval(), effuse.Config(passes=(StartToken(), Hoist()), backend="reference"),
            inputs=inputs, schedule=list(TIMES), calibration=list(feed(given)), progress=False,
        )  # fmt: skip
        records = {each["name"]: each for each in compiled.manifest["passes"]}
        assert records["start_token"]["rewrites"] == rewrites
        with torch.no_grad():
            expected = Net()(**inputs)
        assert relative_error([compiled(**inputs)], [expected]) <= BOUND
