"""Experts whose tokens follow from the data: captured so that the routing stays open."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effuse.backends.reference import session
from effuse.capture import capture
from effuse.capture_routing import Count, check_routing
from effuse.capture_rows import Memory, Rows, UnsupportedError
from effuse.errors import CaptureError
from effuse.plan import Role
from effuse.program import run_program
from effuse.verify import verify

# pytest's log capture makes torch.export write its trace of every symbol, at ten times the time.
logging.getLogger("torch.__trace").disabled = True

Tensor = torch.Tensor


class Expert(nn.Module):
    """A gated layer, and something to do with its result."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x)))


class Routed(nn.Module):
    """Each token goes to two of five experts, which a layer chooses: sorted, counted and cut."""

    def __init__(
        self, then: Callable[[Tensor], Tensor] = lambda x: x, extra: float = 0, count: int = 2
    ) -> None:
        super().__init__()
        self.choose = nn.Linear(8, 5, bias=False)
        self.experts = nn.ModuleList(Expert(then) for _ in range(5))
        self.extra, self.count = extra, count

    def forward(self, sample: Tensor) -> Tensor:
        x = sample.reshape(-1, 8)
        scores = self.choose(x).softmax(dim=-1)
        weights, chosen = torch.topk(scores, k=self.count, dim=-1)
        if self.count == 1:
            chosen = scores.argmax(dim=-1)
        flat, weights = chosen.view(-1), weights.view(-1, 1)
        order = flat.argsort()
        ends = flat.bincount().cpu().numpy().cumsum(0)
        total = torch.zeros_like(x)
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            tokens = (order // self.count)[start:end]
            result = self.experts[number](x[tokens])
            result.mul_(weights[order[start:end]])
            places = tokens.view(-1, 1).repeat(1, x.shape[-1])
            total.scatter_reduce_(0, places, result, reduce="sum")
            total = total + self.extra
        return sample + total.view_as(sample)


def made(**options: object) -> tuple[nn.Module, Tensor]:
    """A small network of experts, and a latent."""
    torch.manual_seed(0)
    return Routed(**options).eval(), torch.randn(2, 6, 8)  # type: ignore[arg-type]


def others() -> list[Tensor]:
    """Latents whose tokens go elsewhere: mixed, and all to the same two experts."""
    return [torch.randn(2, 6, 8), torch.randn(8).expand(2, 6, 8) + 1e-3 * torch.randn(2, 6, 8)]


def test_routing_is_computed_anew_for_each_latent():
    model, x = made()
    program = capture(model, {"sample": x})
    verify(program)
    assert [item.role for item in program.inputs] == [Role.LATENT]
    ways = set()
    for other in (x, *others()):
        with torch.no_grad():
            ways.add(tuple(model.choose(other.reshape(-1, 8)).argmax(dim=1).tolist()))
            expected = model(other)
        torch.testing.assert_close(run_program(program, {"sample": other})[0], expected,
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
    assert len(ways) == 3
    (run,) = (session(program),)
    assert torch.equal(run(sample=x), run_program(program, {"sample": x})[0])


def test_every_expert_computes_on_each_token_once():
    model, x = made()
    (part,) = capture(model, {"sample": x}).parts
    sizes = [tuple(node.meta["val"].shape) for node in part.graph.nodes
             if node.target is torch.ops.aten.linear.default]  # fmt: skip
    assert sizes == [(12, 5)] + 5 * [(12, 16), (12, 16), (12, 8)]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_added_for_an_empty_expert_as_well_is_found(count: int):
    model, x = made(extra=1.0, count=count)
    x = 9 * torch.cat(3 * [model.choose.weight.detach()])[:12].view(2, 6, 8)  # no expert is empty
    assert model.choose(x.view(-1, 8)).argmax(dim=1).unique().numel() == 5
    with pytest.raises(CaptureError, match="numpy"):
        capture(model, {"sample": x})


@pytest.mark.parametrize("then", [
    lambda x: x.softmax(dim=0), lambda x: x - x.mean(dim=0), lambda x: x.flip(0),
    lambda x: x - x[:1], lambda x: x / x.shape[0], lambda x: x / x.size(0), lambda x: x.cumsum(0),
    lambda x: x + x.sum(),
], ids=["softmax", "mean", "flip", "first", "shape", "size", "cumsum", "sum"])  # fmt: skip
def test_experts_that_mix_their_tokens_are_refused(then: Callable[[Tensor], Tensor]):
    model, x = made(then=then)
    model(x)
    with pytest.raises(CaptureError, match="numpy"):
        capture(model, {"sample": x})


@pytest.mark.parametrize("then", [
    lambda x: x.softmax(dim=1), lambda x: x[:, None].mean(dim=1), lambda x: 2 - x,
    lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1), lambda x: x.clamp(max=0.1).to(x.dtype),
    lambda x: x @ torch.eye(8) + x.amax(dim=-1, keepdim=True),
    lambda x: x.view(-1, 2, 4).flatten(1),
], ids=["softmax", "axis", "from", "cat", "clamp", "matmul", "view"])  # fmt: skip
def test_experts_may_do_what_they_like_with_one_token(then: Callable[[Tensor], Tensor]):
    model, x = made(then=then)
    program = capture(model, {"sample": x})
    for other in others():
        with torch.no_grad():
            found = run_program(program, {"sample": other})[0]
            torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-6)


def rows(count: int = 3) -> Rows:
    """Two of some rows."""
    return Rows(torch.ones(count, 2), torch.arange(count) < 2)


def test_of_rows_in_the_same_memory_only_those_that_were_written_are_read_again():
    one = rows()
    assert one.mul_(2.0) is one and one.only().tolist() == [[2, 2], [2, 2], [0, 0]]
    half, copy = one[:, :1], one + 0
    half.add_(1.0)
    assert half.only().flatten().tolist() == [3, 3, 0] and copy.only()[0].tolist() == [2, 2]
    with pytest.raises(UnsupportedError, match="is written into"):
        one.add_(1.0)


def test_rows_that_are_cut_of_a_tensor_are_not_written_into():
    cut = Rows(torch.ones(3, 2), torch.arange(3) < 2, memory=Memory(locked=True))
    for write in (lambda: cut.mul_(2.0), lambda: cut[:, 1:].add_(1.0)):
        with pytest.raises(UnsupportedError, match="what rows are cut of"):
            write()
    assert torch.equal((cut * 2).base, torch.full((3, 2), 2.0))


def test_a_table_that_is_written_into_gives_no_rows_any_more():
    one = rows()
    one.base.add_(1)
    with pytest.raises(UnsupportedError, match="is written into"):
        one.only()


def test_rows_chosen_otherwise_do_not_meet():
    with pytest.raises(UnsupportedError, match="chosen otherwise"):
        rows() + rows()


def count(*terms: int) -> Count:
    """A sum of counts, each of which is 1."""
    return Count(torch.tensor(sum(terms)), {(0, place): each for place, each in enumerate(terms)})


def test_counts_are_compared_with_what_they_cannot_be_less_than():
    some, more = count(1, 0), count(1, 1)
    assert some and more > some and some < more and some != more
    assert some > 0 and some != 0 and (more - some).terms == {(0, 1): 1}
    for unknown in (lambda: count(1, 0) == count(0, 1), lambda: some > more, lambda: some == 3,
                    lambda: int(some), lambda: some == some + 0, lambda: range(more)):  # fmt: skip
        with pytest.raises(UnsupportedError):
            unknown()


def test_the_check_compares_where_experts_are_empty():
    model, x = made()
    exported = torch.export.export(Plain(model), (), {"sample": x}, strict=False)
    with pytest.raises(UnsupportedError, match="without tokens"):
        check_routing(model, {"sample": x}, exported)


class Plain(nn.Module):
    """A network's choice, without its experts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor) -> Tensor:
        return sample + self.model.choose(sample).topk(2).values.mean()


def test_the_number_of_tokens_may_be_open():
    model, x = made()
    program = capture(model, {"sample": x}, dynamic={"batch": (2, 8)})
    verify(program)
    for batch in (3, 8):
        other = torch.randn(batch, 6, 8)
        with torch.no_grad():
            found = run_program(program, {"sample": other})[0]
            torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-6)
